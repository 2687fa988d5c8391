"""What a search found: the model, its settings, and what was measured on the way."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .._utils.files import check_writable, make_folder, write_together
from .._utils.yaml12 import dump_yaml
from ..errors import SparsifinerError
from ..report.machine import Machine
from ..runtime import ReadyModel
from ..saving import save_pretrained
from .bound import Bound
from .models import WholeModel
from .space import Candidate
from .trials import Trial

FORMAT = 1
SETTINGS_NAME = "tuned.yaml"


@dataclass
class TuningReport:
    """Everything that was measured; :meth:`to_dict` is what ``tuning.json`` holds.

    Args:
        model: its name.
        machine: where.
        image_size: rows and columns in pixels.
        batch_size: images at once.
        num_tokens: of one image.
        bound: of the fidelity.
        tuned_on: names of the images that the search was made on.
        judged_on: names of those that judge.
        skipped: pictures that could not be read, and why.
        models: whole models that were run, the given one first.
        best: number of the result among ``models``.
        trials: of the cheap search.
        seconds: the search took.
        notes: what a reader has to know.
        verdict: plain sentences.
        command: that repeats the search; empty for a call from Python.
    """

    model: str
    machine: Machine
    image_size: tuple[int, int]
    batch_size: int
    num_tokens: int
    bound: Bound
    tuned_on: list[str]
    judged_on: list[str]
    skipped: dict[str, str]
    models: list[WholeModel]
    best: int
    trials: list[Trial]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def dense_seconds(self) -> float:
        """Median over all runs of the given model; others are put beside it by their own interleaved ratio."""
        return statistics.median(self.models[0].dense)

    def milliseconds(self, model: WholeModel) -> float:
        """Of a batch, from the ratio to the dense runs in between its own."""
        return 1e3 * self.dense_seconds / model.speedup

    @property
    def result(self) -> WholeModel:
        """The model that was chosen."""
        return self.models[self.best]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, seconds."""
        return {
            "format": FORMAT,
            "model": self.model,
            "machine": asdict(self.machine),
            "image_size": list(self.image_size),
            "batch_size": self.batch_size,
            "num_tokens": self.num_tokens,
            "bound": asdict(self.bound),
            "images": {"tuned_on": self.tuned_on, "judged_on": self.judged_on, "skipped": self.skipped},
            "best": self.best,
            "models": [model.to_dict() for model in self.models],
            "trials": [trial.to_dict() for trial in self.trials],
            "seconds": self.seconds,
            "notes": self.notes,
            "verdict": self.verdict,
            "command": self.command,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"


@dataclass
class Tuned:
    """The result of :func:`~sparsifiner.tune`.

    Args:
        model: runs like the dense one, ``forward_features`` included; the given model itself where nothing beat it.
        settings: of sparsity and runtime.
        trials: of the cheap search.
        report: everything that was measured.
    """

    model: nn.Module
    settings: Candidate
    trials: list[Trial]
    report: TuningReport

    def save(self, folder: str | Path, *, model_args: dict[str, Any] | None = None) -> Path:
        """Write the model, as :func:`~sparsifiner.save_pretrained` does, and ``tuned.yaml``, its settings.

        Raises:
            SparsifinerError: if nothing beat the given model, so that there is nothing to save, or it was not made by
                ``timm.create_model``.
            OSError: if the folder cannot be written.
        """
        if not isinstance(self.model, ReadyModel):
            raise SparsifinerError("nothing beat the model as it was given, so there is nothing to save")
        folder = check_writable(folder)
        save_pretrained(self.model, folder, model_args=model_args)
        make_folder(folder)
        write_together({folder / SETTINGS_NAME: settings_yaml(self.settings)})
        return folder


def settings_yaml(settings: Candidate) -> str:
    """Settings as YAML: ``sparsity`` is a configuration of sparsifiner, ``runtime`` one of ``Runtime``."""
    return dump_yaml(settings.to_dict())
