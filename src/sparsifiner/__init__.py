"""Sparse, instance-dependent attention for Vision Transformers (Wei et al., CVPR 2023)."""

from typing import TYPE_CHECKING, Any

from . import methods, models
from .analysis.flops import count_flops
from .config import SparsifinerConfig
from .connectivity import Connectivity
from .convert import conversion, densify, set_keep_rate, sparse_layers, sparsify
from .ops import sparse_attention
from .recording import record
from .saving import from_pretrained, save_pretrained
from .tail import Tail
from .tiling import Tiling
from .tokens import kept_patches, prune_tokens, token_pruning, unprune_tokens

if TYPE_CHECKING:
    from .calibration import calibrate

__version__ = "0.1.0"

__all__ = [
    "Connectivity",
    "SparsifinerConfig",
    "Tail",
    "Tiling",
    "calibrate",
    "conversion",
    "count_flops",
    "densify",
    "from_pretrained",
    "kept_patches",
    "methods",
    "models",
    "prune_tokens",
    "record",
    "save_pretrained",
    "set_keep_rate",
    "sparse_attention",
    "sparse_layers",
    "sparsify",
    "token_pruning",
    "unprune_tokens",
]


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # calibration is imported when it is asked for
        from .calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
