"""The command line: ``sparsifiner report``, ``benchmark``, ``calibrate``, ``info``, ``train`` and ``validate``."""

from .main import main

__all__ = ["main"]
