"""The command line: ``sparsifiner report`` and ``sparsifiner info``."""

from .main import main

__all__ = ["main"]
