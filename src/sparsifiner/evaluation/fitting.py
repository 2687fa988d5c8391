"""The model of each cell of a sweep: converted, calibrated, or trained by the sweep's recipe."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._utils.digest import digest, state_digest
from .._utils.files import make_folder, write_atomically
from .._utils.messages import one_line, shown
from .._utils.progress import Progress
from .._utils.reading import read_json
from ..calibration import calibrate
from ..errors import SparsifinerError
from ..methods import convert_with
from ..models import load_model
from ..saving import CONFIG_NAME
from ..training.checkpoint import RESULT_NAME
from ..training.data import Samples, collate
from ..training.engine import train
from ..training.phases import check_phases
from ..training.randomness import seeded
from ..training.recipe import PATCH_LOSSES, SCORE_LOSSES, PhaseConfig, TrainConfig
from ..training.recipe_file import differing_settings
from ..training.sources import ImageSource, open_source, source_digest
from ..training.student import save_model
from .cell import Cell, Row
from .sweep import Sweep

FIT_NAME = "fit.json"


class CellModels:
    """Makes the models of a sweep. What is fitted is kept in a folder per cell and made once.

    Args:
        sweep: what is compared.
        folder: of the sweep.
        dense: the model it starts from.
        samples: prepares the images of a source as they are validated.
        notify: told of progress.
        say: told lines of text.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        dense: nn.Module,
        samples: Callable[[ImageSource], Samples],
        notify: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.sweep, self.folder, self.dense, self.samples = sweep, folder, dense, samples
        self.progress, self.say = notify, say

    def of(self, row: Row) -> nn.Module:
        """The model of a cell, ready to be measured; what was fitted in an earlier run is read from its folder.

        Args:
            row: of the cell; gets what it was fitted by, the seconds that took and a note of what was different in it.
        """
        cell = row.cell
        row.fit = None if cell.stage == "training-free" else self._fit(cell)
        if cell.stage == "fine-tuned":
            if cell.learns_predictor:
                self._calibrate(cell, row)
            folder = self._folder(cell)
            config, row.note = self._recipe(cell)
            if not (folder / RESULT_NAME).is_file():
                self._record(cell)
                start = time.perf_counter()
                train(config, folder, cpu=self.sweep.device == "cpu", progress=self.progress, say=self.say)
                row.seconds += time.perf_counter() - start
            model = load_model(str(folder / ("ema" if config.ema_decay is not None else "model")))
        elif cell.stage == "calibrated":
            self._calibrate(cell, row)
            model = load_model(str(self._calibrated(cell)))
        else:
            model = self._converted(cell)
        return model.to(self.sweep.device, self.sweep.dtype).eval()

    def check(self, cell: Cell, row: Row | None) -> None:
        """Raise a ValueError before the first measurement if ``cell`` cannot be made.

        That is where its method refuses the model, no phase of the recipe suits it, or it was fitted in an earlier
        run to another model, on other images or by another recipe.

        Args:
            cell: of the sweep.
            row: what an earlier run has measured of it.
        """
        model = self._converted(cell)
        if cell.stage == "fine-tuned":
            check_phases(model, self._recipe(cell)[0])
            if cell.learns_predictor:
                self._check_fit(dataclasses.replace(cell, stage="calibrated"), None)
        if cell.stage != "training-free":
            self._check_fit(cell, row)

    def _check_fit(self, cell: Cell, row: Row | None) -> None:
        folder, wanted = self._folder(cell), self._fit(cell)
        kept = [] if row is None else [row.fit]
        if folder.exists():
            file = folder / FIT_NAME
            kept.append(_read_fit(file) if file.is_file() else None)
        for found in kept:
            if found is None:
                reason = "was fitted by an older version, which did not record to what; delete it, or"
            elif found.get("model") != wanted["model"]:
                reason = "was fitted to another model;"
            elif found.get("training_images") != wanted["training_images"]:
                reason = "was fitted on other training images;"
            # The model's name does not count: its content has been compared.
            elif names := set(differing_settings(found.get("recipe"), wanted["recipe"])) - {"model"}:
                reason = f"was trained by another recipe ({', '.join(sorted(names))});"
            else:
                continue
            raise SparsifinerError(f"{folder} {reason} name another folder with --output")

    def _fit(self, cell: Cell) -> dict[str, Any]:
        """Settings that the weights of a fitted cell follow from, as plain values."""
        return {
            "model": self.model_digest,
            "training_images": self._training_digest,
            "recipe": self._recipe(cell)[0].to_dict() if cell.stage == "fine-tuned" else {},
        }

    def _record(self, cell: Cell) -> None:
        """Note in the folder of ``cell`` what it is fitted by, before that begins: it may be interrupted."""
        make_folder(self._folder(cell))
        write_atomically(self._folder(cell) / FIT_NAME, json.dumps(self._fit(cell), indent=1) + "\n")

    @cached_property
    def model_digest(self) -> str:
        """Of the weights of the dense model and of how images are prepared for it."""
        settings = json.dumps(resolve_model_data_config(self.dense))
        return digest([settings, state_digest(self.dense.state_dict())])

    @cached_property
    def _training_digest(self) -> str:
        return source_digest(self._training_images())

    def _folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def _calibrated(self, cell: Cell) -> Path:
        """Folder of the model of ``cell`` after calibration."""
        return self._folder(dataclasses.replace(cell, stage="calibrated")) / "model"

    def _converted(self, cell: Cell) -> nn.Module:
        """The model before anything is fitted; random weights depend on the cell and the sweep's seed only."""
        with seeded(self.sweep.seed, cell.method, cell.keep_rate):
            return convert_with(cell.method, self.dense, cell.keep_rate)

    def _calibrate(self, cell: Cell, row: Row) -> None:
        """Make :meth:`_calibrated` unless it is there, at the cost of ``row``."""
        folder = self._calibrated(cell)
        if (folder / CONFIG_NAME).is_file():  # written last
            return
        start = time.perf_counter()
        self._record(dataclasses.replace(cell, stage="calibrated"))
        model = self._converted(cell).to(self.sweep.device)
        images, state = self._calibration_images(), folder.with_name("calibration.state")
        calibrate(model, images, steps=self.sweep.calibration_steps, state=state, progress=self.progress)
        save_model(model.cpu(), folder)
        row.seconds += time.perf_counter() - start

    def _calibration_images(self) -> Tensor:
        """Evenly spaced training images as the validation transform prepares them, ``[B, 3, H, W]``."""
        samples = self.samples(self._training_images(self.sweep.calibration_images))
        return collate([samples[(0, number)] for number in range(len(samples))]).images

    def _training_images(self, limit: int | None = None) -> ImageSource:
        data = self.sweep.data
        return open_source(data.source, data.path, data.train_split, train=True, download=data.download, limit=limit)

    def _recipe(self, cell: Cell) -> tuple[TrainConfig, str]:
        """The recipe of a cell, from a calibrated model or the dense one, and what was different in it.

        The teacher is the same either way: calibration changes predictors and tails only.
        """
        recipe, note = self.sweep.recipe, []
        assert recipe is not None
        start_from = self._calibrated(cell) if cell.learns_predictor else None
        if start_from is not None and recipe.model_args:
            raise SparsifinerError(
                f"{cell.method} starts from its calibrated model, which takes no other arguments; leave model_args "
                f"({', '.join(recipe.model_args)}) out of the recipe, or {cell.method} out of the sweep"
            )
        phases = recipe.phases
        if not cell.learns_predictor:
            phases = _without(SCORE_LOSSES, (phase for phase in phases if phase.train != "predictor"))
            if phases != recipe.phases:
                note.append("no predictor to train")
        if cell.method == "tome":
            length = len(phases)
            phases = _without(PATCH_LOSSES, phases)
            if len(phases) < length:
                raise SparsifinerError(
                    "the recipe has a phase whose losses are all on patches; tome, whose merged tokens have no "
                    "counterpart, would train fewer steps than the others: add kl to it, or leave tome out"
                )
            note.append("merged tokens have no counterpart for losses on patches")
        if not phases:
            raise SparsifinerError(f"the recipe has no phase that {cell.method} could be trained by; add cls_distill")
        if start_from is not None:
            note.append("starts from its calibrated predictor")
        config = dataclasses.replace(
            recipe,
            model=self.sweep.model if start_from is None else str(start_from),
            teacher="same",
            phases=phases,
            sparsity="saved" if start_from else {"method": cell.method, "keep_rate": cell.keep_rate},
            data=dataclasses.replace(self.sweep.data, val_split=None),
        )
        return config, "; ".join(note)


def _without(losses: Sequence[str], phases: Iterable[PhaseConfig]) -> tuple[PhaseConfig, ...]:
    """The phases without these losses; a phase that has no others is left out."""
    kept = []
    for phase in phases:
        if others := {name: weight for name, weight in phase.losses.items() if name not in losses}:
            kept.append(dataclasses.replace(phase, losses=others))
    return tuple(kept)


def _read_fit(file: Path) -> dict[str, Any]:
    """What :data:`FIT_NAME` of a cell says."""
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise SparsifinerError(f"{file} cannot be read: {one_line(error)}; delete its folder") from error
    if not isinstance(found, dict):
        raise SparsifinerError(f"{file} must hold named values, got {shown(found)}; delete its folder")
    return found
