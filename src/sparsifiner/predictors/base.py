"""What every predictor does: score keys per query tile, bounded in memory, and keep the best."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import SparsifinerConfig, num_kept
from ..errors import SparsifinerError
from ..geometry.tiling import Tiling
from ..ops.connectivity import Connectivity
from ..ops.tail import KeyGroups, tail_groups
from ..ops.topk import top_keys

# Scores held at once; 16,384 tokens in 4x4 tiles would otherwise need 1.6 GB per layer.
CHUNK_BYTES = 64 * 2**20

TileScores = Callable[[int, int], Tensor]
"""Scores of the tiles ``start`` to ``stop`` for every candidate key, ``[B, H, stop - start, candidates]``."""


class Predictor(nn.Module):
    """Estimates which keys each query tile needs. No gradient flows through the choice.

    With ``keep_prefix`` prefix tokens are kept on top of the budget and the candidates are the patches;
    without it every token is a candidate, as in the paper.
    """

    def __init__(self, config: SparsifinerConfig) -> None:
        super().__init__()
        if not isinstance(config.keep_rate, float):
            raise SparsifinerError("a predictor serves one layer; give it config.for_layer(...), with one keep_rate")
        self.config = config
        self.tail_offset: nn.Parameter | None = None
        """Added to the tail's logits, ``[H]``; the one weight that belongs to attention, not to the choice of keys."""

    @property
    def keep_rate(self) -> float:
        assert isinstance(self.config.keep_rate, float)
        return self.config.keep_rate

    @abstractmethod
    def tile_scores(
        self, q: Tensor, k: Tensor, stakes: Tensor | None, tiling: Tiling, scale: float, attn_bias: Tensor | None
    ) -> tuple[TileScores, int]:
        """A function that scores a range of tiles, and the bytes it needs per tile; ``stakes`` are :meth:`stakes`."""

    @abstractmethod
    def score_macs(self, num_heads: int, head_dim: int, tiling: Tiling) -> int:
        """Multiply-adds of scoring every candidate key of one image, an estimate made before anything runs."""

    @torch.no_grad()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiling: Tiling,
        scale: float,
        attn_bias: Tensor | None = None,
        groups: KeyGroups | None = None,
    ) -> Connectivity:
        """The keys to keep.

        Args:
            q: queries ``[B, H, N, D]``, as attention uses them (after norms and rotary embedding).
            k: keys ``[B, H, N, D]``.
            v: values ``[B, H, N, D]``.
            tiling: which queries form a tile.
            scale: factor on the attention logits.
            attn_bias: added to the attention logits, ``[1 or B, 1 or H, N, N]``, or None.
            groups: of the tail, from :func:`tail_groups`; made here if None.
        """
        if groups is None:
            groups = tail_groups(self.config, k, v, tiling, attn_bias)
        return self.choose(q, k, self.stakes(groups, tiling), tiling, scale, attn_bias)

    def choose(
        self, q: Tensor, k: Tensor, stakes: Tensor | None, tiling: Tiling, scale: float, attn_bias: Tensor | None
    ) -> Connectivity:
        """The keys to keep, given what losing each would cost; other arguments as in :meth:`forward`."""
        scores, bytes_per_tile = self.tile_scores(q, k, stakes, tiling, scale, attn_bias)
        step = max(1, CHUNK_BYTES // max(1, bytes_per_tile))
        ranges = [(start, min(start + step, tiling.num_tiles)) for start in range(0, tiling.num_tiles, step)]
        return self.select(scores, ranges, tiling)

    def select(self, scores: TileScores, ranges: list[tuple[int, int]], tiling: Tiling) -> Connectivity:
        """Keep the ``ceil(keep_rate * candidates)`` best keys of every tile."""
        chosen = [top_keys(scores(start, stop), self.num_keep(tiling)) for start, stop in ranges]
        indices = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)
        return Connectivity(tiling, self.with_prefix(indices, tiling))

    def first_candidate(self, tiling: Tiling) -> int:
        """Token number of the first candidate key."""
        return tiling.num_prefix_tokens if self.config.keep_prefix else 0

    def num_candidates(self, tiling: Tiling) -> int:
        return tiling.num_tokens - self.first_candidate(tiling)

    def num_keep(self, tiling: Tiling) -> int:
        """Candidates every tile keeps, ``ceil(keep_rate * candidates)``.

        Where tokens were pruned, ``keep_rate`` still is a share of the whole image's, as in the paper; no more
        than there are.
        """
        candidates = self.num_candidates(tiling)
        return min(candidates, num_kept(self.keep_rate, candidates + tiling.num_missing))

    def with_prefix(self, candidates: Tensor, tiling: Tiling) -> Tensor:
        """Candidate numbers ``[B, H, T, K]`` to token numbers, prefix tokens put first where always kept."""
        first = self.first_candidate(tiling)
        if not first:
            return candidates
        prefix = torch.arange(first, dtype=torch.int32, device=candidates.device)
        return torch.cat([prefix.expand(*candidates.shape[:3], first), candidates + first], dim=-1)

    def stakes(self, groups: KeyGroups | None, tiling: Tiling) -> Tensor | None:
        """Distance of each candidate's value from the mean that would stand in for it, ``[B, H, candidates]``."""
        return None if groups is None else groups.distance[:, :, self.first_candidate(tiling) :]
