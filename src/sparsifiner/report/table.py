"""The report as it is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .contents import Case, Report
from .rows import fast_of, table_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CASES_PER_TABLE = 3  # as many as stay legible at 100 columns


def print_report(report: Report, console: Console) -> None:
    """Print one table per image size (more where there are many keep rates), the verdicts and the notes."""
    from rich.text import Text

    console.print(
        Text.assemble(("Sparsifiner report: ", "bold"), f"{report.model}, {report.architecture}, {report.dtype}")
    )
    machine = report.machine
    console.print(
        Text(f"{machine.processor}, {machine.threads} threads, device {machine.device}, torch {machine.torch}")
    )
    count = len(report.images)
    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    console.print(
        Text(f"{count} image{'s' if count != 1 else ''} from {report.source}{skipped}; {report.converted[0]}")
    )
    for cases in report.by_size():
        for start in range(0, len(cases), CASES_PER_TABLE):
            console.print()
            console.print(_table(cases[start : start + CASES_PER_TABLE]))
    console.print()
    for case in report.cases:
        console.print(Text(" ".join(filter(None, [case.verdict, case.fast_verdict])), style="bold"))
    for note in [*report.converted[1:], *report.notes]:
        console.print(Text(f"Note: {note}"))


def _table(cases: list[Case]) -> Table:
    from rich import box
    from rich.table import Table

    first = cases[0]
    title = f"{first.size_label}: {first.grid[0]}x{first.grid[1]} patches, {first.num_tokens} tokens"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1)
    )
    table.add_column("", no_wrap=True)
    table.add_column("dense", justify="right", no_wrap=True)
    for case in cases:
        label = f"sparse, {case.rate_label}" if len(cases) == 1 else case.rate_label
        table.add_column(label, justify="right", no_wrap=True)
        if len(cases) == 1:
            table.add_column("sparse / dense", justify="right", no_wrap=True)
    if fast_of(cases) is not None:
        table.add_column("fast", justify="right", no_wrap=True)
    group = ""
    for row in table_rows(cases):
        if row.group != group:
            if group:
                table.add_section()
            group = row.group
            table.add_row(f"[bold]{group}[/bold]")
        if len(cases) == 1:
            value, of = row.sparse[0]
            quick = [] if fast_of(cases) is None else [row.fast]
            table.add_row(f"  {row.name}", row.dense, value, of, *quick)
        else:
            worst = " (worst)" if any(of.startswith("worst") for _, of in row.sparse) else ""
            table.add_row(f"  {row.name}{worst}", row.dense, *(_cell(value, of) for value, of in row.sparse))
    return table


def _cell(value: str, of: str) -> str:
    """Value and ratio, or mean and worst, in little space."""
    return f"{value} ({of.removeprefix('worst ')})" if of else value
