"""The fastest form of a model within a bound of fidelity: sparsity, precision and compilation searched together."""

from .bound import Bound
from .result import Tuned, TuningReport
from .tune import tune

__all__ = ["Bound", "Tuned", "TuningReport", "tune"]
