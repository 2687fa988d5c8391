"""Predictors of the connectivity, one small file each with its settings."""

from .base import LayerShape, Predictor, PredictorConfig
from .fixed import LocalConfig, LocalPredictor, RandomConfig, RandomPredictor, StridedConfig, StridedPredictor
from .lowrank import LowRankConfig, LowRankPredictor
from .oracle import OracleConfig, OraclePredictor
from .pooled import PooledConfig, PooledPredictor
from .registry import predictor_class, predictor_names, read_predictor_config, register_predictor

__all__ = [
    "LayerShape",
    "LocalConfig",
    "LocalPredictor",
    "LowRankConfig",
    "LowRankPredictor",
    "OracleConfig",
    "OraclePredictor",
    "PooledConfig",
    "PooledPredictor",
    "Predictor",
    "PredictorConfig",
    "RandomConfig",
    "RandomPredictor",
    "StridedConfig",
    "StridedPredictor",
    "predictor_class",
    "predictor_names",
    "read_predictor_config",
    "register_predictor",
]
