"""Fine-tuning with distillation: recipes, phases, losses, data and the engine."""

from .engine import Result, train
from .recipe import AugmentConfig, DataConfig, PhaseConfig, TrainConfig
from .recipe_file import load_recipe

__all__ = ["AugmentConfig", "DataConfig", "PhaseConfig", "Result", "TrainConfig", "load_recipe", "train"]
