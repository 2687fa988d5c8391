"""Errors of others, told in one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What ``error`` says with line breaks folded, or its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
