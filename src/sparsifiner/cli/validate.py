"""``sparsifiner validate``: accuracy, FLOPs and speed on labelled images, dense beside sparse."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .report import check_dtype, parse_device, parse_keep_rates, parse_sizes

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation import Validation


def validate(
    data: Annotated[str | None, typer.Option(help="Folder of the images.", metavar="FOLDER")] = None,
    model: Annotated[
        str,
        typer.Option(help="A timm model name, or a folder of train or save_pretrained.", metavar="NAME|FOLDER"),
    ] = "builtin",
    source: Annotated[
        str, typer.Option(help="folder, cifar10-png, torch/<name> or hf/<name>.", metavar="KIND")
    ] = "folder",
    split: Annotated[str, typer.Option(help="Name of the split; '' if the folder is it.")] = "val",
    img_size: Annotated[str | None, typer.Option(help="Pixels, such as 224 or 480x640.")] = None,
    keep_rate: Annotated[str | None, typer.Option(help="Shares of keys to keep, such as 0.05,0.1.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of sparsifier settings.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many images, evenly spaced.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 4,
    repeats: Annotated[int, typer.Option(help="Speed measurements; 0 for none.", min=0)] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    download: Annotated[bool, typer.Option("--download", help="Let torchvision or Hugging Face download.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")] = False,
) -> None:
    """Top-1 and top-5 with their 95 % intervals, loss, FLOPs and images per second: dense beside sparse."""
    rates, sizes = parse_keep_rates(keep_rate), parse_sizes(img_size)
    if len(sizes) > 1:
        raise ValueError(f"--img-size {img_size!r} names several sizes; validate takes one")
    check_dtype(dtype)

    import torch
    from rich.console import Console

    from ..config import SparsifinerConfig
    from ..evaluation import validate as run
    from ..files import check_writable, write_atomically
    from ..progress import progress_on
    from ..training.recipe import DataConfig

    if output is not None:
        check_writable(output.parent)
    images = DataConfig(
        source=source, path=data, val_split=split, img_size=sizes[0] if sizes else None, workers=workers,
        download=download, val_limit=limit,
    )  # fmt: skip
    stderr = Console(stderr=True)
    with progress_on(stderr) as progress:
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
        stderr.print(f"skipped {name}: {reason}", markup=False, highlight=False)
    text = json_module.dumps(result.to_dict(), indent=2) + "\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text)
    if json:
        print(text, end="")
    else:
        stdout = Console()
        _print(result, stdout if stdout.is_terminal else Console(width=100))


def _print(result: Validation, console: Console) -> None:
    from rich.table import Table

    size = "x".join(str(side) for side in result.img_size)
    first = result.rows[0].accuracy
    console.print(
        f"{result.model}: {first.images} images at {size} px, {result.dtype}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table()
    for column in ("", "top-1", "95 % interval", "top-5", "loss", "GMACs", "MHSA MMACs", "images/s"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        values = row.to_dict()
        low, high = values["top1_interval"]
        table.add_row(
            row.name,
            f"{values['top1']:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{values['top5']:.2%}",
            f"{values['loss']:.4f}",
            f"{row.total_macs / 1e9:.2f}",
            f"{row.mhsa_macs / 1e6:.1f}",
            "" if row.images_per_second is None else f"{row.images_per_second:.1f}",
        )
    console.print(table)
    if result.broken:
        console.print(f"{len(result.broken)} broken images skipped", highlight=False)
