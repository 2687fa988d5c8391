"""The command line: ``sparsifiner report``, ``sparsifiner calibrate`` and ``sparsifiner info``."""

from .main import main

__all__ = ["main"]
