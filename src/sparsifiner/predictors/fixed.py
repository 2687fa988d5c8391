"""Fixed patterns: the same keys for every image. Baselines that instance-dependence has to beat."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import seed
from ..geometry.subset import SubsetTiling
from ..geometry.tiling import Tiling
from ..ops.inputs import AttentionInputs
from .base import Predictor, PredictorConfig, TileScores
from .registry import register_predictor


@dataclass(frozen=True)
class LocalConfig(PredictorConfig):
    """The local window has no settings besides the keep rate."""


@dataclass(frozen=True)
class StridedConfig(PredictorConfig):
    """The strided pattern has no settings besides the keep rate."""


@dataclass(frozen=True)
class RandomConfig(PredictorConfig):
    """Settings of the random pattern.

    Args:
        seed: of the pattern, from ``-2**63`` to ``2**63 - 1``.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        seed("seed", self.seed, least=-(2**63))


class _FixedPattern(Predictor):
    """A pattern that depends on positions only. Prefix tokens, where they compete, always win."""

    @abstractmethod
    def pattern(self, tiles: Tensor, heads: int, tiling: Tiling) -> Tensor:
        """Scores of the tiles numbered ``tiles`` ``[t]`` for every patch.

        Their shape is ``[H or 1, t, num_patches]``, or ``[B, 1, t, num_patches]`` where images hold different patches.
        """

    def tile_scores(self, inputs: AttentionInputs, value_distance: Tensor | None) -> tuple[TileScores, int]:
        tiling, device, (batch, heads, _, _) = inputs.tiling, inputs.q.device, inputs.q.shape
        competing = tiling.num_prefix_tokens - self.first_candidate(tiling)

        def scores(start: int, stop: int) -> Tensor:
            patches = self.pattern(torch.arange(start, stop, device=device), heads, tiling)
            padded = torch.nn.functional.pad(patches, (competing, 0), value=float("inf"))
            return padded.expand(batch, heads, -1, -1)

        return scores, 8 * batch * heads * tiling.num_tokens

    def score_macs(self, num_heads: int, head_dim: int, tiling: Tiling) -> int:
        return 0


@register_predictor("local", LocalConfig)
class LocalPredictor(_FixedPattern):
    """The nearest keys around the tile's centre, by Euclidean distance on the patch grid."""

    def pattern(self, tiles: Tensor, heads: int, tiling: Tiling) -> Tensor:
        if isinstance(tiling, SubsetTiling):
            centres, keys = tiling.tile_centres()[:, tiles], tiling.coordinates()
            return -(centres[:, :, None] - keys[:, None]).square().sum(-1)[:, None]
        rows, columns = tiling.grid
        tile_row, tile_column = tiles // tiling.shape[1], tiles % tiling.shape[1]
        y = tile_row * tiling.tile[0] + (tiling.tile[0] - 1) / 2
        x = tile_column * tiling.tile[1] + (tiling.tile[1] - 1) / 2
        key_y = torch.arange(rows, device=tiles.device)
        key_x = torch.arange(columns, device=tiles.device)
        vertical = (y[:, None] - key_y) ** 2
        horizontal = (x[:, None] - key_x) ** 2
        return -(vertical[:, :, None] + horizontal[:, None, :]).flatten(1)[None]


@register_predictor("strided", StridedConfig)
class StridedPredictor(_FixedPattern):
    """Evenly spaced keys over the sequence, shifted by one from tile to tile (Child et al., 2019)."""

    def pattern(self, tiles: Tensor, heads: int, tiling: Tiling) -> Tensor:
        competing = tiling.num_prefix_tokens - self.first_candidate(tiling)
        num_keep = max(0, self.num_keep(tiling) - competing)
        position = (torch.arange(tiling.num_patches, device=tiles.device) + tiles[:, None]) % tiling.num_patches
        kept = (position + 1) * num_keep // tiling.num_patches > position * num_keep // tiling.num_patches
        return kept.float()[None]


@register_predictor("random", RandomConfig)
class RandomPredictor(_FixedPattern):
    """Keys drawn at random per head and tile; the same draw on every device for one ``seed``."""

    settings: RandomConfig

    def pattern(self, tiles: Tensor, heads: int, tiling: Tiling) -> Tensor:
        head = torch.arange(heads, device=tiles.device)[:, None, None]
        key = torch.arange(tiling.num_patches, device=tiles.device)
        counter = (head * tiling.num_tiles + tiles[None, :, None]) * tiling.num_patches + key
        return _hash(counter + _hash(torch.tensor(self.settings.seed, device=tiles.device))).float()


def _hash(x: Tensor) -> Tensor:
    """Mix 64-bit integers into 24 well-spread bits (a counter-based generator: no state, no order)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)) >> 40
