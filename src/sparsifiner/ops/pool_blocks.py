"""``pool_blocks``: the mean of each block of the patch grid."""

from __future__ import annotations

from torch import Tensor

from ..geometry.tiling import Tiling
from ._common import blocks_of, check_tokens, num_blocks, numbers_of
from .registry import Operation


def pool_blocks(x: Tensor, blocks: Tiling, backend: str = "auto") -> Tensor:
    """Mean of the patches of ``x`` over each block, differentiable.

    Args:
        x: tokens ``[B, H, N, D]``, prefix tokens first.
        blocks: blocks of the patch grid, with the number of prefix tokens to skip.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        ``[B, H, P, D]`` in the dtype of ``x``.

    Raises:
        ValueError: if ``x`` has other tokens than ``blocks``.
    """
    return POOL_BLOCKS(x, *numbers_of(blocks), backend=backend)


def _reference(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    check_tokens(x, rows, columns, prefix)
    return blocks_of(rows, columns, block_rows, block_columns, prefix).mean_patches(x[:, :, prefix:])


def _fake(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], num_blocks(rows, columns, block_rows, block_columns), x.shape[3])


POOL_BLOCKS = Operation(
    "pool_blocks",
    "(Tensor x, SymInt rows, SymInt columns, SymInt block_rows, SymInt block_columns, SymInt prefix) -> Tensor",
    reference=_reference,
    fake=_fake,
    batched=("x",),
    differentiable=True,
)
