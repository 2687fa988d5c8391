"""Consoles that commands print to: tables on stdout, and lines of plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def output_console(width: int = 100) -> Console:
    """stdout for tables: as wide as the terminal, and ``width`` columns where it goes to a file or another program."""
    from rich.console import Console

    stdout = Console()
    return stdout if stdout.is_terminal else Console(width=width)


def say(console: Console, text: str) -> None:
    """Print ``text`` as it is: paths keep brackets and colons, colours stay out, and a line is not broken."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
