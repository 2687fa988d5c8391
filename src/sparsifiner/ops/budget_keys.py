"""``budget_keys``: keys for the tiles of an image that share one budget, so that tiles which need more get more."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ._common import check_count
from .registry import Operation
from .tile_keys import key_scores, pooled_logits
from .topk import TOPK


def budget_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    most: int,
    least: int,
    total: int,
    scale: float,
    sum_probabilities: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``total`` keys with the highest scores among all tiles and heads of an image. No gradient flows.

    Scores are those of :func:`tile_keys`. A tile gets its best ``least`` keys in any case and at most ``most``, and
    images do not share. Equal to one threshold on the scores of an image that leaves it ``total`` keys.

    Args:
        pooled: pooled queries of each tile ``[B, H, T, G, D]``.
        k: keys ``[B, H, N, D]``; the candidates are those from ``first``.
        weight: factor on each candidate's probabilities, not negative, ``[B, H, N - first]``, or None.
        first: number of leading tokens that every tile keeps besides.
        most: candidates of a tile at most.
        least: candidates of a tile at least.
        total: candidates of all tiles and heads of an image, ``H * T * least`` to ``H * T * most``.
        scale: factor on the logits.
        sum_probabilities: merge the pooled queries' probabilities by sum instead of max.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        Token numbers, int32 ``[B, H, T, first + most]``, rising, then padding; and their bias, float32 of the same
        shape: 0, or ``-inf`` where the number is padding. :class:`Connectivity` takes both.

    Raises:
        ValueError: if ``most``, ``least`` or ``total`` is out of range.
    """
    return BUDGET_KEYS(pooled, k, weight, first, most, least, total, scale, sum_probabilities, backend=backend)


def check_budget(num_lists: int, most: int, least: int, total: int) -> None:
    """Refuse a budget that ``num_lists`` tiles of an image cannot share."""
    if not 0 <= least <= most:
        raise SparsifinerError(f"a tile must keep from 0 to {most} keys at least, got {least}")
    if not num_lists * least <= total <= num_lists * most:
        raise SparsifinerError(
            f"an image must have from {num_lists * least} to {num_lists * most} keys, got {total}; "
            f"its {num_lists} tiles keep {least} to {most} each"
        )


def _reference(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    most: int,
    least: int,
    total: int,
    scale: float,
    sum_probabilities: bool,
) -> tuple[Tensor, Tensor]:
    check_count(most, k.shape[2] - first)
    batch, heads, tiles = pooled.shape[:3]
    check_budget(heads * tiles, most, least, total)
    scores = key_scores(pooled_logits(pooled * scale, k[:, :, first:].mT), weight, sum_probabilities)
    broken = ~k[:, :, None, first:].isfinite().all(-1)
    scores = torch.where(scores.isnan(), -1.0, scores).masked_fill(broken, float("inf"))
    candidates = TOPK.reference(scores, most).long()  # [B, H, T, most]
    of_tiles = scores.gather(-1, candidates)
    if least:
        of_tiles = of_tiles.scatter(-1, of_tiles.topk(least, dim=-1).indices, float("inf"))
    kept = torch.zeros(batch, heads * tiles * most, dtype=torch.bool, device=k.device)
    kept.scatter_(1, of_tiles.flatten(1).topk(total, dim=1).indices, True)
    kept = kept.view(candidates.shape)
    order = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices
    kept = kept.gather(-1, order)
    found = torch.where(kept, candidates.gather(-1, order) + first, 0)
    prefix = torch.arange(first, device=k.device).expand(batch, heads, tiles, first)
    indices = torch.cat([prefix, found], dim=-1).to(torch.int32)
    bias = torch.zeros(indices.shape, dtype=torch.float32, device=k.device)
    bias[..., first:].masked_fill_(~kept, float("-inf"))
    return indices, bias


def _fake(pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, most: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (*pooled.shape[:3], first + most)
    return pooled.new_empty(shape, dtype=torch.int32), pooled.new_empty(shape, dtype=torch.float32)


def _flops(pooled: torch.Size, k: torch.Size, weight: torch.Size | None, first: int, *_: object, **__: object) -> int:
    """Every pooled query times every candidate key."""
    return 2 * pooled.numel() * (k[2] - first)


BUDGET_KEYS = Operation(
    "budget_keys",
    "(Tensor pooled, Tensor k, Tensor? weight, SymInt first, SymInt most, SymInt least, SymInt total, float scale, "
    "bool sum_probabilities) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    batched=("pooled", "k", "weight"),
)
