"""Errors of others, told in one line."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("sparsifiner")
"""Lines that the library logs while it works, where the caller gives no function of its own."""


def one_line(error: BaseException, most: int = 400) -> str:
    """Text of ``error`` with line breaks folded, cut off where it is long, or its name if it has none.

    torch and timm advise to load what they refuse to unpickle with ``weights_only=False``, which runs whatever the file
    holds. That advice is not passed on.
    """
    text = " ".join(str(error).split())
    if "weights_only" in text:
        return "it is damaged, or a pickle that holds more than tensors and plain values, which is never loaded"
    return (text if len(text) <= most else f"{text[: most - 3]}...") or type(error).__name__


def shown(value: object, most: int = 80) -> str:
    """``value`` as a message quotes it: its ``repr``, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
