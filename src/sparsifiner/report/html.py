"""The report as one self-contained page; pictures are embedded."""

from __future__ import annotations

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any

from .._utils.files import check_writable, make_folder, write_together
from ..measure.crossover import BreakEven
from .contents import Report, seconds
from .rows import fast_of, layer_rows, macs, macs_share, table_rows


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write the pictures, ``report.html`` and ``report.json`` to ``folder``, all of them or none.

    Returns:
        The files written; the two reports last.

    Raises:
        ValueError: if the folder cannot be written.
        OSError: if the disk is full; an earlier report is as it was.
    """
    folder = check_writable(folder)
    make_folder(folder)
    files: dict[str, bytes | str] = {
        **report.pictures,
        "report.html": render_html(report),
        "report.json": report.to_json(),
    }
    # Named first, moved last: the page comes when all it shows is there.
    write_together({folder / name: content for name, content in reversed(files.items())})
    return [folder / name for name in files]


def render_html(report: Report) -> str:
    """The page."""
    return render_page(
        "report.html.jinja",
        report=report,
        table_rows=table_rows,
        fast_of=fast_of,
        layer_rows=layer_rows,
        shares=macs_share,
        macs=macs,
        seconds=seconds,
        picture=lambda name: _embed(report.pictures[name]),
        chart=lambda found: embed_png(draw_break_even(found)),
    )


def render_page(template: str, **values: Any) -> str:
    """The page of a template in this folder; templates extend ``page.html.jinja``, whose style they share."""
    import jinja2

    def source(name: str) -> str:
        return (resources.files("sparsifiner.report") / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def draw_break_even(found: BreakEven, *, dpi: int = 110) -> bytes:
    """A PNG: seconds of one attention layer over the token count, dense and sparse, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure = Figure(figsize=(7.2, 3.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens = [point.num_tokens for point in found.points]
    for label, colour, times in (
        ("dense (scaled_dot_product_attention)", "#6a6f78", [point.dense_s for point in found.points]),
        ("sparse (prediction, selection, tail, attention)", "#d9480f", [point.sparse_s for point in found.points]),
    ):
        axes.plot(tokens, [1e3 * value for value in times], marker="o", markersize=4, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = tokens if len(tokens) <= 7 else tokens[:: -(-len(tokens) // 7)]
    pixels = {point.num_tokens: point.image_size for point in found.points}
    axes.set_xticks(ticks, [f"{count}\n{pixels[count]} px" for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if found.num_tokens is not None:
        axes.axvline(found.num_tokens, color="#1d1f23", linewidth=0.8, linestyle="--")
    axes.set_xlabel("tokens, and side of a square image")
    axes.set_ylabel("ms per layer and image")
    axes.grid(True, which="major", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def _embed(png: bytes) -> str:
    """A picture of photographs as a data address; JPEG, because a page of PNGs would be four times as large."""
    from PIL import Image

    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def embed_png(png: bytes) -> str:
    """A drawing as a data address."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
