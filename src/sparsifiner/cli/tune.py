"""``sparsifiner tune``: the fastest form of a model within a bound of fidelity, on your images and machine."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .arguments import check_files, parse_one_size
from .console import output_console, say
from .failures import resumable
from .options import BatchSize, ImageSize


def tune(
    model: Annotated[str, typer.Option(help="builtin, or a timm model name.", metavar="NAME|FOLDER")] = "builtin",
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures, a dozen or two; four bundled photographs by default.")
    ] = None,
    img_size: ImageSize = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Least mean cosine of final patch features to the dense model's.")
    ] = None,
    max_relative_l2: Annotated[
        float | None, typer.Option(help="Largest mean relative L2 of them; without --min-cosine the only bound.")
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="Of the whole search.", min=1)] = 600.0,
    batch_size: BatchSize = 1,
    num_images: Annotated[int, typer.Option(help="Pictures to use at most.", min=2)] = 16,
    output: Annotated[Path, typer.Option(help="Folder for the model, tuning.html, tuning.json and the trials.")] = Path(
        "tuned"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trials in --output.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the search.", min=0)] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON result on stdout and nothing else there.")
    ] = False,
) -> None:
    """Search keep rate, tiles, tail, precision and compilation together; save the fastest model within the bound."""
    from .._utils.files import check_writable, write_together

    size = parse_one_size(img_size, "tune")
    check_files(images=images)
    folder = check_writable(output)

    from rich.console import Console

    from .._utils.photos import bundled_photos, load_photos
    from .._utils.progress import progress_on
    from ..models import load_model
    from ..report.tuned import draw_tuned, print_tuned, render_tuned
    from ..runtime import ReadyModel
    from ..tuning import tune as run
    from ..tuning.result import settings_yaml

    stderr = Console(stderr=True)
    photos = bundled_photos(num_images) if images is None else load_photos(images, num_images)
    for name, reason in photos.skipped.items():
        say(stderr, f"skipped {name}: {reason}")
    dense = load_model(model, img_size=size)
    if min_cosine is None and max_relative_l2 is None:
        min_cosine = 0.99
    how = partial(_how_to_go_on, folder)
    with resumable(partial(say, stderr), how), progress_on(stderr) as progress:
        tuned = run(
            dense, photos, min_cosine=min_cosine, max_relative_l2=max_relative_l2, max_seconds=max_seconds,
            batch_size=batch_size, storage=folder, resume=resume, seed=seed, name=model, progress=progress,
            say=partial(say, stderr),
        )  # fmt: skip
        report = tuned.report
        report.command = shlex.join(["sparsifiner", *(word for word in sys.argv[1:] if word != "--resume")])
        settings = settings_yaml(tuned.settings)
        if isinstance(tuned.model, ReadyModel):
            tuned.save(folder)
        write_together(
            {
                folder / "tuning.html": render_tuned(report, settings),
                folder / "tuning.json": report.to_json(),
                folder / "pareto.png": draw_tuned(report),
            }
        )
    if json:
        print(report.to_json(), end="")
        return
    stdout = output_console(width=120)
    print_tuned(report, stdout)
    ready = isinstance(tuned.model, ReadyModel)
    saved = f"sparsifiner.from_pretrained({str(folder)!r}) brings the model back; " if ready else ""
    say(stdout, f"\n{saved}written: {folder / 'tuning.html'} and {folder / 'tuning.json'}")


def _how_to_go_on(folder: Path) -> str:
    from ..tuning.trials import JOURNAL

    return "the same command with --resume goes on with the trials so far" if (folder / JOURNAL).exists() else ""
