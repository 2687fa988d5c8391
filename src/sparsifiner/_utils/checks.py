"""Checks of settings, each with one line that says what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from ..errors import SparsifinerError
from .messages import shown


def choose(what: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a name that is not among ``known``, naming the nearest one."""
    if isinstance(value, str) and value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
    raise SparsifinerError(f"{what} {shown(value)} is unknown; {hint}")


def number(
    what: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Refuse what is no (whole) number in the range; None passes where ``optional``."""
    if value is None and optional:
        return
    kind = int if integer else (int, float)
    # A whole number beyond the floats is finite, and math.isfinite cannot say so.
    fits = isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
    if fits:
        assert isinstance(value, (int, float))
        fits = not (
            (least is not None and value < least)
            or (above is not None and value <= above)
            or (most is not None and value > most)
        )
    if not fits:
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", least), ("above", above), ("at most", most))
            if bound is not None
        ]
        kind_of_number = f"{'whole ' if integer else ''}number{' ' if bounds else ''}{' and '.join(bounds)}"
        raise SparsifinerError(f"{what} must be a {kind_of_number}, got {shown(value)}")


def seed(what: str, value: object, *, least: int = 0) -> None:
    """Refuse what is no whole number of 64 bits with a sign, or below ``least``: generators take no other."""
    number(what, value, integer=True)
    assert isinstance(value, int)
    if not least <= value < 2**63:
        bounds = "0" if least == 0 else "-2**63"
        raise SparsifinerError(f"{what} must fit 64 bits, {bounds} to 2**63 - 1, got {shown(value)}")


def text(what: str, value: object, *, optional: bool = False) -> None:
    """Refuse what is no text; None passes where ``optional``."""
    if not isinstance(value, str) and not (optional and value is None):
        raise SparsifinerError(f"{what} must be text, got {shown(value)}; put quotes around it")


def flag(what: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise SparsifinerError(f"{what} must be true or false, got {shown(value)}")


def plain(value: Any) -> Any:
    """Numbers and lists out of NumPy's and torch's; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def pair(what: str, value: object) -> tuple[int, int]:
    """Two whole numbers of at least 1, rows and columns."""
    value = plain(value)
    if isinstance(value, Sequence) and len(value) == 2 and all(type(v) is int and v >= 1 for v in value):
        return (value[0], value[1])
    raise SparsifinerError(f"{what} must be two whole numbers of at least 1, rows and columns, got {shown(value)}")
