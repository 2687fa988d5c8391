"""``sparsifiner pareto``: accuracy against cost, methods by keep rates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SparsifinerError
from .arguments import (
    check_device,
    check_dtype,
    check_files,
    option_words,
    parse_device,
    parse_keep_rates,
    parse_one_size,
)
from .console import output_console, say
from .failures import resumable
from .options import RECIPE, BatchSize, DataFolder, DataSource, Device, Download, Dtype, ImageSize, Workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..evaluation import Row


def pareto(
    model: Annotated[
        str, typer.Option(help="A dense classifier: a timm name, or a folder of train.", metavar="NAME|FOLDER")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe, such as phases.1.steps=100.", metavar="[NAME=VALUE]..."),
    ] = None,
    data: DataFolder = None,
    source: DataSource = "folder",
    split: Annotated[str, typer.Option(help="Name of the split to measure on; '' if the folder is it.")] = "val",
    train_split: Annotated[str, typer.Option(help="Name of the split to calibrate and train on.")] = "train",
    methods: Annotated[str, typer.Option(help="Names, such as sparsifiner,paper,local.")] = "sparsifiner,local",
    keep_rate: Annotated[str, typer.Option(help="Keep rates, such as 0.5,0.25,0.1.")] = "0.5,0.25,0.1,0.05",
    stages: Annotated[str, typer.Option(help="Any of training-free, calibrated, fine-tuned.")] = "training-free",
    recipe: Annotated[Path | None, RECIPE] = None,
    img_size: ImageSize = None,
    num_images: Annotated[int | None, typer.Option(help="Images to measure on; all by default.", min=1)] = None,
    calibration_images: Annotated[int, typer.Option(help="Training images to calibrate on.", min=1)] = 64,
    calibration_steps: Annotated[int, typer.Option(help="Steps of the reconstruction there.", min=0)] = 200,
    batch_size: BatchSize = 64,
    workers: Workers = 4,
    repeats: Annotated[int, typer.Option(help="Speed measurements of each model; 0 for none.", min=0)] = 5,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Download = False,
    output: Annotated[
        Path, typer.Option(help="Folder for pareto.json, pareto.csv and the figures; a sweep in it goes on.")
    ] = Path("sparsifiner-pareto"),
    json: Annotated[bool, typer.Option("--json", help="Print pareto.json on stdout and nothing else there.")] = False,
) -> None:
    """Sweep methods and keep rates: top-1 with 95 % intervals against multiply-adds and milliseconds."""
    rates, size = parse_keep_rates(keep_rate), parse_one_size(img_size, "pareto")
    if recipe is None and overrides:
        raise SparsifinerError(f"{overrides[0]!r} changes a recipe, but there is none; name it with --recipe")
    check_dtype(dtype)
    check_device(device)
    check_files(recipe=recipe)

    import torch
    from rich.console import Console

    from .._utils.progress import progress_on
    from ..evaluation import Sweep, run_sweep
    from ..evaluation.figure import draw_pareto
    from ..evaluation.results import RESULTS, TABLE
    from ..training.recipe import DataConfig
    from ..training.recipe_file import load_recipe

    with option_words():
        images = DataConfig(
            source=source, path=data, train_split=train_split, val_split=split, img_size=size, workers=workers,
            download=download,
        )  # fmt: skip
    sweep = Sweep(
        model=model,
        data=images,
        methods=_names(methods),
        keep_rates=rates,
        stages=_names(stages),
        recipe=None if recipe is None else load_recipe(recipe, overrides or []),
        num_images=num_images,
        calibration_images=calibration_images,
        calibration_steps=calibration_steps,
        batch_size=batch_size,
        dtype=getattr(torch, dtype),
        device=str(parse_device(device)),
        repeats=repeats,
    )  # fmt: skip
    stderr = Console(stderr=True)
    with resumable(partial(say, stderr), lambda: "the same command goes on from here" if output.exists() else ""):
        with option_words(), progress_on(stderr) as progress:
            rows = run_sweep(sweep, output, progress=progress, say=partial(say, stderr))
        figures = draw_pareto(rows, output)
    if json:
        print((output / RESULTS).read_text(), end="")
        return
    stdout = output_console(width=120)
    print_rows(rows, stdout)
    written = [str(path) for path in (output / RESULTS, output / TABLE, *figures)]
    say(stdout, f"written: {', '.join(written)}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The table of a sweep; what is saved of attention as the paper counts, and with every product of the predictor."""
    from rich.table import Table

    from ..evaluation.results import table_row

    table = Table(show_edge=False, pad_edge=False, collapse_padding=True)
    for column in (
        "method",
        "keep",
        "stage",
        "top-1",
        "drop, points",
        "MHSA MMACs",
        "saved",
        "in full",
        "ms",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column in ("method", "stage") else "right", no_wrap=True)
    for row in rows:
        values = table_row(row, rows)
        speed = "" if row.ms is None or row.dense_ms is None else f"{row.dense_ms / row.ms:.2f}x"
        table.add_row(
            row.cell.method,
            f"{row.cell.keep_rate:g}",
            row.cell.stage,
            f"{values['top1']:.2f} %",
            f"{values['drop']:+.2f} [{values['drop_low']:+.2f}, {values['drop_high']:+.2f}]",
            f"{values['mhsa_mmacs']:.1f}",
            f"{values['mhsa_saved']:.0f} %",
            f"{values['mhsa_full_saved']:.0f} %",
            "" if row.ms is None else f"{row.ms:.1f}",
            speed,
        )
    counts = sorted({row.images for row in rows})
    console.print(table)
    say(console, f"{' to '.join(str(count) for count in counts[:1] + counts[1:][-1:])} images")
