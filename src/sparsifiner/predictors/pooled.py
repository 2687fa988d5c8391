"""The training-free predictor: a few representative queries of each tile against every key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.tiling import Tiling
from ..ops.connectivity import Connectivity
from ..ops.selection import native_group_queries, native_screened_keys, native_tile_keys, why_not_tile_keys
from .base import Predictor, TileScores
from .screening import Screening, num_screened_blocks, screening_blocks


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

    def tile_scores(
        self, q: Tensor, k: Tensor, stakes: Tensor | None, tiling: Tiling, scale: float, attn_bias: Tensor | None
    ) -> tuple[TileScores, int]:
        first = self.first_candidate(tiling)
        groups = self.groups(q, tiling)  # [B, H, T, G, S]
        tokens = _tile_tokens(tiling, q.device)
        pooled = groups @ _tile_queries(q, tokens) * scale  # [B, H, T, G, D]
        candidates = k[:, :, first:].transpose(-1, -2)
        weights_of_keys = None if stakes is None else stakes[:, :, None]
        num_blocks = None if attn_bias is not None else self.num_screened_blocks(tiling)
        screening = None if num_blocks is None else Screening.of(k, stakes, tiling, num_blocks)
        by_sum = self.config.reduction == "sum"

        def scores(start: int, stop: int) -> Tensor:
            part = pooled[:, :, start:stop]
            logits = (part.flatten(2, 3) @ candidates).unflatten(2, part.shape[2:4])
            if attn_bias is not None:
                rows = attn_bias[:, :, tokens[start:stop].flatten(), first:].unflatten(2, (stop - start, -1))
                logits = logits + groups[:, :, start:stop] @ rows
            left_out = None if screening is None else ~screening.choose(part, by_sum)
            if left_out is not None:
                logits = logits.masked_fill(left_out[:, :, :, None], float("-inf"))
            weights = logits.softmax(-1)
            needed = weights.sum(3) if by_sum else weights.amax(3)
            if weights_of_keys is not None:
                needed = needed * weights_of_keys
            return needed if left_out is None else needed.masked_fill(left_out, -1.0)

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

    def choose(
        self, q: Tensor, k: Tensor, stakes: Tensor | None, tiling: Tiling, scale: float, attn_bias: Tensor | None
    ) -> Connectivity:
        blocks = Tiling(tiling.tile, self.group_block(tiling))
        if attn_bias is not None or why_not_tile_keys(q, blocks.num_tiles) is not None:
            return super().choose(q, k, stakes, tiling, scale, attn_bias)
        tokens, group_of = tiling.tokens(q.device), blocks.tile_of_patch(q.device).to(torch.int32)
        pooled = native_group_queries(q, tokens, group_of, blocks.num_tiles, self.config.query_refine)
        first, count, num_blocks = self.first_candidate(tiling), self.num_keep(tiling), self.num_screened_blocks(tiling)
        by_sum = self.config.reduction == "sum"
        if num_blocks is None:
            return Connectivity(tiling, native_tile_keys(pooled, k, stakes, first, count, scale, by_sum))
        shape = (*tiling.grid, *screening_blocks(tiling).tile)
        indices = native_screened_keys(pooled, k, stakes, *shape, first, num_blocks, count, scale, by_sum)
        return Connectivity(tiling, indices)

    def num_screened_blocks(self, tiling: Tiling) -> int | None:
        """Blocks per tile whose keys are scored one by one; None where every key is."""
        screen_from = self.config.screen_from
        only_patches = self.first_candidate(tiling) == tiling.num_prefix_tokens
        if screen_from is None or self.num_candidates(tiling) < screen_from or not only_patches:
            return None
        return num_screened_blocks(tiling, self.num_keep(tiling))

    def groups(self, q: Tensor, tiling: Tiling) -> Tensor:
        """Groups of each tile's queries as averaging weights, rows that sum to 1, ``[B, H, T, G, S]``."""
        blocks = Tiling(tiling.tile, self.group_block(tiling))
        member, num_groups = blocks.tile_of_patch(q.device), blocks.num_tiles  # [S]
        tokens = _tile_tokens(tiling, q.device)
        queries = _tile_queries(q, tokens)
        weights = _averaging(F.one_hot(member, num_groups).mT.to(q.dtype)).expand(*queries.shape[:3], -1, -1)
        if num_groups == queries.shape[3]:
            return weights
        for _ in range(self.config.query_refine):
            centres = weights @ queries
            # The nearest centre: |q - c|^2 without the part that is the same for all centres.
            nearness = centres @ queries.mT - centres.square().sum(-1, keepdim=True) / 2
            nearest = nearness.argmax(3, keepdim=True)
            assigned = torch.zeros_like(nearness).scatter_(3, nearest, 1.0)
            # A group that lost all its queries keeps its old mean.
            weights = torch.where(assigned.sum(-1, keepdim=True) > 0, _averaging(assigned), weights)
        return weights

    def group_block(self, tiling: Tiling) -> tuple[int, int]:
        """Rows and columns of the sub-blocks that a tile's groups start as."""
        (height, width), (rows, columns) = tiling.tile, tiling.rectangle(self.config.query_pool)
        return (rows if height % rows == 0 else 1, columns if width % columns == 0 else 1)


def _tile_tokens(tiling: Tiling, device: torch.device) -> Tensor:
    """Tokens of each tile ``[T, S]``; where a border tile sticks out, its first token again."""
    tokens = tiling.tokens(device).long()
    return torch.where(tokens >= 0, tokens, tokens[:, :1])


def _tile_queries(q: Tensor, tokens: Tensor) -> Tensor:
    """Queries of each tile, ``[B, H, T, S, D]``."""
    return q[:, :, tokens.flatten()].unflatten(2, tokens.shape)


def _averaging(assigned: Tensor) -> Tensor:
    """0/1 memberships ``[..., G, S]`` to averaging weights; an empty group gives zeros."""
    return assigned / assigned.sum(-1, keepdim=True).clamp(min=1)
