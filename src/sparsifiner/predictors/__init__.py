"""Predictors of the connectivity, one small file each."""

from __future__ import annotations

import torch
from torch import nn

from ..config import SparsifinerConfig
from .base import Predictor
from .fixed import LocalPredictor, RandomPredictor, StridedPredictor
from .lowrank import LowRankPredictor
from .oracle import OraclePredictor
from .pooled import PooledPredictor

__all__ = [
    "LocalPredictor",
    "LowRankPredictor",
    "OraclePredictor",
    "PooledPredictor",
    "Predictor",
    "RandomPredictor",
    "StridedPredictor",
    "build_predictor",
]

_WITHOUT_WEIGHTS: dict[str, type[Predictor]] = {
    "pooled": PooledPredictor,
    "oracle": OraclePredictor,
    "local": LocalPredictor,
    "strided": StridedPredictor,
    "random": RandomPredictor,
}


def build_predictor(
    config: SparsifinerConfig, *, num_heads: int, head_dim: int, grid: tuple[int, int], num_prefix_tokens: int
) -> Predictor:
    """The predictor that ``config`` names, for one attention layer; arguments as in ``LowRankPredictor``."""
    predictor: Predictor
    if config.predictor == "lowrank":
        predictor = LowRankPredictor(config, num_heads, head_dim, grid, num_prefix_tokens)
    else:
        predictor = _WITHOUT_WEIGHTS[config.predictor](config)
    if config.tail_offset:
        predictor.tail_offset = nn.Parameter(torch.zeros(num_heads))
    return predictor
