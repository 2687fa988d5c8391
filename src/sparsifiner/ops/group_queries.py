"""``group_queries``: a few representative queries of each tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Operation


def group_queries(
    q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int, backend: str = "auto"
) -> Tensor:
    """Means of groups of like queries of each tile. No gradient flows.

    Args:
        q: queries ``[B, H, N, D]``.
        tile_tokens: tokens of each tile, int32 ``[T, S]``; -1 where it sticks out, its first token counts again.
        group_of: group in which each query of a tile starts, int32 ``[S]``.
        num_groups: number of groups, ``G``.
        steps: how often queries are regrouped around the means (Lloyd's algorithm); a group that lost all its queries
            keeps its mean.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        ``[B, H, T, G, D]`` in the dtype of ``q``.
    """
    return GROUP_QUERIES(q, tile_tokens, group_of, num_groups, steps, backend=backend)


def tile_queries(q: Tensor, tile_tokens: Tensor) -> Tensor:
    """Queries of each tile, ``[B, H, T, S, D]``; where a border tile sticks out, its first query again."""
    tokens = filled(tile_tokens)
    return q[:, :, tokens.flatten()].unflatten(2, tokens.shape)


def filled(tile_tokens: Tensor) -> Tensor:
    """Tokens of each tile, int64 ``[T, S]``; where a border tile sticks out, its first token again."""
    tokens = tile_tokens.long()
    return torch.where(tokens >= 0, tokens, tokens[:, :1])


def group_weights(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    """The groups of :func:`group_queries` as averaging weights, rows that sum to 1, ``[B, H, T, G, S]``."""
    queries = tile_queries(q, tile_tokens)
    start = F.one_hot(group_of.long(), num_groups).mT.to(q.dtype)
    weights = _averaging(start).expand(*queries.shape[:3], -1, -1)
    if num_groups == queries.shape[3]:
        return weights
    for _ in range(steps):
        centres = weights @ queries
        # The nearest centre: |q - c|^2 without the part that is the same for all centres.
        nearness = centres @ queries.mT - centres.square().sum(-1, keepdim=True) / 2
        nearest = nearness.argmax(3, keepdim=True)
        assigned = torch.zeros_like(nearness).scatter_(3, nearest, 1.0)
        weights = torch.where(assigned.sum(-1, keepdim=True) > 0, _averaging(assigned), weights)
    return weights


def _averaging(assigned: Tensor) -> Tensor:
    """0/1 memberships ``[..., G, S]`` to averaging weights; an empty group gives zeros."""
    return assigned / assigned.sum(-1, keepdim=True).clamp(min=1)


def _reference(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    return group_weights(q, tile_tokens, group_of, num_groups, steps) @ tile_queries(q, tile_tokens)


def _fake(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], tile_tokens.shape[0], num_groups, q.shape[3])


def _flops(
    q: torch.Size, tile_tokens: torch.Size, group_of: torch.Size, num_groups: int, steps: int, *_: object, **__: object
) -> int:
    """A mean, then distances and a mean per step."""
    batch, heads, _tokens, width = q
    num_tiles, tile_size = tile_tokens
    return 2 * batch * heads * num_tiles * tile_size * width * (steps * (num_groups + 1) + 1)


GROUP_QUERIES = Operation(
    "group_queries",
    "(Tensor q, Tensor tile_tokens, Tensor group_of, SymInt num_groups, SymInt steps) -> Tensor",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    batched=("q",),
)
