"""``sparsifiner calibrate``: fit a sparse model to its own dense attention and save it."""

from __future__ import annotations

import json as jsonlib
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SparsifinerError
from .arguments import check_device, check_dtype, check_files, parse_device, parse_one_size
from .console import output_console, say
from .failures import resumable
from .options import ConfigFile, Device, Dtype, SavedModel

STATE_NAME = "calibration-state.safetensors"
RESULT_NAME = "calibration.json"


def calibrate(
    images: Annotated[Path, typer.Option(help="Folder of pictures to fit to; give a few dozen.")],
    output: Annotated[Path, typer.Option(help="Folder for the saved model and calibration.json.")],
    model: SavedModel = "builtin",
    val_images: Annotated[
        Path | None, typer.Option(help="Folder of other pictures to measure the result on; --images by default.")
    ] = None,
    keep_rate: Annotated[float | None, typer.Option(help="Share of keys to keep; 0.1 by default.")] = None,
    keep_rates: Annotated[
        str, typer.Option(help="given, or per_layer: spread the same number of keys by measured error.")
    ] = "given",
    config: ConfigFile = None,
    img_size: Annotated[str | None, typer.Option(help="Pixels, such as 518; the model's own size by default.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures to use at most, of each folder.", min=1)] = 64,
    start: Annotated[str, typer.Option(help="lowrank: spectral, or current to go on from its weights.")] = "spectral",
    steps: Annotated[int, typer.Option(help="lowrank: steps of the reconstruction loss.", min=0)] = 200,
    learning_rate: Annotated[float, typer.Option(help="lowrank: relative to the size of the weights.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn at random.", min=0)] = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON result on stdout and nothing else there.")
    ] = False,
) -> None:
    """Fit a sparse model to its own dense attention, without labels; an interrupted run continues when run again."""
    from .._utils.files import check_writable, make_folder, write_atomically

    size = parse_one_size(img_size, "calibrate")
    check_dtype(dtype)
    check_device(device)
    check_files(config=config, images=images)
    check_files(images=val_images)
    folder = check_writable(output)

    import torch
    from rich.console import Console

    from .. import save_pretrained
    from .._utils.photos import load_photos
    from .._utils.progress import progress_on
    from ..calibration import calibrate as fit
    from ..config import SparsifinerConfig
    from ..models import load_model

    load_photos(images, 1)  # a wrong folder is told before the model is loaded
    loaded = load_model(model, img_size=size)
    settings = None if config is None else SparsifinerConfig.from_file(config)
    sparse = _sparse(loaded, settings, keep_rate).to(device=parse_device(device), dtype=getattr(torch, dtype))
    make_folder(folder)
    stderr = Console(stderr=True)
    with resumable(partial(say, stderr), partial(_kept, folder / STATE_NAME)):
        with progress_on(stderr) as progress:
            result = fit(
                sparse,
                images,
                validation=val_images,
                keep_rates=keep_rates,  # type: ignore[arg-type]  # checked there
                start=start,  # type: ignore[arg-type]
                steps=steps,
                learning_rate=learning_rate,
                max_images=num_images,
                img_size=size,
                seed=seed,
                state=folder / STATE_NAME,
                progress=progress,
            )
        save_pretrained(sparse, folder)
        data = jsonlib.dumps(result.to_dict(), indent=2) + "\n"
        write_atomically(folder / RESULT_NAME, data)
    (folder / STATE_NAME).resolve().unlink()  # a link to another disk stays
    if json:
        print(data, end="")
        return
    stdout = output_console()
    stdout.print(result.table())
    say(stdout, f'saved: {folder}; load it with sparsifiner.from_pretrained("{folder}")')


def _kept(state: Path) -> str:
    return f"{state} holds what is done; the same command continues from it" if state.exists() else ""


def _sparse(model, config, keep_rate):  # type: ignore[no-untyped-def]
    """``model`` with the settings asked for; one that is sparse already keeps its own but for the keep rate."""
    from ..convert import is_sparse, set_keep_rate, sparsify

    if not is_sparse(model):
        return sparsify(model, config, keep_rate=keep_rate, inplace=True)
    if config is not None:
        raise SparsifinerError("the model is sparse already and has settings of its own; leave --config out")
    if keep_rate is not None:
        set_keep_rate(model, keep_rate)
    return model
