"""Sparse, instance-dependent attention for Vision Transformers (Wei et al., CVPR 2023)."""

from typing import TYPE_CHECKING, Any

from . import functional, methods, models
from .attention.adapters import register_adapter
from .config import SparsifinerConfig
from .convert import conversion, densify, set_keep_rate, sparse_layers, sparsify
from .geometry.tiling import Tiling
from .measure.flops import count_flops
from .ops import sparse_attention
from .ops.connectivity import Connectivity
from .ops.tail import Tail
from .predictors import register_predictor
from .recording import record
from .reduction.pruning import kept_patches, prune_tokens, token_pruning, unprune_tokens
from .saving import from_pretrained, save_pretrained

if TYPE_CHECKING:
    from .calibration import calibrate

__version__ = "0.2.0.dev0"

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
    "functional",
    "kept_patches",
    "methods",
    "models",
    "prune_tokens",
    "record",
    "register_adapter",
    "register_predictor",
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
