"""Attention of a layer: the pure function, the layer around it, and the choice between dense and sparse."""

from ..ops.inputs import AttentionInputs
from .attend import LayerRecord, attend, dense_attention, tail_groups
from .build import build_predictor
from .layer import Observer, SparseAttention
from .policy import Policy

__all__ = [
    "AttentionInputs",
    "LayerRecord",
    "Observer",
    "Policy",
    "SparseAttention",
    "attend",
    "build_predictor",
    "dense_attention",
    "tail_groups",
]
