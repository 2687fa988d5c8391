"""Sparse, instance-dependent attention for Vision Transformers (Wei et al., CVPR 2023).

The parts are imported when they are first used: ``import sparsifiner`` itself imports neither torch nor timm.
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

from ._utils.on_import import import_after as _import_after

if TYPE_CHECKING:
    from . import functional, methods, models
    from .attention.adapters import register_adapter, register_attention
    from .calibration import calibrate
    from .config import SparsifinerConfig
    from .convert import conversion, densify, set_keep_rate, sparse_layers, sparsify
    from .errors import SparsifinerError
    from .exporters import export
    from .geometry.conv_grid import GridSource
    from .geometry.tiling import Tiling
    from .hub import push_to_hub
    from .measure.flops import count_flops
    from .ops import sparse_attention
    from .ops.connectivity import Connectivity
    from .ops.tail import Tail
    from .predictors import register_predictor
    from .recording import record
    from .reduction.pruning import kept_patches, prune_tokens, token_pruning, unprune_tokens
    from .runtime import Runtime, prepare
    from .saving import from_pretrained, save_pretrained
    from .tuning import tune

__version__ = "0.2.0.dev0"

__all__ = [
    "Connectivity",
    "GridSource",
    "Runtime",
    "SparsifinerConfig",
    "SparsifinerError",
    "Tail",
    "Tiling",
    "calibrate",
    "conversion",
    "count_flops",
    "densify",
    "export",
    "from_pretrained",
    "functional",
    "kept_patches",
    "methods",
    "models",
    "prepare",
    "prune_tokens",
    "push_to_hub",
    "record",
    "register_adapter",
    "register_attention",
    "register_predictor",
    "save_pretrained",
    "set_keep_rate",
    "sparse_attention",
    "sparse_layers",
    "sparsify",
    "token_pruning",
    "tune",
    "unprune_tokens",
]

_HOMES = {
    "Connectivity": "ops.connectivity",
    "GridSource": "geometry.conv_grid",
    "Runtime": "runtime",
    "SparsifinerConfig": "config",
    "SparsifinerError": "errors",
    "Tail": "ops.tail",
    "Tiling": "geometry.tiling",
    "calibrate": "calibration",
    "conversion": "convert",
    "count_flops": "measure.flops",
    "densify": "convert",
    "export": "exporters",
    "from_pretrained": "saving",
    "kept_patches": "reduction.pruning",
    "prepare": "runtime",
    "prune_tokens": "reduction.pruning",
    "push_to_hub": "hub",
    "record": "recording",
    "register_adapter": "attention.adapters",
    "register_attention": "attention.adapters",
    "register_predictor": "predictors",
    "save_pretrained": "saving",
    "set_keep_rate": "convert",
    "sparse_attention": "ops",
    "sparse_layers": "convert",
    "sparsify": "convert",
    "token_pruning": "reduction.pruning",
    "tune": "tuning",
    "unprune_tokens": "reduction.pruning",
}
"""Modules of the public names that are not modules themselves; the same as the imports above say to type checkers."""

# Operations must be known to torch for torch.export.load, and the models to timm for timm.create_model.
_import_after("torch", f"{__name__}.ops", by_others=True)
_import_after("timm", f"{__name__}.models.builtin", f"{__name__}.models.lvvit")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(_import_module(f".{_HOMES[name]}", __name__), name)
    elif not name.startswith("_") and _find_spec(f"{__name__}.{name}") is not None:
        value = _import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Last, since what is imported where transformers is there already takes names from here.
_import_after("transformers.modeling_utils", f"{__name__}.models.transformers_import")
