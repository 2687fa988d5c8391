"""``sparsifiner.json``, which describes a saved model, checked field by field before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import SparsifinerError
from .messages import shown

DTYPES = ("float32", "bfloat16", "float16", "float64")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


def check_description(settings: object, path: object, newest: int) -> None:
    """Refuse what does not describe a saved model; what is inside ``config`` is for ``SparsifinerConfig`` to check.

    Args:
        settings: the content of the file.
        path: the file.
        newest: the latest format that can be read.

    Raises:
        SparsifinerError: in one line, naming the field.
    """
    required = [name for name, (_, _, needed) in _FIELDS.items() if needed]
    if not isinstance(settings, dict) or not set(required) <= settings.keys():
        raise SparsifinerError(
            f"{path} is not the description of a saved sparse model; expected {', '.join(sorted(required))}"
        )
    if not _integer(settings["format"]) or not 1 <= settings["format"] <= newest:
        raise SparsifinerError(
            f"{path} has format {shown(settings['format'])}, this version reads 1 to {newest}; update sparsifiner"
        )
    _check(settings, path, "", _FIELDS)
    check_data(settings.get("data", {}), path, "data.")


def check_data(settings: Mapping[str, Any], path: object, where: str) -> None:
    """Refuse settings of image preparation, those of timm's ``pretrained_cfg``, that are of another kind.

    Args:
        settings: what the file holds of them; null is none.
        path: the file.
        where: the name of the section, with a dot.
    """
    _check({name: value for name, value in settings.items() if value is not None}, path, where, _DATA)


def _check(settings: Mapping[str, Any], path: object, where: str, fields: Mapping[str, Any]) -> None:
    for name, (fits, expected, _) in fields.items():
        if name in settings and not fits(settings[name]):
            raise SparsifinerError(
                f"{where}{name} in {path} must be {expected}, got {shown(settings[name])}; save the model again"
            )


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e6


def _text(value: object) -> bool:
    return isinstance(value, str)


def _named(value: object) -> bool:
    return isinstance(value, Mapping)


def _given(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"grid", "num_prefix_tokens"}:
        return False
    grid, tokens = value["grid"], value["num_prefix_tokens"]
    return (grid is None or _text(grid)) and (tokens is None or (_integer(tokens) and tokens >= 0))


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _several(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """A list of values that fit, ``length`` of them if given, else at least one."""

    def fit(value: object) -> bool:
        return isinstance(value, list) and len(value) == (length or max(1, len(value))) and all(map(fits, value))

    return fit


def _positive(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: fits(value) and value > 0


_SIDES = "whole numbers above 0"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "format": (_integer, "a whole number", True),
    "architecture": (_text, "the name of a model", True),
    "model_args": (_named, "arguments by name", True),
    "dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}", True),
    "data": (_named, "named settings", False),
    "config": (_optional(_named), "named settings or null", True),
    "token_pruning": (_optional(_named), "named settings or null", False),
    "baseline": (_optional(_named), "named settings or null", False),
    "runtime": (_optional(_named), "named settings or null", False),
    "given": (_given, "a path and a number, or nulls", False),
    "basis_grid": (_optional(_several(_positive(_integer), 2)), f"rows and columns, {_SIDES}, or null", True),
    "dense_fingerprint": (_optional(_text), "a text or null", True),
    "weights_fingerprint": (_optional(_text), "a text or null", False),
}
"""Of each field: a test, what it expects in words, and whether every format has it."""

_SIZE = (_several(_positive(_integer), 3), f"channels, rows and columns, {_SIDES}", False)
_SHARE = (lambda value: _number(value) and 0 < value <= 10, "a number above 0, at most 10", False)
_DATA = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}", False),
    "mean": (_several(_number), "a list of numbers", False),
    "std": (_several(_positive(_number)), "a list of numbers above 0", False),
    "crop_pct": _SHARE,
    "test_crop_pct": _SHARE,
    "crop_mode": (_text, "a text", False),
}
