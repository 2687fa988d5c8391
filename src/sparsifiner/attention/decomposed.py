"""A bias of the logits that is a sum of one part per key row and one per key column, folded into queries and keys.

``bias[i, j] = rows[i, row of j] + columns[i, column of j]`` (Li et al., MViTv2, 2022, section 4.1; SAM) would be a
matrix of N x N. As an inner product it is a few more columns of the queries, and of the keys, where they tell the
key's row and column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.cached_tensors import cached_tensors

_MULTIPLE = 16  # of the width, which the kernels ask for


def folded_width(head_dim: int, grid: tuple[int, int]) -> int:
    """Width of the heads that :func:`fold_bias` returns."""
    return -(-(head_dim + sum(grid)) // _MULTIPLE) * _MULTIPLE


def fold_bias(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose attention without a bias is that of the given ones with it.

    Args:
        q: queries ``[B, H, N, D]`` of prefix tokens and the patches of one grid.
        k: keys, likewise.
        v: values, likewise.
        rows: bias of each query towards the keys of a row, ``[B, H, N, rows]``.
        columns: towards those of a column, ``[B, H, N, columns]``.
        scale: factor on the logits, which the bias is not multiplied with.
        num_prefix_tokens: tokens before the patches, which get no bias as keys.

    Returns:
        q, k and v ``[B, H, N, W]``, of :func:`folded_width`; the output's first ``D`` columns are the attended values.
    """
    grid = (rows.shape[-1], columns.shape[-1])
    width = folded_width(q.shape[-1], grid)
    rest = width - q.shape[-1] - sum(grid)
    own = [q, (rows / scale).to(q.dtype), (columns / scale).to(q.dtype)]
    places = _places(grid, num_prefix_tokens, rest, k.device).to(k.dtype).expand(*k.shape[:3], -1)
    return F.pad(torch.cat(own, dim=-1), (0, rest)), torch.cat([k, places], dim=-1), F.pad(v, (0, width - v.shape[-1]))


@cached_tensors
def _places(grid: tuple[int, int], num_prefix_tokens: int, rest: int, device: torch.device) -> Tensor:
    """1 in the columns of each key's row and column, ``[N, rows + columns + rest]``."""
    rows, columns = (torch.eye(side, device=device) for side in grid)
    of_patches = torch.cat([rows.repeat_interleave(grid[1], dim=0), columns.repeat(grid[0], 1)], dim=-1)
    return F.pad(of_patches, (0, rest, num_prefix_tokens, 0))
