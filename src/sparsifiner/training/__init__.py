"""Calibration of a sparse model to its own dense attention."""
