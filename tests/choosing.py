"""A predictor with the tail of its layer, called on plain tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsifiner import Connectivity, SparsifinerConfig, Tiling
from sparsifiner.attention import AttentionInputs, build_predictor, tail_groups
from sparsifiner.predictors import Predictor


class Chooser:
    """Calls a predictor as its layer would; everything else is the predictor's."""

    def __init__(self, predictor: Predictor, config: SparsifinerConfig) -> None:
        self.predictor, self.config = predictor, config

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float, attn_bias: Tensor | None = None
    ) -> Connectivity:
        inputs = AttentionInputs(q, k, v, tiling, scale, attn_bias)
        return self.predictor(inputs, tail_groups(self.config.tail, inputs))

    def by_torch(self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float) -> Connectivity:
        """The same choice from scores that torch computes, without the kernels that score and select in one pass."""
        inputs = AttentionInputs(q, k, v, tiling, scale)
        distance = self.predictor.value_distances(tail_groups(self.config.tail, inputs), tiling)
        return self.predictor.choose(inputs.replace(backend="reference"), distance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)


def chooser(config: SparsifinerConfig, tiling: Tiling, *, num_heads: int, head_dim: int) -> Chooser:
    """The predictor of ``config`` for a layer of this size."""
    predictor = build_predictor(
        config, num_heads=num_heads, head_dim=head_dim, grid=tiling.grid, num_prefix_tokens=tiling.num_prefix_tokens
    )
    return Chooser(predictor, config)


def lowrank_of(config: SparsifinerConfig, tiling: Tiling, *, num_heads: int, head_dim: int) -> Any:
    """The same for a test that wants the predictor itself."""
    return chooser(config, tiling, num_heads=num_heads, head_dim=head_dim).predictor
