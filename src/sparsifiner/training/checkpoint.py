"""State of a run in one file, written atomically."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._utils.checks import number
from .._utils.files import replacing
from .._utils.messages import one_line
from ..errors import SparsifinerError
from .recipe import TrainConfig
from .recipe_file import differing_settings

CHECKPOINT_NAME = "checkpoint.pt"
RESULT_NAME = "result.json"
FORMAT = 2


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Randomness is not among it: every random number is a function of seed, phase, update and process.

    Args:
        recipe: the recipe, as plain values.
        phase: number of the phase that goes on.
        update: optimiser steps done in it.
        student: state dict of the model.
        optimizer: state dict, or None at the start of a phase.
        scaler: state dict of the fp16 gradient scaler, or None.
        ema: state dict of the averaged model, or None.
        world: number of processes.
        history: log entries so far.
        broken: name and reason of the images that could not be read so far.
        images: how many the training set has.
        classes: their names, or None.
    """

    recipe: dict[str, Any]
    phase: int
    update: int
    student: dict[str, Any]
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    world: int = 1
    history: list[dict[str, Any]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    images: int = 0
    classes: list[str] | None = None


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Replace the checkpoint of the folder."""
    values = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    # Into a file of Python's: what torch says of a full disk otherwise names neither it nor the file.
    with replacing(folder / CHECKPOINT_NAME, sole_writer=True) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **values}, file)


def load_checkpoint(
    folder: Path, config: TrainConfig, world: int, images: int, classes: list[str] | None
) -> Checkpoint | None:
    """The checkpoint of the folder, or None if it has none.

    Args:
        folder: of the run.
        config: the recipe to go on with.
        world: number of processes.
        images: how many the training set has.
        classes: their names, or None.

    Raises:
        ValueError: if it cannot be read, or belongs to another recipe, other images or another number of processes.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values.pop("format") != FORMAT:
            raise SparsifinerError("it is of another version")
        checkpoint = Checkpoint(**values)
        for name in ("phase", "update", "world", "images"):
            number(name, getattr(checkpoint, name), least=0, integer=True)
    except Exception as error:
        raise SparsifinerError(
            f"{path} cannot be read ({one_line(error)}); start anew with another --output"
        ) from error
    if names := differing_settings(checkpoint.recipe, config.to_dict()):
        raise SparsifinerError(
            f"{folder} holds a run of a different recipe ({', '.join(names)}); continue it with its own settings, "
            f"or start anew with another --output"
        )
    if (checkpoint.images, checkpoint.classes) != (images, classes):
        raise SparsifinerError(
            f"{folder} holds a run on other images ({checkpoint.images}, now there are {images}, or other classes); "
            f"continue with the same, or start anew with another --output"
        )
    if checkpoint.world != world:
        raise SparsifinerError(
            f"{folder} holds a run over {checkpoint.world} processes, now there are {world}; "
            f"continue with as many, or start anew with another --output"
        )
    return checkpoint


def check_same_start(found: Checkpoint | None, folder: Path) -> None:
    """Refuse to go on where the processes of a run found different checkpoints: their batches would differ, too.

    Args:
        found: what this process found; every process of the run makes this call.
        folder: of the run.

    Raises:
        ValueError: in one line.
    """
    from accelerate.utils import gather_object

    places = gather_object([None if found is None else (found.phase, found.update)])
    if any(place != places[0] for place in places):
        raise SparsifinerError(
            f"not every process of the run finds the same checkpoint in {folder}; the output folder must be one that "
            f"all nodes share"
        )
