"""``sparsifiner validate``: accuracy, FLOPs and speed on labelled images, beside the dense twin."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from .options import (
    BatchSize,
    ConfigFile,
    DataFolder,
    DataSource,
    Device,
    Download,
    Dtype,
    ImageSize,
    Json,
    KeepRates,
    Workers,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation import Validation


def validate(
    model: Annotated[
        str,
        typer.Option(
            help="A classifier: a timm name, or a folder of train, pareto or save_pretrained.", metavar="NAME|FOLDER"
        ),
    ],
    data: DataFolder = None,
    source: DataSource = "folder",
    split: Annotated[str, typer.Option(help="Name of the split; '' if the folder is it.")] = "val",
    img_size: ImageSize = None,
    keep_rate: KeepRates = None,
    config: ConfigFile = None,
    limit: Annotated[int | None, typer.Option(help="Use so many images, evenly spaced.", min=1)] = None,
    batch_size: BatchSize = 64,
    workers: Workers = 4,
    repeats: Annotated[int, typer.Option(help="Speed measurements; 0 for none.", min=0)] = 5,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Download = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
    json: Json = False,
) -> None:
    """Top-1 and top-5 with their 95 % intervals, loss, FLOPs and images per second, beside the dense model's."""
    from .._utils.files import check_file_writable, make_folder_of, write_atomically

    rates, size = parse_keep_rates(keep_rate), parse_one_size(img_size, "validate")
    check_dtype(dtype)
    check_device(device)
    check_files(config=config)
    if output is not None:
        check_file_writable(output)

    import torch
    from rich.console import Console

    from .._utils.progress import progress_on
    from ..config import SparsifinerConfig
    from ..evaluation import validate as run
    from ..training.recipe import DataConfig

    stderr = Console(stderr=True)
    with option_words(), progress_on(stderr) as progress:
        images = DataConfig(
            source=source, path=data, val_split=split, img_size=size, workers=workers, download=download,
            val_limit=limit,
        )  # fmt: skip
        result = run(
            model,
            images,
            config=None if config is None else SparsifinerConfig.from_file(config),
            keep_rates=rates,
            batch_size=batch_size,
            dtype=getattr(torch, dtype),
            device=parse_device(device),
            repeats=repeats,
            progress=progress,
        )
    for name, reason in result.broken.items():
        say(stderr, f"skipped {name}: {reason}")
    text = json_module.dumps(result.to_dict(), indent=2) + "\n"
    if output is not None:
        make_folder_of(output)
        write_atomically(output, text)
    if json:
        print(text, end="")
    else:
        _print(result, output_console())


def _print(result: Validation, console: Console) -> None:
    from rich.table import Table

    size = "x".join(str(side) for side in result.img_size)
    first = result.rows[0].accuracy
    say(console, f"{result.model}: {first.images} images at {size} px, {result.dtype}")
    table = Table(show_edge=False, pad_edge=False, collapse_padding=True)  # which leaves room for long names
    for column in ("", "top-1", "95 % interval", "top-5", "loss", "GMACs", "MHSA\nMMACs", "images/s", "speed-up"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in result.rows:
        values = row.to_dict()
        low, high = values["top1_interval"]
        table.add_row(
            row.name,
            f"{values['top1']:.2%}",
            f"[{100 * low:.2f}, {100 * high:.2f}]",
            f"{values['top5']:.2%}",
            f"{values['loss']:.4f}",
            f"{row.total_macs / 1e9:.2f}",
            f"{row.mhsa_macs / 1e6:.1f}",
            "" if row.images_per_second is None else f"{row.images_per_second:.1f}",
            "" if row.speed_up is None else f"{row.speed_up:.2f}x",
        )
    console.print(table)
    if result.broken:
        say(console, f"{len(result.broken)} broken images skipped")
