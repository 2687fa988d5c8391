"""Models by name, the built-in weights, and the authors' checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load_model
    from .lvvit import LvVit, token_label_loss
    from .reference import from_reference

__all__ = ["LvVit", "from_reference", "load_model", "token_label_loss"]

_HOMES = {"LvVit": "lvvit", "from_reference": "reference", "load_model": "loading", "token_label_loss": "lvvit"}


def __getattr__(name: str) -> Any:
    # Loading needs sparse layers; the models themselves are registered with timm without them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
