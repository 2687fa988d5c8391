"""What other libraries save of a model tells that it was sparse, so that none of them reloads it dense in silence.

``config.json`` of transformers holds the settings, which make the model sparse again; that of timm holds them among the
arguments of the model, so that timm by itself refuses to build it and names who does.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..config import SparsifinerConfig
from .layer import SparseAttention

NAME = "sparsifiner"
"""In transformers: the ``attn_implementation``, the child module, and the key of the settings in ``config.json``."""
TIMM_KEY = "sparsifiner.from_pretrained"
"""An argument that no model of timm has, and the name of the function that takes it out."""


def mark(model: nn.Module) -> None:
    """Tell timm and transformers that layers of ``model`` are sparse, and with which settings."""
    for module in model.modules():
        own = vars(module).get("_model_args")
        settings = settings_of(module) if isinstance(own, dict) else None
        if settings is not None:
            vars(module)["_model_args"] = {**own, TIMM_KEY: settings.to_dict()}  # type: ignore[dict-item]
    if _of_transformers(model):
        from .adapters import transformers

        transformers.converted(model)


def unmark(model: nn.Module) -> None:
    """The inverse of :func:`mark`, for a model whose layers are dense again."""
    for module in model.modules():
        own = vars(module).get("_model_args")
        if isinstance(own, dict) and TIMM_KEY in own:
            vars(module)["_model_args"] = {name: value for name, value in own.items() if name != TIMM_KEY}
    if _of_transformers(model):
        from .adapters import transformers

        transformers.restored(model)


def settings_of(model: nn.Module) -> SparsifinerConfig | None:
    """One configuration for all sparse layers of ``model``, with their keep rates; None where there is no such layer.

    Of layers that differ in more than that, it is the first one's.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
    if not layers:
        return None
    rates: Any = tuple(layer.config.keep_rate for layer in layers)
    first = layers[0].config
    return first if len(set(rates)) == 1 else first.replace(keep_rate=rates)


def _of_transformers(model: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and any(isinstance(module, modeling.PreTrainedModel) for module in model.modules())
