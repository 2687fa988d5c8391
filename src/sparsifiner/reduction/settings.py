"""A baseline's conversion of a model as plain values, so that it can be saved and done again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import SparsifinerError
from .linformer import LinformerAttention, linformer
from .merging import MergingBlock, merge_tokens


def baseline_settings(model: nn.Module) -> dict[str, Any] | None:
    """Name and arguments of the baseline ``model`` was converted by, as :func:`apply_baseline` takes them, or None."""
    for module in model.modules():
        if isinstance(module, LinformerAttention):
            return {"name": "linformer", "n_down": module.key_basis.shape[0]}
    merging = [module.count for module in model.modules() if isinstance(module, MergingBlock)]
    return {"name": "tome", "per_layer": merging} if merging else None


def apply_baseline(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Convert ``model`` itself as :func:`baseline_settings` describes it.

    Raises:
        ValueError: if the description is no known one, or does not fit the model.
    """
    known = {"linformer": ("n_down", linformer), "tome": ("per_layer", merge_tokens)}
    name = settings.get("name") if isinstance(settings, dict) else None
    if name not in known or set(settings) != {"name", known[name][0]}:
        raise SparsifinerError(f"a baseline is saved as linformer with n_down or tome with per_layer, got {settings!r}")
    argument, convert = known[name]
    return convert(model, **{argument: settings[argument]}, inplace=True)  # type: ignore[operator]


def baseline_parameters(model: nn.Module) -> set[str]:
    """Names in the state dict that a baseline has added to the dense model."""
    return {
        f"{name}.{basis}"
        for name, module in model.named_modules()
        if isinstance(module, LinformerAttention)
        for basis in ("key_basis", "value_basis")
    }
