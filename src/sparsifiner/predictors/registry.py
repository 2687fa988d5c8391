"""Predictors by name: one registration each, in the predictor's own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .._utils.checks import choose
from .._utils.messages import shown
from ..errors import SparsifinerError
from .base import Predictor, PredictorConfig

_PREDICTORS: dict[str, type[Predictor]] = {}
_CONFIGS: dict[str, type[PredictorConfig]] = {}

P = TypeVar("P", bound=type[Predictor])


def register_predictor(name: str, config: type[PredictorConfig]) -> Callable[[P], P]:
    """Class decorator that makes a predictor available as ``SparsifinerConfig(predictor=name)``.

    Args:
        name: of the predictor, in settings and files.
        config: its settings, a frozen dataclass whose fields all have defaults.

    Raises:
        SparsifinerError: if the name is another predictor's, or the settings are of another kind. The same class,
            defined again (a notebook's cell), takes its own place.
    """
    if not isinstance(name, str) or not name:
        raise SparsifinerError(f"a predictor is registered by a name, got {shown(name)}")
    _check_config(name, config)

    def register(predictor: P) -> P:
        if not (isinstance(predictor, type) and issubclass(predictor, Predictor)):
            raise SparsifinerError(f"the predictor {name!r} must be a subclass of Predictor, got {shown(predictor)}")
        known = _PREDICTORS.get(name)
        if known is not None and _place(known) != _place(predictor):
            raise SparsifinerError(
                f"there is a predictor {name!r} already, {'.'.join(_place(known))}; take another name"
            )
        config.name = name
        _PREDICTORS[name], _CONFIGS[name] = predictor, config
        return predictor

    return register


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _check_config(name: str, config: object) -> None:
    """Refuse settings that cannot be made from the predictor's name alone, shared by layers, or compared."""
    if not (isinstance(config, type) and issubclass(config, PredictorConfig) and dataclasses.is_dataclass(config)):
        raise SparsifinerError(
            f"settings of predictor {name!r} must be a dataclass, a subclass of PredictorConfig, got {shown(config)}"
        )
    if "__dataclass_params__" not in vars(config) or not vars(config)["__dataclass_params__"].frozen:
        raise SparsifinerError(f"{config.__name__} must be a frozen dataclass; write @dataclass(frozen=True) above it")
    missing = dataclasses.MISSING
    for field in dataclasses.fields(config):
        if field.init and field.default is missing and field.default_factory is missing:
            raise SparsifinerError(f"{config.__name__}.{field.name} needs a default: predictor={name!r} gives none")
    if (other := vars(config).get("name") or name) != name:
        raise SparsifinerError(f"{config.__name__} holds the settings of the predictor {other!r}; give each its own")


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
