"""The upper bound: keep the keys that hold the most of the dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry.tiling import Tiling
from ..ops.inputs import AttentionInputs
from .base import Predictor, PredictorConfig, TileScores
from .registry import register_predictor


@dataclass(frozen=True)
class OracleConfig(PredictorConfig):
    """The oracle has no settings besides the keep rate."""


@register_predictor("oracle", OracleConfig)
class OraclePredictor(Predictor):
    """Dense attention of every query, summed over its tile. Costs as much as what it would save."""

    bounds_fidelity = True
    note = "The oracle looks at the dense attention map: it bounds the fidelity and cannot be faster."

    def tile_scores(self, inputs: AttentionInputs, value_distance: Tensor | None) -> tuple[TileScores, int]:
        q, k, tiling, scale, attn_bias = inputs.q, inputs.k, inputs.tiling, inputs.scale, inputs.attn_bias
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
