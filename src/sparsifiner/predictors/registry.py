"""Predictors by name: one registration each, in the predictor's own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .._utils.checks import choose
from .base import Predictor, PredictorConfig

_PREDICTORS: dict[str, type[Predictor]] = {}
_CONFIGS: dict[str, type[PredictorConfig]] = {}

P = TypeVar("P", bound=type[Predictor])


def register_predictor(name: str, config: type[PredictorConfig]) -> Callable[[P], P]:
    """Class decorator that makes a predictor available as ``SparsifinerConfig(predictor=name)``.

    Args:
        name: of the predictor, in settings and files.
        config: its settings, a frozen dataclass whose fields all have defaults.
    """

    def register(predictor: P) -> P:
        config.name = name
        _PREDICTORS[name], _CONFIGS[name] = predictor, config
        return predictor

    return register


_FIRST = ("pooled", "lowrank", "oracle", "local", "strided", "random")


def predictor_names() -> tuple[str, ...]:
    """Names of all registered predictors, those of the library first."""
    return (*(name for name in _FIRST if name in _PREDICTORS), *(name for name in _PREDICTORS if name not in _FIRST))


def predictor_class(name: str) -> type[Predictor]:
    """The class of the predictor ``name``."""
    choose("predictor", name, predictor_names())
    return _PREDICTORS[name]


def predictor_config_class(name: str) -> type[PredictorConfig]:
    """The class of the settings of the predictor ``name``."""
    choose("predictor", name, predictor_names())
    return _CONFIGS[name]


def read_predictor_config(settings: object) -> PredictorConfig:
    """Settings of a predictor from a name, from ``{"name": ..., **settings}``, or as they are.

    Raises:
        SparsifinerError: if the predictor or a setting is unknown; the message names the nearest known one.
    """
    if isinstance(settings, PredictorConfig):
        choose("predictor", settings.name, predictor_names())
        return settings
    values: dict[str, Any] = dict(settings) if isinstance(settings, Mapping) else {"name": settings}
    config = predictor_config_class(values.pop("name", "pooled"))
    known = tuple(field.name for field in dataclasses.fields(config))
    for name in values:
        choose(f"setting of predictor {config.name!r}", name, known)
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
