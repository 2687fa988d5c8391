"""``sparsifiner extract``: features of many images, in shards that appear whole; goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SparsifinerError
from .arguments import parse_keep_rates, parse_one_size
from .console import say
from .failures import resumable
from .options import ImageSize, SavedModel


def extract(
    images: Annotated[
        str, typer.Argument(help="A folder, a text file with a path per line, or hf/NAME.", metavar="IMAGES")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the shards.", metavar="OUT")],
    model: SavedModel = "builtin",
    tuned: Annotated[
        Path | None, typer.Option(help="Folder of a tuned or saved model, instead of --model.", metavar="FOLDER")
    ] = None,
    keep_rate: Annotated[float | None, typer.Option(help="Share of keys to keep; 0.1 by default.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run the dense model, to compare with.")] = False,
    img_size: ImageSize = None,
    features: Annotated[str, typer.Option(help="patch, class or both.")] = "patch",
    format: Annotated[str, typer.Option(help="safetensors, parquet or zarr.")] = "safetensors",
    stored: Annotated[str, typer.Option(help="float16 or float32, on the disk.")] = "float16",
    shard_size: Annotated[int, typer.Option(help="Images per shard.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Decoding processes for each model process.", min=0)] = 1,
    processes: Annotated[int, typer.Option(help="Model processes, each on cores of its own.", min=1)] = 1,
) -> None:
    """Write the final features of many images; what an earlier run has written is not done again."""
    from .._utils.files import check_writable

    size = parse_one_size(img_size, "extract")
    rates = parse_keep_rates(None if keep_rate is None else str(keep_rate))
    if tuned is not None and (dense or model != "builtin"):
        raise SparsifinerError("--tuned names the model; leave out --model and --dense")
    check_writable(output)

    from rich.console import Console

    from ..extraction import ExtractConfig
    from ..extraction import extract as run

    config = ExtractConfig(
        model=model if tuned is None else str(tuned),
        keep_rate=rates[0] if rates else None,
        dense=dense,
        image_size=size,
        features=features,
        format=format,
        stored=stored,
        shard_size=shard_size,
        batch_size=batch_size,
        workers=workers,
        processes=processes,
    )
    stderr = Console(stderr=True)

    def tell(text: str) -> None:
        say(stderr, text)

    def how() -> str:
        return f"the shards in {output} stay; the same command goes on from them"

    with resumable(tell, how):
        summary = run(images, output, config, say=tell)
    say(Console(), str(summary))
