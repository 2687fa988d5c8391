"""The trade of accuracy for cost: methods at several keep rates on the same labelled images.

What was measured of a cell stays in ``pareto.json``; a sweep that stopped goes on from there, and one with more images,
methods or keep rates measures only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._utils.copying import copy_model
from .._utils.digest import state_digest
from .._utils.files import check_writable
from .._utils.messages import LOGGER
from .._utils.photos import CROPPING, input_channels
from .._utils.progress import Progress
from ..errors import SparsifinerError
from ..measure import compare_latency, count_flops
from ..measure.accuracy import Batch, count_correct
from ..models import load_model
from ..saving import is_converted
from ..training.data import Samples, collate, validation_transform
from ..training.sources import ImageSource, open_validation, source_digest
from .cell import Row, image_order
from .fitting import CellModels
from .results import load_rows, save_rows
from .sweep import Sweep
from .validate import Cast

SAVE_EVERY = 8
"""Batches of classified images between two writes of the results."""


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
        say: called with a line of text per finished cell; the logger ``sparsifiner`` if None.

    Returns:
        All rows in ``output``, dense first.

    Raises:
        ValueError: in one line, if the model, the data or an earlier sweep in ``output`` do not fit.
    """
    folder = check_writable(output)
    return _Run(sweep, folder, progress or (lambda *_: None), say or LOGGER.info).all_cells()


class _Run:
    """A sweep under way."""

    def __init__(self, sweep: Sweep, folder: Path, notify: Progress, say: Callable[[str], None]) -> None:
        self.sweep, self.folder, self.progress, self.say = sweep, folder, notify, say
        data = sweep.data
        self.dense: Any = load_model(sweep.model, img_size=data.size)
        if is_converted(self.dense) or not getattr(self.dense, "num_classes", 0):
            raise SparsifinerError(f"{sweep.model} must be a dense model with a classifier; train one first")
        dense: Any = self.dense
        self.size: tuple[int, int] = data.size or tuple(dense.patch_embed.img_size)
        source = open_validation(
            data.source, data.path, data.val_split or "", train_split=data.train_split,
            num_classes=dense.num_classes, download=data.download, limit=None,
        )  # fmt: skip
        self.models = CellModels(sweep, folder, self.dense, self._samples, notify, say)
        self.common = {
            **sweep.common_settings(),
            "validation_images": len(source),
            "validation_digest": source_digest(source),
            "model_digest": self.models.model_digest,
            "cropping": CROPPING,
        }
        self.rows = load_rows(folder, self.common)
        self.samples = self._samples(source)
        self.order = image_order(len(source), sweep.seed)[: sweep.num_images].tolist()

    def _samples(self, source: ImageSource) -> Samples:
        normalisation = resolve_model_data_config(self.dense)
        transform = validation_transform(self.size, normalisation, input_channels(self.dense))
        return Samples(source, transform, 0, replace_broken=False)

    def all_cells(self) -> list[Row]:
        cells = self.sweep.cells()
        for cell in cells:
            self.models.check(cell, self.rows.get(cell))
        for cell in cells:
            row = self.rows.get(cell)
            speed_missing = row is None or (row.ms is None and self.sweep.repeats > 0)
            if row is not None and len(row.hits) >= len(self.order) and not speed_missing:
                continue
            if row is None:
                row = Row(cell)
            model = self.models.of(row)
            row = self._by_these_weights(row, model)
            self._measure(model, row)
            low, high = row.interval
            self.say(f"{cell.name}: top-1 {row.top1:.2%} ({low:.2%} to {high:.2%}) on {row.images} images")
        return list(self.rows.values())

    def _by_these_weights(self, row: Row, model: nn.Module) -> Row:
        """``row``, or an empty one for the same cell if its answers are another model's."""
        weights = state_digest(model.state_dict())
        if row.hits and row.weights != weights:  # its folder is gone, and fitting again ended elsewhere
            self.say(f"{row.cell.name}: measured anew, the weights that gave its {len(row.hits)} answers are gone")
            row = Row(row.cell, seconds=row.seconds, note=row.note, fit=row.fit)
        row.weights = weights
        return row

    def _measure(self, model: nn.Module, row: Row) -> None:
        """Count, classify the images that are missing, and time."""
        sweep = self.sweep
        shape = sweep.batch_size, input_channels(self.dense), *self.size
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
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
            self.progress(label, done, len(batches))
            if done % SAVE_EVERY == 0 and row.images:
                self._keep(row)
        if not row.images:
            raise SparsifinerError(f"none of the {len(row.hits)} images can be read")
        if row.ms is None and sweep.repeats:
            self.progress(f"{row.cell.name}: speed", 0, 1)
            self._time(model, row, x)
            self.progress(f"{row.cell.name}: speed", 1, 1)
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
        return copy_model(self.dense).to(self.sweep.device, self.sweep.dtype)

    def _time(self, model: nn.Module, row: Row, x: Tensor) -> None:
        timings = compare_latency(self.dense_to_time, model, x, repeats=self.sweep.repeats, warmup=1)
        row.ms, row.dense_ms = (1e3 * seconds / len(x) for seconds in (timings.sparse_median, timings.dense_median))

    def _keep(self, row: Row) -> None:
        self.rows[row.cell] = row
        save_rows(self.folder, {"model": self.sweep.model, **self.common}, self.rows.values())
