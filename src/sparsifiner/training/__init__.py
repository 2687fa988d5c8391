"""Calibration, and fine-tuning with distillation: recipes, phases, losses, data, the engine, and validation."""

from .engine import Result, train
from .recipe import AugmentConfig, DataConfig, PhaseConfig, TrainConfig
from .recipe_file import load_recipe
from .validate import Validation, validate

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "PhaseConfig",
    "Result",
    "TrainConfig",
    "Validation",
    "load_recipe",
    "train",
    "validate",
]
