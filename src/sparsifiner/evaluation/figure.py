"""The figure of Wei et al.: accuracy against multiply-adds of attention, and against measured time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from .._utils.files import write_atomically
from ..methods import METHODS
from .cell import DENSE, STAGES, Row

POINTS_BELOW = 15
"""Reach of the y axis below the dense model; rows below it are in the table only."""


def draw_pareto(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw both figures, a panel per stage; returns the files.

    A row lies as far below the dense model's accuracy as it dropped on the images that both have seen, and its bar is
    the 95 % interval of that drop. So rows on different numbers of images stand side by side, and what all models get
    wrong does not blur the comparison. The grey band is the dense accuracy's own interval.

    Args:
        rows: of a sweep, dense among them.
        folder: exists.
    """
    rows = [row for row in rows if row.images]
    dense_ms = [row.dense_ms for row in rows if row.dense_ms is not None]
    usual = statistics.median(dense_ms) if dense_ms else 0.0

    def milliseconds(row: Row) -> float | None:
        """Against the dense runs between its own, so that the machine's drift from row to row does not show."""
        if row.cell == DENSE and usual:
            return usual  # not its own copy, which is as many percent off as there is noise
        return None if row.ms is None or row.dense_ms is None else row.ms / row.dense_ms * usual

    figures: dict[str, tuple[str, Callable[[Row], float | None]]] = {
        "pareto-macs.png": (
            "MHSA, M multiply-adds per image, predictor in full",
            lambda row: row.mhsa_full_macs / 1e6 or None,
        ),
        "pareto-ms.png": (f"milliseconds per image, where dense takes {usual:.3g}", milliseconds),
    }
    written = []
    for name, (label, value) in figures.items():
        shown = [row for row in rows if value(row) is not None]
        if len(shown) > 1:
            write_atomically(folder / name, _draw(shown, label, value))
            written.append(folder / name)
    return written


def _draw(rows: Sequence[Row], label: str, value: Callable[[Row], Any]) -> bytes:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = [stage for stage in STAGES if any(row.cell.stage == stage and row.cell != DENSE for row in rows)]
    methods = [name for name in METHODS if name != DENSE.method and any(row.cell.method == name for row in rows)]
    colours: Any = colormaps["tab20"]  # dark and light in turn, so a method and its variant without a tail are a pair
    figure = Figure(figsize=(1.8 + 4.2 * len(stages), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
    dense = next(row for row in rows if row.cell == DENSE)
    for panel, stage in zip(panels, stages, strict=True):
        low, high = dense.interval
        panel.axhspan(100 * low, 100 * high, color="0.9", zorder=0)
        panel.plot(value(dense), 100 * dense.top1, "k*", markersize=11, zorder=5, label="dense")
        for row in rows:
            if row.cell.method == DENSE.method and row.cell.stage == stage != DENSE.stage:
                _line(panel, [row], dense, value, label=f"dense, {stage}", marker="*", color="k")
        for method in methods:
            number = list(METHODS).index(method) - 1  # so that a method looks the same in every figure
            found = [row for row in rows if row.cell.method == method and row.cell.stage == stage]
            found.sort(key=lambda row: row.cell.keep_rate)
            if found:
                _line(
                    panel, found, dense, value, label=method, marker="os^vDPX"[number % 7], color=colours(number),
                )  # fmt: skip
        panel.set(xlabel=label, title=stage)
        panel.grid(alpha=0.3)
    floor = 100 * dense.top1 - POINTS_BELOW
    below = any(100 * (dense.top1 - row.drop_from(dense)[1][1]) < floor for row in rows)
    if below:
        panels[0].set_ylim(floor, min(100.5, panels[0].get_ylim()[1]))
    panels[0].set_ylabel(f"top-1, %{f' (what is below {floor:.1f} is not shown)' if below else ''}")
    names: dict[str, Any] = {}
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            names.setdefault(name, handle)
    figure.legend(names.values(), names, loc="outside right center", frameon=False, fontsize=9)
    image = BytesIO()
    figure.savefig(image, dpi=130)
    return image.getvalue()


def _line(panel: Any, rows: Sequence[Row], dense: Row, value: Callable[[Row], Any], **looks: Any) -> None:
    """One method from its lowest keep rate to its highest."""
    drops = [row.drop_from(dense) for row in rows]
    bars = [[100 * (high - drop) for drop, (_, high) in drops], [100 * (drop - low) for drop, (low, _) in drops]]
    panel.errorbar(
        [value(row) for row in rows], [100 * (dense.top1 - drop) for drop, _ in drops], yerr=bars, markersize=4,
        linewidth=1.2, elinewidth=0.8, capsize=2, **looks,
    )  # fmt: skip
