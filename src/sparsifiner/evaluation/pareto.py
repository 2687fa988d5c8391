"""The trade of accuracy for cost: methods at several keep rates on the same labelled images.

What was measured of a cell stays in ``pareto.json``; a sweep that stopped goes on from there, and one with more images,
methods or keep rates measures only what is missing.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..analysis import compare_latency, count_flops
from ..analysis.accuracy import Batch, count_correct
from ..calibration import calibrate
from ..files import check_writable
from ..methods import convert_with
from ..models import load_model
from ..progress import Progress
from ..saving import is_converted
from ..training.data import Samples, collate, validation_transform
from ..training.engine import train
from ..training.recipe import PATCH_LOSSES, SCORE_LOSSES, DataConfig, TrainConfig
from ..training.sources import ImageSource, open_source
from ..training.student import save_model
from .cell import STAGES, Cell, Row, image_order
from .results import load_rows, save_rows
from .validate import Cast

SAVE_EVERY = 8
"""Batches of classified images between two writes of the results."""


@dataclass(frozen=True)
class Sweep:
    """What to compare.

    Args:
        model: a dense model with a classifier: ``builtin``, a timm name, or a folder ``train`` wrote. The teacher too.
        data: labelled images; ``val_split`` is measured on, ``train_split`` calibrates and trains.
        methods: names of :data:`sparsifiner.methods.METHODS`; ``dense`` is always measured.
        keep_rates: of each method.
        stages: any of :data:`STAGES`. Only sparse attention can be calibrated; all methods can be fine-tuned, those
            with a predictor to learn from where calibration leaves them.
        recipe: of the fine-tuning; its model, data, teacher and sparsity are those of the sweep and the cell. Phases
            that train a predictor are left out for methods without one.
        num_images: validation images to classify, in one random order for all cells; all if None.
        calibration_images: training images to calibrate on.
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
    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods or not self.keep_rates or not self.stages:
            raise ValueError("a sweep needs at least one method, one keep rate and one stage")
        for method in self.methods:
            for stage in self.stages:
                for keep_rate in self.keep_rates:
                    Cell(method, keep_rate, stage)
        if "fine-tuned" in self.stages and self.recipe is None:
            raise ValueError("fine-tuned cells need a recipe; recipes/cifar10_cpu.yaml is one")
        if self.data.val_split is None:
            raise ValueError("data.val_split is null; name the split to measure on")

    def cells(self) -> list[Cell]:
        """Dense first, then method by method, each stage by itself; what a method has no stage for is left out."""
        cells = [Cell("dense", 1.0)]
        for stage in sorted(self.stages, key=STAGES.index):
            for method in self.methods:
                found = [Cell(method, rate, stage) for rate in self.keep_rates]
                cells += [cell for cell in found if method != "dense" and (stage != "calibrated" or cell.sparse)]
        return list(dict.fromkeys(cells))

    def purpose(self) -> dict[str, Any]:
        """What all rows of one file must have in common."""
        return {
            "model": self.model,
            "source": self.data.source,
            "split": self.data.val_split,
            "img_size": None if self.data.size is None else list(self.data.size),
            "calibration_images": self.calibration_images,
            "batch_size": self.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "seed": self.seed,
        }


def run_sweep(
    sweep: Sweep,
    output: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure every cell of ``sweep`` that ``output`` does not hold yet.

    Args:
        sweep: what to compare.
        output: folder for ``pareto.json`` and a folder of each cell that is fitted.
        progress: told what is being done.
        say: told a line of text per finished cell.

    Returns:
        All rows in ``output``, dense first.

    Raises:
        ValueError: in one line, if the model, the data or an earlier sweep in ``output`` do not fit.
    """
    folder = check_writable(output)
    return _Run(sweep, folder, progress or (lambda *_: None), say or (lambda _: None)).all_cells()


class _Run:
    """A sweep under way."""

    def __init__(self, sweep: Sweep, folder: Path, tell: Progress, say: Callable[[str], None]) -> None:
        self.sweep, self.folder, self.tell, self.say = sweep, folder, tell, say
        self.rows = load_rows(folder, sweep.purpose())
        data = sweep.data
        self.dense: Any = load_model(sweep.model, img_size=data.size)
        if is_converted(self.dense) or not getattr(self.dense, "num_classes", 0):
            raise ValueError(f"{sweep.model} must be a dense model with a classifier; train one first")
        embed: Any = self.dense.patch_embed
        self.size: tuple[int, int] = data.size or tuple(embed.img_size)
        source = open_source(data.source, data.path, data.val_split or "", train=False, download=data.download)
        if source.classes is None:
            raise ValueError("a sweep measures accuracy and needs labels; use a folder per class, or labelled data")
        self.samples = self._samples(source)
        self.order = image_order(len(source), sweep.seed)[: sweep.num_images].tolist()

    def _samples(self, source: ImageSource) -> Samples:
        normalisation = resolve_model_data_config(self.dense)
        transform = validation_transform(self.size, normalisation)
        return Samples(source, transform, 0, replace_broken=False)

    def all_cells(self) -> list[Row]:
        for cell in self.sweep.cells():
            row = self.rows.get(cell)
            speed_missing = row is None or (row.ms is None and self.sweep.repeats > 0)
            if row is not None and len(row.hits) >= len(self.order) and not speed_missing:
                continue
            if row is None:
                row = Row(cell)
            model = self._fitted(cell, row)
            self._measure(model, row)
            low, high = row.interval
            self.say(f"{cell.name}: top-1 {row.top1:.2%} ({low:.2%} to {high:.2%}) on {row.images} images")
        return list(self.rows.values())

    def _fitted(self, cell: Cell, row: Row) -> nn.Module:
        """The model of a cell; what was fitted in an earlier run is read from its folder."""
        folder = self.folder / "cells" / cell.name
        if cell.stage == "fine-tuned":
            start_from = self._calibrated(cell, row) if cell.learns_predictor else None
            config, row.note = self._recipe(cell, start_from)
            name = "ema" if config.ema_decay is not None else "model"
            finished = folder / "result.json"
            if finished.is_file():
                if json.loads(finished.read_text())["recipe"] != config.to_dict():
                    raise ValueError(f"{folder} was trained by another recipe; name another folder with --output")
            else:
                start = time.perf_counter()
                train(config, folder, cpu=self.sweep.device == "cpu", progress=self.tell, say=self.say)
                row.seconds += time.perf_counter() - start
            model = load_model(str(folder / name))
        elif cell.stage == "calibrated":
            model = load_model(str(self._calibrated(cell, row)))
        else:
            model = convert_with(cell.method, self.dense, cell.keep_rate)
        return model.to(self.sweep.device, self.sweep.dtype).eval()

    def _calibrated(self, cell: Cell, row: Row) -> Path:
        """Folder of the model of ``cell`` after calibration, which happens once, at the cost of ``row``."""
        made = dataclasses.replace(cell, stage="calibrated")
        folder = self.folder / "cells" / made.name
        if not (folder / "model").is_dir():
            start = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            model = convert_with(cell.method, self.dense, cell.keep_rate).to(self.sweep.device)
            calibrate(model, self._calibration_images(), state=folder / "calibration.state", progress=self.tell)
            save_model(model.cpu(), folder / "model")
            row.seconds += time.perf_counter() - start
        return folder / "model"

    def _calibration_images(self) -> Tensor:
        """Evenly spaced training images as the validation transform prepares them, ``[B, 3, H, W]``."""
        data, count = self.sweep.data, self.sweep.calibration_images
        source = open_source(data.source, data.path, data.train_split, train=True, download=data.download, limit=count)
        samples = self._samples(source)
        return collate([samples[(0, number)] for number in range(len(samples))]).images

    def _recipe(self, cell: Cell, start_from: Path | None) -> tuple[TrainConfig, str]:
        """The recipe of a cell, from a calibrated model or the dense one, and what was different in it.

        The teacher is the same either way: calibration changes predictors and tails only.
        """
        recipe, note = self.sweep.recipe, []
        assert recipe is not None
        phases = recipe.phases
        if not cell.learns_predictor:
            phases = tuple(p for p in phases if p.train != "predictor" and not set(p.losses) & set(SCORE_LOSSES))
            if len(phases) < len(recipe.phases):
                note.append("no predictor to train")
        if cell.method == "tome":
            kept = [{name: weight for name, weight in p.losses.items() if name not in PATCH_LOSSES} for p in phases]
            phases = tuple(
                dataclasses.replace(p, losses=losses) for p, losses in zip(phases, kept, strict=True) if losses
            )
            note.append("merged tokens have no counterpart for losses on patches")
        if not phases:
            raise ValueError(f"the recipe has no phase that {cell.method} could be trained by; add cls_distill")
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

    def _measure(self, model: nn.Module, row: Row) -> None:
        """Count, classify the images that are missing, and time."""
        sweep = self.sweep
        x = torch.randn(sweep.batch_size, 3, *self.size, generator=torch.Generator().manual_seed(0))
        x = x.to(sweep.device, sweep.dtype)
        if not row.total_macs:
            flops = count_flops(model, x[:1])
            row.mhsa_macs, row.mhsa_full_macs, row.total_macs = flops.mhsa_macs, flops.mhsa_full_macs, flops.total_macs
        wanted = self.order[len(row.hits) :]
        batches = [wanted[at : at + sweep.batch_size] for at in range(0, len(wanted), sweep.batch_size)]
        places = [[(0, number) for number in batch] for batch in batches]
        loader = DataLoader(
            self.samples, batch_sampler=places, num_workers=sweep.data.workers, collate_fn=collate,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        label = f"{row.cell.name}: accuracy"
        runner = Cast(model, sweep.dtype)
        for done, batch in enumerate(loader, start=1):
            self._classify(runner, row, batches[done - 1], batch)
            self.tell(label, done, len(batches))
            if done % SAVE_EVERY == 0 and row.images:
                self._keep(row)
        if not row.images:
            raise ValueError(f"none of the {len(row.hits)} images can be read")
        if row.ms is None and sweep.repeats:
            self.tell(f"{row.cell.name}: speed", 0, 1)
            self._time(model, row, x)
            self.tell(f"{row.cell.name}: speed", 1, 1)
        self._keep(row)

    def _classify(self, model: nn.Module, row: Row, numbers: list[int], batch: Batch) -> None:
        right: set[int] = set()

        def note(seen: Batch, hits: Tensor) -> None:
            right.update(seen.numbers[hits].tolist())

        if len(batch.images):
            count_correct(model, [batch], torch.device(self.sweep.device), each=note)
        readable = set(batch.numbers.tolist())
        for number in numbers:
            if number not in readable:
                row.missing.append(len(row.hits))
            row.hits.append(number in right)
        for name, reason in batch.broken.items():
            self.say(f"skipped {name}: {reason}")

    @cached_property
    def dense_to_time(self) -> nn.Module:
        """The dense model where and as the others are measured."""
        return copy.deepcopy(self.dense).to(self.sweep.device, self.sweep.dtype)

    def _time(self, model: nn.Module, row: Row, x: Tensor) -> None:
        timings = compare_latency(self.dense_to_time, model, x, repeats=self.sweep.repeats, warmup=1)
        row.ms, row.dense_ms = (1e3 * seconds / len(x) for seconds in (timings.sparse_median, timings.dense_median))

    def _keep(self, row: Row) -> None:
        self.rows[row.cell] = row
        save_rows(self.folder, self.sweep.purpose(), self.rows.values())
