"""The contract of a predictor: it scores keys per query tile, bounded in memory, and keeps the best."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..geometry.counting import num_kept
from ..geometry.tiling import Tiling
from ..ops.connectivity import Connectivity
from ..ops.inputs import AttentionInputs
from ..ops.tail import KeyGroups
from ..ops.topk import top_keys

# Scores held at once; 16,384 tokens in 4x4 tiles would otherwise need 1.6 GB per layer.
CHUNK_BYTES = 64 * 2**20

TileScores = Callable[[int, int], Tensor]
"""Scores of the tiles ``start`` to ``stop`` for every candidate key, ``[B, H, stop - start, candidates]``."""


@dataclass(frozen=True)
class PredictorConfig:
    """Base of a predictor's settings, a frozen dataclass in the predictor's file.

    ``name`` is the predictor's in the registry. ``learned`` says that its weights are to be fitted before its figures
    say anything, ``keeps_any_number`` that a threshold, not the keep rate, decides how many keys a tile keeps.
    """

    name: ClassVar[str] = ""
    learned: ClassVar[bool] = False

    @property
    def keeps_any_number(self) -> bool:
        return False

    def with_reconstruction(self, on: bool) -> PredictorConfig:
        """Settings of the phase that trains a learned predictor against dense attention; others stay as they are."""
        return self

    def replace(self, **changes: Any) -> Any:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the name and the settings."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"name": self.name, **settings}


@dataclass(frozen=True)
class LayerShape:
    """The attention layer a predictor serves.

    Args:
        num_heads: heads of the layer.
        head_dim: width of a head, ``D``.
        grid: rows and columns of the patch grid that learned weights are made for.
        num_prefix_tokens: prefix tokens of the model.
    """

    num_heads: int
    head_dim: int
    grid: tuple[int, int]
    num_prefix_tokens: int


class Predictor(nn.Module):
    """Estimates which keys each query tile needs. No gradient flows through the choice.

    With ``keep_prefix`` prefix tokens are kept on top of the budget and the candidates are the patches;
    without it every token is a candidate, as in the paper.

    Args:
        settings: the predictor's own.
        layer: the attention layer it serves.
        keep_rate: share of the candidates every tile keeps, in (0, 1].
        keep_prefix: prefix tokens are kept by every tile, on top of the budget.
    """

    bounds_fidelity: ClassVar[bool] = False
    """It looks at the dense attention: an upper bound of fidelity that cannot be faster, so never replaced by dense."""

    note: ClassVar[str] = ""
    """A warning for readers of figures made with a fresh one, or nothing."""

    settings: PredictorConfig

    def __init__(
        self, settings: PredictorConfig, layer: LayerShape, *, keep_rate: float, keep_prefix: bool = True
    ) -> None:
        super().__init__()
        self.settings, self.keep_rate, self.keep_prefix = settings, keep_rate, keep_prefix
        self.tail_offset: nn.Parameter | None = None
        """Added to the tail's logits, ``[H]``; the one weight that belongs to attention, not to the choice of keys."""

    @property
    def basis_grid(self) -> tuple[int, int] | None:
        """Patch grid that learned weights were made for; other grids use resampled ones. None without such weights."""
        return None

    @property
    def reconstructing(self) -> bool:
        """In training, attention runs dense and the scores imitate it: the paper's first phase."""
        return False

    @abstractmethod
    def tile_scores(self, inputs: AttentionInputs, value_distance: Tensor | None) -> tuple[TileScores, int]:
        """A function that scores a range of tiles, and the bytes it needs per tile.

        Args:
            inputs: of the attention call.
            value_distance: from :meth:`value_distances`.
        """

    @abstractmethod
    def score_macs(self, num_heads: int, head_dim: int, tiling: Tiling) -> int:
        """Multiply-adds of scoring every candidate key of one image, an estimate made before anything runs."""

    def mac_terms(
        self, counted: Callable[[str], int], layer: LayerShape, tiling: Tiling, has_tail: bool
    ) -> tuple[dict[str, int], int]:
        """Multiply-adds by step for one image, from what was counted while it ran.

        Args:
            counted: multiply-adds of a submodule by its path; of the whole predictor for ``""``.
            layer: the attention layer.
            tiling: the query tiles of the input.
            has_tail: the layer pools a tail.

        Returns:
            The steps by name, and how many of them the paper's published figures count.
        """
        total = counted("")
        return ({"products": total}, total) if total else ({}, 0)

    def forward(self, inputs: AttentionInputs, groups: KeyGroups | None = None) -> Connectivity:
        """The keys to keep.

        Args:
            inputs: of the attention call.
            groups: of the tail that stands in for the others, or None without one.
        """
        with torch.no_grad():  # compilers cannot trace it as a decorator where a function makes the predictor
            return self.choose(inputs, self.value_distances(groups, inputs.tiling))

    def choose(self, inputs: AttentionInputs, value_distance: Tensor | None) -> Connectivity:
        """The keys to keep, given how far each value lies from what would stand in for it."""
        tiling = inputs.tiling
        scores, bytes_per_tile = self.tile_scores(inputs, value_distance)
        if isinstance(bytes_per_tile, torch.SymInt):  # exported for any batch: as many pieces as for one image
            bytes_per_tile //= inputs.q.shape[0]
        step = max(1, CHUNK_BYTES // max(1, bytes_per_tile))
        ranges = [(start, min(start + step, tiling.num_tiles)) for start in range(0, tiling.num_tiles, step)]
        return self.select(scores, ranges, tiling, inputs.backend)

    def select(
        self, scores: TileScores, ranges: list[tuple[int, int]], tiling: Tiling, backend: str = "auto"
    ) -> Connectivity:
        """Keep the ``ceil(keep_rate * candidates)`` best keys of every tile."""
        chosen = [top_keys(scores(start, stop), self.num_keep(tiling), backend=backend) for start, stop in ranges]
        indices = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)
        return Connectivity(tiling, self.with_prefix(indices, tiling))

    def first_candidate(self, tiling: Tiling) -> int:
        """Token number of the first candidate key."""
        return tiling.num_prefix_tokens if self.keep_prefix else 0

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

    def value_distances(self, groups: KeyGroups | None, tiling: Tiling) -> Tensor | None:
        """Distance of each candidate's value from the mean that would stand in for it, ``[B, H, candidates]``.

        None without a tail.
        """
        return None if groups is None else groups.distance[:, :, self.first_candidate(tiling) :]


def value_distance_macs(layer: LayerShape, tiling: Tiling) -> int:
    """Block means of the values, and the norms of their distances from them: one multiply-add per entry each."""
    return 2 * layer.num_heads * layer.head_dim * tiling.num_patches
