"""One sparse layer per dense attention class."""

from .bias import SparseBeitAttention, SparseRelPosAttention
from .mha import SparseMultiheadAttention
from .refused import REFUSED, Refusal
from .registry import Adapter, find_adapter, register_adapter, register_attention
from .rope import SparseEvaAttention, SparseRopeAttention
from .scored import SparseScoredAttention
from .vit import SparseVitAttention

__all__ = ["REFUSED", "Adapter", "Refusal", "find_adapter", "register_adapter", "register_attention"]

for _adapter in (
    SparseVitAttention,
    SparseScoredAttention,
    SparseRopeAttention,
    SparseEvaAttention,
    SparseBeitAttention,
    SparseRelPosAttention,
    SparseMultiheadAttention,
):
    register_adapter(_adapter.dense_class, _adapter)
