"""``sparsifiner train``: run a recipe, or go on with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .arguments import check_files
from .console import say
from .failures import resumable
from .options import RECIPE


def train(
    recipe: Annotated[Path, RECIPE],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, such as data.path=photos phases.0.lr=1e-4.", metavar="[NAME=VALUE]..."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for model and checkpoint; an unfinished run in it goes on.")
    ] = Path("sparsifiner-train"),
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
) -> None:
    """Train by a recipe: calibrating phases, distillation, classification. Stopped runs continue exactly."""
    check_files(recipe=recipe)

    from rich.console import Console

    from .._utils.progress import progress_on
    from ..training.engine import train as run
    from ..training.recipe_file import load_recipe

    config = load_recipe(recipe, overrides or [])
    stderr = Console(stderr=True)
    with resumable(partial(say, stderr), partial(_kept, output)), progress_on(stderr) as progress:
        result = run(config, output, cpu=cpu, progress=progress, say=partial(say, stderr))
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    stdout = Console()
    for name, accuracy in result.accuracy.items():
        shares = accuracy.to_dict()
        low, high = shares["top1_interval"]
        say(
            stdout,
            f"{name}: top-1 {shares['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}) on {accuracy.images} images",
        )
    if result.broken:
        say(stdout, f"{len(result.broken)} broken training images were replaced")
    written = [str(folder) for folder in (result.model, result.ema) if folder is not None]
    say(stdout, f"written: {' and '.join(written)}")


def _kept(folder: Path) -> str:
    from ..training.checkpoint import CHECKPOINT_NAME

    return "the same command goes on from the last checkpoint" if (folder / CHECKPOINT_NAME).exists() else ""
