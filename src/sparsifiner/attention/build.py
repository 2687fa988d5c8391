"""The predictor of a layer, from the layer's settings."""

from __future__ import annotations

import torch
from torch import nn

from ..config import SparsifinerConfig
from ..errors import SparsifinerError
from ..predictors import LayerShape, Predictor, predictor_class


def build_predictor(
    config: SparsifinerConfig, *, num_heads: int, head_dim: int, grid: tuple[int, int], num_prefix_tokens: int
) -> Predictor:
    """The predictor that ``config`` names, for one attention layer; other arguments as in ``LayerShape``."""
    if not isinstance(config.keep_rate, float):
        raise SparsifinerError("a predictor serves one layer; give it config.for_layer(...), with one keep_rate")
    settings, layer = config.predictor, LayerShape(num_heads, head_dim, grid, num_prefix_tokens)
    predictor = predictor_class(settings.name)(
        settings, layer, keep_rate=config.keep_rate, keep_prefix=config.keep_prefix
    )
    if config.tail is not None and config.tail.offset:
        predictor.tail_offset = nn.Parameter(torch.zeros(num_heads))
    return predictor
