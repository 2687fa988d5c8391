"""The upper bound: keep the keys that hold the most of the dense attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry.tiling import Tiling
from .base import Predictor, TileScores


class OraclePredictor(Predictor):
    """Dense attention of every query, summed over its tile. Costs as much as what it would save."""

    def tile_scores(
        self, q: Tensor, k: Tensor, stakes: Tensor | None, tiling: Tiling, scale: float, attn_bias: Tensor | None
    ) -> tuple[TileScores, int]:
        first = self.first_candidate(tiling)
        tokens = tiling.tokens(q.device).long()
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys = k.to(dtype).transpose(-1, -2)

        def scores(start: int, stop: int) -> Tensor:
            members = tokens[start:stop]
            rows = members.clamp(min=0).flatten()
            logits = q[:, :, rows].to(dtype) @ keys * scale
            if attn_bias is not None:
                logits = logits + attn_bias[:, :, rows].to(dtype)
            weights = logits.softmax(-1).unflatten(2, members.shape) * (members >= 0)[..., None]
            return weights.sum(3)[..., first:]

        batch, heads, num_tokens, _ = q.shape
        return scores, 2 * batch * heads * num_tokens * tiling.tile_size * dtype.itemsize

    def score_macs(self, num_heads: int, head_dim: int, tiling: Tiling) -> int:
        return num_heads * head_dim * tiling.num_patches * tiling.num_tokens
