"""Progress of long work: bars on a terminal, a line per stage elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@contextmanager
def progress_on(console: Any) -> Iterator[Progress]:
    """A bar per stage on a rich ``console``; where that is no terminal, a line as each stage begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, Any] = {}

    def notify(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
            if not console.is_terminal:
                console.print(stage, markup=False, highlight=False, emoji=False, soft_wrap=True)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield notify
