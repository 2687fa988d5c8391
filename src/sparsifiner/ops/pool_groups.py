"""``pool_groups``: the mean of each group that ``group_patches`` made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ..geometry.tiling import Tiling
from ._common import check_tokens, num_blocks, numbers_of
from .group_patches import group_means
from .registry import Operation


def pool_groups(x: Tensor, member: Tensor, blocks: Tiling, backend: str = "auto") -> Tensor:
    """Mean of the patches of ``x`` over each group, differentiable; zeros for a group without any.

    Args:
        x: tokens ``[B, H, N, D]``, prefix tokens first.
        member: group of each patch, int32 ``[B, H, num_patches]``, from :func:`group_patches`.
        blocks: the blocks that the groups started as.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        ``[B, H, P, D]`` in the dtype of ``x``.

    Raises:
        ValueError: if ``x`` has other tokens than ``blocks``, or ``member`` is not as above.
        IndexError: if a patch is in a group that started neither as its block nor as one around it; some backends
            accept that.
    """
    return POOL_GROUPS(x, member, *numbers_of(blocks), backend=backend)


def check_member(x: Tensor, member: Tensor, rows: int, columns: int) -> None:
    """Refuse groups that :func:`group_patches` cannot have made for ``x`` ``[B, H, N, D]``."""
    if member.dtype != torch.int32 or member.shape != (*x.shape[:2], rows * columns):
        raise SparsifinerError(
            f"member must be int32 [B, H, {rows * columns}], got {member.dtype} {list(member.shape)}"
        )


def _reference(
    x: Tensor, member: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int
) -> Tensor:
    check_tokens(x, rows, columns, prefix)
    check_member(x, member, rows, columns)
    empty = x.new_zeros((*x.shape[:2], num_blocks(rows, columns, block_rows, block_columns), x.shape[3]))
    return group_means(x[:, :, prefix:], member.long(), empty).to(x.dtype)


def _fake(
    x: Tensor, member: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, *_: object
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], num_blocks(rows, columns, block_rows, block_columns), x.shape[3])


POOL_GROUPS = Operation(
    "pool_groups",
    "(Tensor x, Tensor member, SymInt rows, SymInt columns, SymInt block_rows, SymInt block_columns, SymInt prefix) "
    "-> Tensor",
    reference=_reference,
    fake=_fake,
    batched=("x", "member"),
    differentiable=True,
)
