"""``sparsifiner report``: what sparsity gains and costs, on your model, images and machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import check_device, check_dtype, check_files, parse_device, parse_keep_rates, parse_sizes
from .console import output_console, say
from .options import ConfigFile, Device, Dtype, MaxTokens, SavedModel

SECOND_SIZE = 115.0
"""Seconds in which both default sizes must be done, or the second is left out."""


def report(
    model: SavedModel = "builtin",
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures; four bundled photographs by default.")
    ] = None,
    img_size: Annotated[
        str | None, typer.Option(help="Pixels, such as 518 or 480x640; the model's own and twice that by default.")
    ] = None,
    keep_rate: Annotated[
        str | None, typer.Option(help="Shares of keys to keep, such as 0.05,0.1; 0.1 by default.")
    ] = None,
    config: ConfigFile = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html, report.json and the pictures.")] = Path(
        "sparsifiner-report"
    ),
    num_images: Annotated[int, typer.Option(help="Pictures to use at most.", min=1)] = 8,
    num_pictures: Annotated[int, typer.Option(help="How many of them to draw attention for.", min=0)] = 4,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Annotated[int, typer.Option(help="Interleaved latency runs; 0 measures no latency.", min=0)] = 7,
    max_seconds: Annotated[
        float, typer.Option(help="Start no further run of one latency measurement after so many seconds.", min=1)
    ] = 60.0,
    max_tokens: MaxTokens = 16384,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each model in a process of its own.")] = True,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON report on stdout and nothing else there.")
    ] = False,
) -> None:
    """Convert a model and print dense beside sparse: fidelity, FLOPs, latency, memory, density and pictures."""
    from .._utils.files import check_writable

    rates, sizes = parse_keep_rates(keep_rate), parse_sizes(img_size)
    check_dtype(dtype)
    check_device(device)
    check_files(config=config, images=images)
    folder = check_writable(output)

    import torch
    from rich.console import Console

    from .._utils.photos import bundled_photos, load_photos
    from .._utils.progress import progress_on
    from ..config import SparsifinerConfig
    from ..report.html import write_report
    from ..report.run import Settings, run_report
    from ..report.table import print_report

    stderr = Console(stderr=True)
    photos = bundled_photos(num_images) if images is None else load_photos(images, num_images)
    for name, reason in photos.skipped.items():
        say(stderr, f"skipped {name}: {reason}")
    settings = Settings(
        model=model,
        image_sizes=sizes,
        keep_rates=rates,
        config=None if config is None else SparsifinerConfig.from_file(config),
        dtype=getattr(torch, dtype),
        device=parse_device(device),
        repeats=repeats,
        max_seconds=max_seconds,
        max_tokens=max_tokens,
        memory=memory,
        pictures=num_pictures,
        fast=dtype == "float32" and device == "cpu",
        second_size=SECOND_SIZE,
    )
    with progress_on(stderr) as progress:
        result = run_report(settings, photos, progress)
    *_, page, data = write_report(result, folder)
    if json:
        print(result.to_json(), end="")
        return
    stdout = output_console()
    print_report(result, stdout)
    say(stdout, f"\nwritten: {page}, {data} and {len(result.pictures)} pictures")
