"""The command line: ``sparsifiner report``, ``info``, ``train`` and ``validate``."""

from .main import main

__all__ = ["main"]
