"""Recipes as YAML, what the command line changes in them, and in what two of them differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .._utils.checks import choose
from .._utils.messages import one_line, shown
from .._utils.settings_files import locate_recipe, read_recipe
from .._utils.yaml12 import load_yaml
from ..errors import SparsifinerError
from .recipe import AugmentConfig, DataConfig, PhaseConfig, TrainConfig

WITHOUT_CONSEQUENCE = {"log_every", "checkpoint_every", "trackers", "data.workers", "data.path", "data.download"}

T = TypeVar("T")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe.

    Args:
        path: the YAML file, or the name of one that ships with the package, such as ``deit_small_imagenet``.
        overrides: ``name=value`` each, the value in YAML; dots lead inwards: ``data.path=photos``,
            ``phases.0.lr=1e-4``, ``sparsity=null``.

    Raises:
        ValueError: in one line, if the file cannot be read or something in it is unknown or out of range.
    """
    path = locate_recipe(path)
    settings = read_recipe(path)
    for override in overrides:
        _override(settings, override)
    try:
        return from_dict(settings)
    except SparsifinerError as error:
        raise SparsifinerError(f"{path}: {error}") from error


def from_dict(settings: Mapping[str, Any]) -> TrainConfig:
    """The inverse of ``TrainConfig.to_dict``; unknown names are refused with the nearest known one."""
    settings = dict(settings)
    if "phases" not in settings or not isinstance(settings["phases"], Sequence):
        raise SparsifinerError("a recipe needs phases, a list such as '- {name: cls, epochs: 1}'")
    settings["phases"] = tuple(_make(PhaseConfig, phase, "phases") for phase in settings["phases"])
    for name, kind in (("data", DataConfig), ("augment", AugmentConfig)):
        if name in settings:
            settings[name] = _make(kind, settings[name], name)
    return _make(TrainConfig, settings, "")


def _make(kind: type[T], settings: Any, where: str) -> T:
    if not isinstance(settings, Mapping):
        raise SparsifinerError(f"{where} must hold named settings, got {shown(settings)}")
    fields = tuple(item.name for item in dataclasses.fields(kind))  # type: ignore[arg-type]
    for name in settings:
        choose(f"setting {where + '.' if where else ''}{name}:", name, fields)
    if "name" in fields and "name" not in settings:
        raise SparsifinerError(f"{where}: an entry has no name")
    return kind(**settings)


def _override(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SparsifinerError(f"{override!r} is not an override; write name=value, such as data.path=photos")
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise SparsifinerError(f"the value of {override!r} is not valid YAML: {one_line(error)}") from error
    *outer, last = name.split(".")
    place: Any = settings
    for part in outer:
        if isinstance(place, list):
            place = _item(place, part, name)
            continue
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, (dict, list)):
            raise SparsifinerError(f"{name} leads into {part}, which is the single value {shown(place)}")
    if isinstance(place, list):
        _item(place, last, name)
        place[int(last)] = value
    else:
        place[last] = value


def _item(place: list[Any], part: str, name: str) -> Any:
    if not part.isdigit() or int(part) >= len(place):
        raise SparsifinerError(f"{name}: {part!r} must be a number below {len(place)}, the entries there are")
    return place[int(part)]


def differing_settings(one: object, other: Mapping[str, Any]) -> list[str]:
    """Names such as ``data.val_split`` in which two recipes, as plain values, would give different results."""
    different = _flat(one).items() ^ _flat(other).items()
    return sorted({name for name, _ in different} - WITHOUT_CONSEQUENCE)


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"data.path": "..."}``, values as JSON."""
    if isinstance(values, dict) and values:
        return {k: v for name, item in values.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return {k: v for n, item in enumerate(values) for k, v in _flat(item, f"{prefix}.{n}").items()}
    return {prefix: json.dumps(values)}
