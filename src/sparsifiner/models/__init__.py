"""Models by name, the built-in weights, and the authors' checkpoints."""

from .loading import load_model
from .lvvit import LvVit, token_label_loss
from .reference import from_reference

__all__ = ["LvVit", "from_reference", "load_model", "token_label_loss"]
