"""JSON and text files, read strictly: what is not plain data in one meaning is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

MOST_LEVELS = 64
TOO_DEEP = f"its values are nested more than {MOST_LEVELS} levels deep"


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put first.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error


def parse_json(text: str) -> Any:
    """The values in ``text``.

    Raises:
        ValueError: if it is not valid JSON, names something twice, holds NaN or an infinity, which JSON lacks, or is
            nested beyond what can be read.
    """
    try:
        value = json.loads(text, object_pairs_hook=_by_name, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    return check_levels(value)


def read_json(path: str | Path) -> Any:
    """:func:`parse_json` of a file; raises ``OSError``, too."""
    return parse_json(read_text(path))


def check_levels(value: Any, most_values: int | None = None) -> Any:
    """``value`` if its lists and named values are nested so little that code may walk them by recursion.

    Args:
        value: plain data.
        most_values: how many values there may be; what is referred to several times counts each time.

    Raises:
        ValueError: if not.
    """
    left, seen = [(value, 0)], 0
    while left:
        item, level = left.pop()
        seen += 1
        if level > MOST_LEVELS:
            raise ValueError(TOO_DEEP)
        if most_values is not None and seen > most_values:
            raise ValueError(f"it holds more than {most_values:,} values")
        if isinstance(item, Mapping):
            left += [(inner, level + 1) for inner in item.values()]
        elif isinstance(item, (list, tuple)):
            left += [(inner, level + 1) for inner in item]
    return value


def _by_name(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
