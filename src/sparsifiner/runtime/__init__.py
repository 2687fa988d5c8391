"""A finished model held and run in another way: precision of its weights and activations, compilation, threads."""

from .compilation import compile_ahead
from .ready import ReadyModel, prepare
from .settings import Runtime

__all__ = ["ReadyModel", "Runtime", "compile_ahead", "prepare"]
