"""Predictors by name: one registration each, in the predictor's own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .._utils.checks import choose
from .base import LayerShape, Predictor, PredictorConfig

if TYPE_CHECKING:
    from ..config import SparsifinerConfig

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


def build_predictor(
    config: SparsifinerConfig, *, num_heads: int, head_dim: int, grid: tuple[int, int], num_prefix_tokens: int
) -> Predictor:
    """The predictor that ``config`` names, for one attention layer; other arguments as in ``LayerShape``."""
    if not isinstance(config.keep_rate, float):
        raise ValueError("a predictor serves one layer; give it config.for_layer(...), with one keep_rate")
    settings, layer = config.predictor, LayerShape(num_heads, head_dim, grid, num_prefix_tokens)
    predictor = predictor_class(settings.name)(
        settings, layer, keep_rate=config.keep_rate, keep_prefix=config.keep_prefix
    )
    if config.tail is not None and config.tail.offset:
        predictor.tail_offset = nn.Parameter(torch.zeros(num_heads))
    return predictor
