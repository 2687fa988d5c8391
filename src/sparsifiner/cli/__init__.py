"""The command line: ``sparsifiner`` with its commands, one module each.

``report``, ``benchmark``, ``calibrate``, ``explore``, ``export``, ``extract``, ``info``, ``pareto``, ``train``,
``tune`` and ``validate``.
"""

from .main import main

__all__ = ["main"]
