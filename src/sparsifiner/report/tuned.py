"""What a search of ``tune`` found, as a table, a picture and a page."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .html import embed_png, render_page

if TYPE_CHECKING:
    from rich.console import Console

    from ..tuning.models import WholeModel
    from ..tuning.result import TuningReport


@dataclass(frozen=True)
class Line:
    """One whole model as text cells: speed, fidelity, and its place."""

    name: str
    milliseconds: str
    speedup: str
    cosine: str
    worst_cosine: str
    l2: str
    worst_l2: str
    mark: str


def tuned_lines(report: TuningReport) -> list[Line]:
    """The whole models, slowest first."""

    def line(model: WholeModel) -> Line:
        def cells(term: str) -> tuple[str, str]:
            mean = None if model.fidelity is None else model.fidelity.mean(term)
            worst = None if model.fidelity is None else model.fidelity.worst(term)
            return "" if mean is None else f"{mean:.4f}", "" if worst is None else f"{worst:.4f}"

        mark = "result" if model is report.result else "" if model.within else "out of the bound"
        (cosine, worst_cosine), (l2, worst_l2) = cells("patch_cosine"), cells("patch_l2")
        return Line(
            model.name, f"{report.milliseconds(model):.1f}", f"{model.speedup:.2f}x", cosine, worst_cosine, l2,
            worst_l2, mark,
        )  # fmt: skip

    return [line(model) for model in sorted(report.models, key=lambda model: model.speedup)]


def print_tuned(report: TuningReport, console: Console) -> None:
    """Print the table, the verdict and the notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows, columns = report.image_size
    machine = report.machine
    console.print(Text.assemble(("Sparsifiner tune: ", "bold"), f"{report.model}, {rows}x{columns} px"), soft_wrap=True)
    console.print(Text(f"{machine.processor}, {machine.threads} threads, torch {machine.torch}"), soft_wrap=True)
    console.print(
        Text(f"tuned on {len(report.tuned_on)} images, judged by {len(report.judged_on)} others; {report.bound}"),
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for title in ("ms", "speed-up", "cosine", "worst", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for line in tuned_lines(report):
        table.add_row(line.name, line.milliseconds, line.speedup, line.cosine, line.worst_cosine, line.mark)
    console.print(table)
    for sentence in report.verdict:
        console.print(Text(sentence, style="bold"), soft_wrap=True)
    for note in report.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)


def draw_tuned(report: TuningReport, *, dpi: int = 110) -> bytes:
    """A PNG: milliseconds against fidelity; whole models large and cheap trials, as predicted, small."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trials = [(1e3 * trial.seconds, 1 - trial.error.cosine) for trial in report.trials if trial.error is not None]
    if trials:
        ms, distances = zip(*trials, strict=True)
        axes.scatter(ms, distances, s=9, color="#c3c7cd", label="cheap trials, predicted")
    kinds = (
        ("dense", "#6a6f78", "s", lambda m: m.candidate.config is None),
        ("sparse", "#d9480f", "o", lambda m: m.candidate.config is not None),
    )
    for label, colour, marker, belongs in kinds:
        found = [model for model in report.models if belongs(model)]
        if found:
            axes.scatter(
                [report.milliseconds(model) for model in found], [1 - _cosine(model) for model in found], s=52,
                color=colour, marker=marker, label=f"{label}, measured", zorder=3,
            )  # fmt: skip
    for model in report.models:
        if model.candidate.config is None or model is report.result:
            words = "result" if model is report.result else model.name.partition(", ")[2]
            axes.annotate(
                words, (report.milliseconds(model), 1 - _cosine(model)), xytext=(5, 5), textcoords="offset points",
                fontsize=8,
            )  # fmt: skip
    if report.bound.min_cosine is not None:
        axes.axhline(1 - report.bound.min_cosine, color="#1d1f23", linewidth=0.8, linestyle="--")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per batch")
    axes.set_ylabel("1 - mean cosine to dense (better above)")
    axes.grid(True, color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def render_tuned(report: TuningReport, settings: str) -> str:
    """The page, self-contained.

    Args:
        report: of the search.
        settings: of the result, as YAML.
    """
    return render_page(
        "tuned.html.jinja",
        report=report,
        lines=tuned_lines(report),
        settings=settings,
        chart=embed_png(draw_tuned(report)),
    )


def _cosine(model: WholeModel) -> float:
    mean = None if model.fidelity is None else model.fidelity.mean("patch_cosine")
    return 1.0 if mean is None else mean
