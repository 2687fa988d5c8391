"""One sparse layer per dense attention class of timm."""

from __future__ import annotations

from torch import nn

from ..layer import SparseAttention
from .bias import SparseBeitAttention, SparseRelPosAttention
from .refused import REFUSED
from .rope import SparseEvaAttention, SparseRopeAttention
from .scored import SparseScoredAttention
from .vit import SparseVitAttention

__all__ = ["ADAPTERS", "find_adapter"]

ADAPTERS: dict[type[nn.Module], type[SparseAttention]] = {
    adapter.dense_class: adapter
    for adapter in (
        SparseVitAttention,
        SparseScoredAttention,
        SparseRopeAttention,
        SparseEvaAttention,
        SparseBeitAttention,
        SparseRelPosAttention,
    )
}


def find_adapter(module: nn.Module) -> type[SparseAttention] | str | None:
    """The sparse class for ``module``, the reason why there is none, or None if it is not attention."""
    adapter = ADAPTERS.get(type(module))
    if adapter is not None:
        return adapter.refusal(module) or adapter
    name = type(module).__name__
    if name in REFUSED:
        return REFUSED[name]
    if isinstance(module, SparseAttention):
        return "it is sparse already; change it with set_keep_rate, or densify the model first"
    if name.endswith(("Attention", "Attn")):
        return f"there is no adapter for {type(module).__module__}.{name}"
    return None
