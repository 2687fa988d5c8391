"""The training-free predictor: pooled queries of each tile against every key."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..connectivity import Connectivity
from ..pooling import pool_blocks
from ..selection import native_tile_keys, why_not_pooled
from ..tiling import Tiling
from .base import Predictor, TileScores


class PooledPredictor(Predictor):
    """Attention of the mean queries of a tile's sub-blocks, merged into one score per key.

    No weights: the model's own queries and keys are used. Sub-blocks are ``query_pool`` patches large
    (a side that does not divide the tile's is taken as 1), and a key scores by the sub-block that needs it
    most (``reduction="max"``) or by all of them together (``"sum"``).
    """

    def tile_scores(
        self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float, attn_bias: Tensor | None
    ) -> tuple[TileScores, int]:
        prefix, first = tiling.num_prefix_tokens, self.first_candidate(tiling)
        blocks, members = self.sub_blocks(tiling, q.device)
        members = members.long()
        pooled = blocks.mean_patches(q[:, :, prefix:]) * scale
        candidates = k[:, :, first:].transpose(-1, -2)
        bias = None
        if attn_bias is not None:
            bias = blocks.mean_patches(attn_bias[:, :, prefix:, first:])

        def scores(start: int, stop: int) -> Tensor:
            member = members[start:stop]
            logits = pooled[:, :, member.flatten()] @ candidates
            if bias is not None:
                logits = logits + bias[:, :, member.flatten()]
            weights = logits.softmax(-1).unflatten(2, member.shape)
            return weights.amax(3) if self.config.reduction == "max" else weights.sum(3)

        batch, heads, num_tokens, _ = q.shape
        return scores, 2 * batch * heads * num_tokens * members.shape[1] * q.element_size()

    @torch.no_grad()
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float, attn_bias: Tensor | None = None
    ) -> Connectivity:
        blocks, members = self.sub_blocks(tiling, q.device)
        if attn_bias is not None or why_not_pooled(q, k, members.shape[1]) is not None:
            return super().forward(q, k, v, tiling, scale, attn_bias)
        count = math.ceil(self.keep_rate * self.num_candidates(tiling))
        pooled = pool_blocks(q, blocks)
        merge_by_sum = self.config.reduction == "sum"
        indices = native_tile_keys(pooled, k, members, self.first_candidate(tiling), count, scale, merge_by_sum)
        return Connectivity(tiling, indices)

    def sub_blocks(self, tiling: Tiling, device: torch.device) -> tuple[Tiling, Tensor]:
        """The blocks whose queries are pooled, and which of them belong to each tile, int32 ``[T, M]``.

        A border tile has fewer; its first one is repeated, which changes no maximum.
        """
        block = _divisor(tiling.tile[0], self.config.query_pool[0]), _divisor(tiling.tile[1], self.config.query_pool[1])
        blocks = Tiling(tiling.grid, block, tiling.num_prefix_tokens)
        members = Tiling(blocks.shape, (tiling.tile[0] // block[0], tiling.tile[1] // block[1])).tokens(device)
        return blocks, torch.where(members >= 0, members, members[:, :1])


def _divisor(side: int, wanted: int) -> int:
    return wanted if side % wanted == 0 else 1
