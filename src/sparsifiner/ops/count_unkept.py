"""``count_unkept``: for how many keys each pooled token stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SparsifinerError
from ..geometry.tiling import Tiling
from ._common import blocks_of, check_indices, num_blocks, numbers_of
from .registry import Operation


def count_unkept(
    indices: Tensor, bias: Tensor | None, blocks: Tiling, member: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Log of the number of keys per block that are not among the kept ones. No gradient flows.

    Args:
        indices: token numbers of the kept keys, int32 ``[B, H, T, K]``.
        bias: ``[B, H, T, K]`` or None; entries whose bias is ``-inf`` are not kept.
        blocks: blocks of the patch grid, with the number of prefix tokens, which are in no block.
        member: group of each patch, int32 ``[B, H, num_patches]``, where groups stand for the blocks they started as.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        ``[B, H, T, P]``, float32; ``-inf`` where every key is kept.

    Raises:
        ValueError: if ``member`` has another shape.
        IndexError: if an index is negative or not below ``N`` (checked where the tensors are on a CPU).
    """
    return COUNT_UNKEPT(indices, bias, member, *numbers_of(blocks), backend=backend)


def _reference(
    indices: Tensor,
    bias: Tensor | None,
    member: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
) -> Tensor:
    blocks = blocks_of(rows, columns, block_rows, block_columns, prefix)
    check_indices(indices, blocks.num_tokens)
    if member is None:
        member = blocks.tile_of_patch(indices.device).expand(*indices.shape[:2], -1)
    elif member.shape != (*indices.shape[:2], rows * columns):
        raise SparsifinerError(f"member must have shape [B, H, {rows * columns}], got {list(member.shape)}")
    # Prefix keys and padding are counted in an extra last column, which is cut off.
    block_of_token = F.pad(member.long(), (prefix, 0), value=blocks.num_tiles)
    block = block_of_token.gather(2, indices.flatten(2).long()).view(indices.shape)
    if bias is not None:
        block = block.masked_fill(bias == float("-inf"), blocks.num_tiles)

    def count(numbers: Tensor) -> Tensor:
        zeros = torch.zeros(*numbers.shape[:-1], blocks.num_tiles + 1, device=numbers.device)
        return zeros.scatter_add_(-1, numbers, torch.ones_like(numbers, dtype=zeros.dtype))[..., :-1]

    left = count(block_of_token)[:, :, None] - count(block)
    return left.clamp_(min=0.0).log_()


def _fake(
    indices: Tensor,
    bias: Tensor | None,
    member: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    *_: object,
) -> Tensor:
    blocks = num_blocks(rows, columns, block_rows, block_columns)
    return indices.new_empty((*indices.shape[:3], blocks), dtype=torch.float32)


COUNT_UNKEPT = Operation(
    "count_unkept",
    "(Tensor indices, Tensor? bias, Tensor? member, SymInt rows, SymInt columns, SymInt block_rows, "
    "SymInt block_columns, SymInt prefix) -> Tensor",
    reference=_reference,
    fake=_fake,
    batched=("indices", "bias", "member"),
)
