"""Settings of a sweep: methods, keep rates and stages on the same labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._utils.checks import seed
from ..errors import SparsifinerError
from ..training.recipe import DataConfig, TrainConfig
from .cell import DENSE, STAGES, Cell


@dataclass(frozen=True)
class Sweep:
    """Models, methods and images of a comparison.

    Args:
        model: a dense model with a classifier: ``builtin``, a timm name, or a folder ``train`` wrote. The teacher too.
        data: labelled images; ``val_split`` is measured on, ``train_split`` calibrates and trains.
        methods: names of :data:`sparsifiner.methods.METHODS`. The dense model as it is is always measured; naming
            ``dense`` fine-tunes it, too, which shows what the steps alone are worth.
        keep_rates: of each method.
        stages: any of :data:`STAGES`. Only methods with a predictor or a tail can be calibrated; all can be
            fine-tuned, those with a predictor to learn from where calibration leaves them.
        recipe: of the fine-tuning; its model, data, teacher and sparsity are those of the sweep and the cell, so no
            phase may set a keep rate. Methods without a predictor go without the phases that train nothing else, and
            without its losses in the others, so that all backbones learn for the same number of steps.
        num_images: validation images to classify, in one random order for all cells; all if None.
        calibration_images: training images to calibrate on.
        calibration_steps: optimiser steps of the reconstruction there, where a method has a predictor to learn.
        batch_size: images per forward pass, also where speed is measured.
        dtype: of weights and images when measuring.
        device: where to measure and calibrate; training goes where ``accelerate`` puts it unless this is ``cpu``.
        repeats: speed measurements that alternate with dense ones; 0 for none.
        seed: of the order of images.

    Raises:
        ValueError: in one line, if a name is unknown or the stages lack what they need.
    """

    model: str
    data: DataConfig
    methods: tuple[str, ...]
    keep_rates: tuple[float, ...]
    stages: tuple[str, ...] = ("training-free",)
    recipe: TrainConfig | None = None
    num_images: int | None = None
    calibration_images: int = 64
    calibration_steps: int = 200
    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods or not self.keep_rates or not self.stages:
            raise SparsifinerError("a sweep needs at least one method, one keep rate and one stage")
        for method in self.methods:
            for stage in self.stages:
                for keep_rate in self.keep_rates:
                    Cell(method, keep_rate, stage)
        if "fine-tuned" in self.stages:
            self._check_recipe()
        seed("seed", self.seed)
        if self.data.val_split is None:
            raise SparsifinerError("data.val_split is null; name the split to measure on")

    def _check_recipe(self) -> None:
        if self.recipe is None:
            raise SparsifinerError("fine-tuned cells need a recipe; --recipe cifar10_sweep is one")
        for number, phase in enumerate(self.recipe.phases):
            if phase.keep_rate is not None:
                raise SparsifinerError(
                    f"phase {phase.name} of the recipe sets keep_rate, but in a sweep it is that of each cell; "
                    f"leave it out, or add phases.{number}.keep_rate=null behind the command"
                )

    def cells(self) -> list[Cell]:
        """Dense first, then method by method, each stage by itself; what a method has no stage for is left out."""
        cells = [DENSE]
        for stage in sorted(self.stages, key=STAGES.index):
            for method in self.methods:
                rates = (1.0,) if method == DENSE.method else self.keep_rates
                found = [Cell(method, rate, stage) for rate in rates]
                cells += [cell for cell in found if stage != "calibrated" or cell.calibratable]
        return list(dict.fromkeys(cells))

    def common_settings(self) -> dict[str, Any]:
        """Settings that all rows of one file have in common."""
        return {
            "source": self.data.source,
            "split": self.data.val_split,
            "train_split": self.data.train_split,
            "img_size": None if self.data.size is None else list(self.data.size),
            "calibration_images": self.calibration_images,
            "calibration_steps": self.calibration_steps,
            "batch_size": self.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "seed": self.seed,
        }
