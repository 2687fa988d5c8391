"""The command line: ``sparsifiner report``."""

from .main import main

__all__ = ["main"]
