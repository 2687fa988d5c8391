"""Models on labelled images: one beside its dense twin, and many methods at many keep rates."""

from .cell import Cell, Row
from .pareto import run_sweep
from .sweep import Sweep
from .validate import Validation, validate

__all__ = ["Cell", "Row", "Sweep", "Validation", "run_sweep", "validate"]
