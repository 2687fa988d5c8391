"""``tile_keys``: the keys that each tile's pooled queries need most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._common import CHUNK_BYTES, check_count
from .registry import Operation
from .topk import TOPK


def tile_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
    backend: str = "auto",
) -> Tensor:
    """Keys with the highest scores of each tile, without ever holding all scores. No gradient flows.

    A key's score is the probability that the tile's pooled queries give it among all candidates, merged over them by
    max or sum, times the key's weight. Keys that hold NaN or infinity come first, so that attention to them is NaN
    as when it is dense; other scores that are NaN count as nothing.

    Some CPU levels round queries and keys for the scores, so keys with nearly equal scores may be taken for each other
    there: ``avx512vnni`` and ``avx512bf16`` to 127 steps up to the row's largest element, ``amx`` to bfloat16. A logit
    is off by at most ``e = scale * (|q|_1 |k|_max / 254 + |k|_1 |q|_max / 254 + D |q|_max |k|_max / 254**2)``, with
    bfloat16 by ``scale * 2**-7 * sum(|q k|)``. Numerator and denominator of a probability are then each off by at most
    a factor ``exp(e)``, with the largest ``e`` of the tile, and every key selected scores at least ``exp(-4 e)`` times
    the lowest score of an exact selection. Attention over the selected keys has the precision asked for.

    Args:
        pooled: pooled queries of each tile ``[B, H, T, G, D]``.
        k: keys ``[B, H, N, D]``; the candidates are those from ``first``.
        weight: factor on each candidate's probabilities, not negative, ``[B, H, N - first]``, or None.
        first: number of leading tokens that every tile keeps.
        count: candidates to select per tile.
        scale: factor on the logits.
        sum_probabilities: merge the pooled queries' probabilities by sum instead of max.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        Token numbers, int32 ``[B, H, T, first + count]``, rising.

    Raises:
        ValueError: if ``count`` is not from 1 to the number of candidates.
    """
    return TILE_KEYS(pooled, k, weight, first, count, scale, sum_probabilities, backend=backend)


def key_scores(logits: Tensor, weight: Tensor | None, sum_probabilities: bool) -> Tensor:
    """Scores ``[B, H, T, candidates]`` from the pooled queries' logits ``[B, H, T, G, candidates]``."""
    probabilities = logits.softmax(-1)
    scores = probabilities.sum(3) if sum_probabilities else probabilities.amax(3)
    return scores if weight is None else scores * weight[:, :, None]


def pooled_logits(pooled: Tensor, candidates: Tensor) -> Tensor:
    """Pooled queries ``[B, H, T, G, D]``, scaled, times keys ``[B, H, D, C]``: ``[B, H, T, G, C]``."""
    return (pooled.flatten(2, 3) @ candidates).unflatten(2, pooled.shape[2:4])


def select_in_chunks(scores: Callable[[Tensor], Tensor], pooled: Tensor, k: Tensor, first: int, count: int) -> Tensor:
    """The best candidates of all tiles, after the tokens that every tile keeps, in pieces of bounded size.

    Args:
        scores: from the pooled queries of some tiles ``[B, H, t, G, D]`` to scores ``[B, H, t, N - first]``.
        pooled: pooled queries of all tiles ``[B, H, T, G, D]``.
        k: keys ``[B, H, N, D]``.
        first: number of leading tokens that every tile keeps.
        count: candidates to select per tile.

    Returns:
        Token numbers, int32 ``[B, H, T, first + count]``, rising.
    """
    check_count(count, k.shape[2] - first)
    broken = ~k[:, :, None, first:].isfinite().all(-1)
    bytes_per_tile = 2 * pooled.shape[:2].numel() * pooled.shape[3] * k.shape[2] * k.element_size()
    chosen = []
    for part in pooled.split(max(1, CHUNK_BYTES // max(1, bytes_per_tile)), dim=2):
        found = scores(part)
        found = torch.where(found.isnan(), -1.0, found).masked_fill(broken, float("inf"))
        chosen.append(TOPK.reference(found, count))
    indices = torch.cat(chosen, dim=2) + first
    kept = torch.arange(first, dtype=torch.int32, device=k.device)
    return torch.cat([kept.expand(*indices.shape[:3], first), indices], dim=-1)


def _reference(
    pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, scale: float, sum_probabilities: bool
) -> Tensor:
    candidates = k[:, :, first:].mT
    return select_in_chunks(
        lambda part: key_scores(pooled_logits(part, candidates), weight, sum_probabilities),
        pooled * scale, k, first, count,
    )  # fmt: skip


def _fake(pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, *_: object) -> Tensor:
    return pooled.new_empty((*pooled.shape[:3], first + count), dtype=torch.int32)


def _flops(pooled: torch.Size, k: torch.Size, weight: torch.Size | None, first: int, *_: object, **__: object) -> int:
    """Every pooled query times every candidate key."""
    return 2 * pooled.numel() * (k[2] - first)


TILE_KEYS = Operation(
    "tile_keys",
    "(Tensor pooled, Tensor k, Tensor? weight, SymInt first, SymInt count, float scale, bool sum_probabilities) "
    "-> Tensor",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    batched=("pooled", "k", "weight"),
)
