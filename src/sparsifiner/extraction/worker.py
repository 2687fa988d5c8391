"""One model process: takes shards, decodes in processes of its own, and writes them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._utils.photos import preprocess
from ..errors import SparsifinerError
from ..measure.fidelity import final_features
from .images import ImageList, Prepared, one_thread
from .shards import ShardFormat, write_shard


@dataclass(frozen=True)
class Job:
    """What every shard of a job has in common.

    Args:
        folder: of the shards.
        images: all images.
        image_size: rows and columns in pixels.
        features: ``patch``, ``class`` or ``both``.
        form: file format of the shards.
        stored: numpy's name of the dtype on the disk.
        shard_size: images per shard.
        batch_size: images per forward pass.
        workers: processes that decode, for each model process; 0 decodes between the forward passes.
    """

    folder: Path
    images: ImageList
    image_size: tuple[int, int]
    features: str
    form: ShardFormat
    stored: str
    shard_size: int
    batch_size: int
    workers: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.images) // self.shard_size)

    def numbers(self, shard: int) -> range:
        """Numbers of the images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.images)))


@dataclass(frozen=True)
class ShardDone:
    """A shard that was written.

    Args:
        shard: its number.
        images: how many images it holds.
        unreadable: how many it leaves out.
        model_seconds: spent in forward passes.
        batches: forward passes.
    """

    shard: int
    images: int
    unreadable: int
    model_seconds: float
    batches: int


def run_shards(model: nn.Module, job: Job, shards: Iterable[int]) -> Iterator[ShardDone]:
    """Write ``shards``, one after the other; a batch that is not full is filled up, so that compiled models fit."""
    preparation = preprocess(model, job.image_size)
    for shard in shards:
        dataset = Prepared(job.images, job.numbers(shard), preparation)
        loader: Any = DataLoader(
            dataset, batch_size=job.batch_size, num_workers=job.workers, collate_fn=list,
            worker_init_fn=one_thread, prefetch_factor=2 if job.workers else None,
            multiprocessing_context="spawn" if job.workers else None,
        )  # fmt: skip
        names: list[str] = []
        parts: dict[str, list[numpy.ndarray]] = {}
        unreadable: dict[str, str] = {}
        seconds, batches = 0.0, 0
        for batch in loader:
            good = [(number, x) for number, x in batch if isinstance(x, Tensor)]
            unreadable.update({job.images.names[number]: x for number, x in batch if not isinstance(x, Tensor)})
            if not good:
                continue
            names += [job.images.names[number] for number, _ in good]
            started = time.perf_counter()
            found = features_of(model, torch.stack([x for _, x in good]), job)
            seconds, batches = seconds + time.perf_counter() - started, batches + 1
            for name, values in found.items():
                parts.setdefault(name, []).append(values)
        arrays = {name: numpy.concatenate(values) for name, values in parts.items()}
        write_shard(job.folder, shard, job.form, names, arrays, unreadable)
        yield ShardDone(shard, len(names), len(unreadable), seconds, batches)


def features_of(model: nn.Module, x: Tensor, job: Job) -> dict[str, numpy.ndarray]:
    """Features of images ``[b, 3, height, width]``, at most a batch, by name."""
    count = x.shape[0]
    if count < job.batch_size:
        x = torch.cat([x, x[-1:].expand(job.batch_size - count, -1, -1, -1)])
    parameter = next(model.parameters())
    patch, of_class = final_features(model, x.to(parameter.dtype))
    wanted: dict[str, Tensor] = {}
    if job.features in ("patch", "both"):
        wanted["patch"] = patch[:count]
    if job.features in ("class", "both"):
        if of_class is None:
            raise SparsifinerError("the model has no class token; ask for --features patch")
        wanted["class"] = of_class[:count]
    return {name: values.numpy().astype(job.stored) for name, values in wanted.items()}


def serve(
    load: Callable[[], nn.Module], job: Job, cores: list[int], shards: Any, results: Any
) -> None:  # pragma: no cover (in a process of its own)
    """A model process on ``cores``: takes numbers from the queue ``shards`` until there is None."""
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        model = load()
        for done in run_shards(model, job, iter(shards.get, None)):
            results.put(done)
        results.put(None)
    except BaseException as error:
        results.put(SparsifinerError(f"a model process stopped: {error}"))
