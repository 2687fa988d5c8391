"""Calibration: fits predictors, tail offsets and keep rates to a model's own attention, without labels."""

from .fit import calibrate
from .report import Calibration

__all__ = ["Calibration", "calibrate"]
