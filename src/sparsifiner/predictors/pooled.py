"""The training-free predictor: a few representative queries of each tile against every key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .._utils.checks import choose, number, pair
from ..geometry.tiling import Tiling
from ..ops.budget_keys import budget_keys
from ..ops.connectivity import Connectivity
from ..ops.group_queries import filled, group_queries, group_weights, tile_queries
from ..ops.inputs import AttentionInputs
from ..ops.screened_keys import screened_keys
from ..ops.tile_keys import key_scores, pooled_logits, tile_keys
from .base import LayerShape, Predictor, PredictorConfig, TileScores, value_distance_macs
from .registry import register_predictor
from .screening import num_screened_blocks, screening_blocks

Reduction = Literal["max", "sum"]
Budget = Literal["tile", "layer"]


@dataclass(frozen=True)
class PooledConfig(PredictorConfig):
    """Settings of the training-free predictor.

    Args:
        query_pool: rows and columns of the sub-blocks whose queries are averaged before scoring; a side that does not
            divide the tile's is taken as 1.
        query_refine: Lloyd steps that regroup a tile's queries around those averages, at most 100.
        reduction: how the groups of a tile are merged into one score per key, ``max`` or ``sum``.
        screen_from: from this many candidate keys on, blocks of 2x2 keys are scored first by their mean, and single
            keys only in the best of them, about twice as many as are kept and a tenth of all. None: every key is
            scored. It takes no effect with keep rates from 0.2 on, an attention bias or ``budget="layer"``.
        budget: who shares the keys that ``keep_rate`` allows. With ``tile`` every tile of every head keeps as many.
            With ``layer`` an image's tiles and heads keep as many together, those of the highest scores, so that tiles
            and heads which need more get more: a tile at least a quarter of its share and at most twice. It takes no
            effect with an attention bias.
    """

    query_pool: tuple[int, int] = (2, 2)
    query_refine: int = 2
    reduction: Reduction = "max"
    screen_from: int | None = 8192
    budget: Budget = "tile"

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_pool", pair("query_pool", self.query_pool))
        number("query_refine", self.query_refine, least=0, most=100, integer=True)
        number("screen_from", self.screen_from, least=0, integer=True, optional=True)
        choose("reduction", self.reduction, get_args(Reduction))
        choose("budget", self.budget, get_args(Budget))


@register_predictor("pooled", PooledConfig)
class PooledPredictor(Predictor):
    """Attention of a few representative queries per tile, times what the tail would get wrong of the value.

    No weights: the model's own queries and keys are used. A tile's queries fall into as many groups as it has
    sub-blocks of ``query_pool`` patches (a side that does not divide the tile's is taken as 1); groups start as
    the sub-blocks and gather like queries in ``query_refine`` Lloyd steps, because the queries of a sub-block
    that straddles an edge of the image average to one that nobody asks. A key scores by the group that needs it
    most (``reduction="max"``) or by all of them together (``"sum"``). With a tail, its attention counts times the
    distance of its value from the pooled value that would stand in for it: a key like its neighbours costs
    nothing to drop. From ``screen_from`` keys on, single keys are scored in the most promising blocks only.
    """

    settings: PooledConfig

    def tile_scores(self, inputs: AttentionInputs, value_distance: Tensor | None) -> tuple[TileScores, int]:
        q, k, tiling, scale, attn_bias = inputs.q, inputs.k, inputs.tiling, inputs.scale, inputs.attn_bias
        first = self.first_candidate(tiling)
        groups = self.groups(q, tiling)  # [B, H, T, G, S]
        tile_tokens = tiling.tokens(q.device)
        pooled = groups @ tile_queries(q, tile_tokens) * scale  # [B, H, T, G, D]
        candidates, tokens = k[:, :, first:].mT, filled(tile_tokens)
        by_sum = self.settings.reduction == "sum"

        def scores(start: int, stop: int) -> Tensor:
            logits = pooled_logits(pooled[:, :, start:stop], candidates)
            if attn_bias is not None:
                rows = attn_bias[:, :, tokens[start:stop].flatten(), first:].unflatten(2, (stop - start, -1))
                rows = rows.clamp(min=torch.finfo(rows.dtype).min / 4)  # -inf times a weight of zero is NaN
                logits = logits + groups[:, :, start:stop] @ rows
            return key_scores(logits, value_distance, by_sum)

        batch, heads, num_tokens, _ = q.shape
        rows_per_tile = 2 * groups.shape[3] + (0 if attn_bias is None else tiling.tile_size)
        return scores, batch * heads * num_tokens * rows_per_tile * q.element_size()

    def score_macs(self, num_heads: int, head_dim: int, tiling: Tiling) -> int:
        groups = Tiling(tiling.tile, self.group_block(tiling)).num_tiles
        keys, num_blocks = self.num_candidates(tiling), self.num_screened_blocks(tiling)
        if num_blocks is not None:
            blocks = screening_blocks(tiling)
            keys = blocks.num_tiles + num_blocks * blocks.tile_size
        return num_heads * head_dim * tiling.num_tiles * groups * keys

    def mac_terms(
        self, counted: Callable[[str], int], layer: LayerShape, tiling: Tiling, has_tail: bool
    ) -> tuple[dict[str, int], int]:
        terms, _ = super().mac_terms(counted, layer, tiling, has_tail)
        if terms and has_tail:
            terms["values"] = value_distance_macs(layer, tiling)
        return terms, sum(terms.values())

    def choose(self, inputs: AttentionInputs, value_distance: Tensor | None) -> Connectivity:
        if inputs.attn_bias is not None:  # the operations know of none
            return super().choose(inputs, value_distance)
        q, k, tiling, scale, backend = inputs.q, inputs.k, inputs.tiling, inputs.scale, inputs.backend
        starts = self._groups_at_first(tiling, q.device)
        pooled = group_queries(q, *starts, self.settings.query_refine, backend=backend)
        first, count, num_blocks = self.first_candidate(tiling), self.num_keep(tiling), self.num_screened_blocks(tiling)
        by_sum = self.settings.reduction == "sum"
        if self.settings.budget == "layer":
            least, most = count // 4, min(2 * count, self.num_candidates(tiling))
            total = count * q.shape[1] * tiling.num_tiles
            budget = (first, most, least, total)
            indices, bias = budget_keys(pooled, k, value_distance, *budget, scale, by_sum, backend=backend)
            return Connectivity(tiling, indices, bias)
        if num_blocks is None:
            indices = tile_keys(pooled, k, value_distance, first, count, scale, by_sum, backend=backend)
            return Connectivity(tiling, indices)
        blocks = screening_blocks(tiling)
        indices = screened_keys(pooled, k, value_distance, blocks, num_blocks, count, scale, by_sum, backend=backend)
        return Connectivity(tiling, indices)

    def num_screened_blocks(self, tiling: Tiling) -> int | None:
        """Blocks per tile whose keys are scored one by one; None where every key is."""
        screen_from = self.settings.screen_from
        only_patches = self.first_candidate(tiling) == tiling.num_prefix_tokens
        if self.settings.budget == "layer":
            return None
        if screen_from is None or self.num_candidates(tiling) < screen_from or not only_patches:
            return None
        return num_screened_blocks(tiling, self.num_keep(tiling))

    def groups(self, q: Tensor, tiling: Tiling) -> Tensor:
        """Groups of each tile's queries as averaging weights, rows that sum to 1, ``[B, H, T, G, S]``."""
        return group_weights(q, *self._groups_at_first(tiling, q.device), self.settings.query_refine)

    def _groups_at_first(self, tiling: Tiling, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Tokens of each tile, the group each of its queries starts in, and the number of groups."""
        blocks = Tiling(tiling.tile, self.group_block(tiling))
        return tiling.tokens(device), blocks.tile_of_patch(device).to(torch.int32), blocks.num_tiles

    def group_block(self, tiling: Tiling) -> tuple[int, int]:
        """Rows and columns of the sub-blocks that a tile's groups start as."""
        (height, width), (rows, columns) = tiling.tile, tiling.rectangle(self.settings.query_pool)
        return (rows if height % rows == 0 else 1, columns if width % columns == 0 else 1)
