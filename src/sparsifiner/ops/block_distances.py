"""``block_distances``: how far each token lies from the mean of its block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry.tiling import Tiling
from ._common import blocks_of, check_tokens, float_like, numbers_of
from .registry import Operation


def block_distances(x: Tensor, blocks: Tiling, backend: str = "auto") -> Tensor:
    """Distance of each token of ``x`` from the mean of its block, differentiable.

    Args:
        x: tokens ``[B, H, N, D]``, prefix tokens first. They lie in no block: theirs is the distance from zero.
        blocks: blocks of the patch grid, with the number of prefix tokens.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        ``[B, H, N]``, float64 for float64 and float32 for everything else.

    Raises:
        ValueError: if ``x`` has other tokens than ``blocks``.
    """
    return BLOCK_DISTANCES(x, *numbers_of(blocks), backend=backend)


def _reference(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    check_tokens(x, rows, columns, prefix)
    blocks = blocks_of(rows, columns, block_rows, block_columns, prefix)
    x = x.to(float_like(x))
    means = blocks.mean_patches(x[:, :, prefix:])[:, :, blocks.tile_of_patch(x.device)]
    return torch.cat([x[:, :, :prefix], x[:, :, prefix:] - means], dim=2).norm(dim=-1)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=float_like(x))


BLOCK_DISTANCES = Operation(
    "block_distances",
    "(Tensor x, SymInt rows, SymInt columns, SymInt block_rows, SymInt block_columns, SymInt prefix) -> Tensor",
    reference=_reference,
    fake=_fake,
    batched=("x",),
    differentiable=True,
)
