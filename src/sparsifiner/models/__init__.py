"""Models by name, the built-in weights, and the authors' checkpoints."""

from .loading import load_model
from .reference import from_reference

__all__ = ["from_reference", "load_model"]
