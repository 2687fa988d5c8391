"""``extract``: features of many images into shards; goes on where it was stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._utils.checks import choose, number
from .._utils.files import make_folder, write_atomically
from .._utils.messages import LOGGER
from .._utils.photos import preprocess
from ..attention.policy import Policy
from ..convert import is_sparse, set_keep_rate, sparsify, use_policy
from ..errors import SparsifinerError
from ..models import load_model
from .images import ImageList, list_images
from .shards import check_format, shard_files, unreadable_images
from .worker import Job, ShardDone, features_of, run_shards, serve

MANIFEST = "extraction.json"
FEATURES = ("patch", "class", "both")
STORED = ("float16", "float32")


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of a bulk job.

    Args:
        model: name or folder, as for ``load_model``; a folder of ``save_pretrained`` or of tuning is used as it is.
        keep_rate: of a model that is not sparse yet, or instead of a saved one's; 0.1 if None.
        dense: run the model as it is, not sparse.
        image_size: rows and columns in pixels; the model's own if None.
        features: ``patch``, ``class`` or ``both``: final tokens, after the last norm.
        format: of the shards: ``parquet``, ``safetensors`` or ``zarr``.
        stored: dtype on the disk.
        shard_size: images per shard.
        batch_size: images per forward pass.
        workers: decoding processes for each model process; 0 decodes in the model process.
        processes: model processes, each on cores of its own.
    """

    model: str = "builtin"
    keep_rate: float | None = None
    dense: bool = False
    image_size: tuple[int, int] | None = None
    features: str = "patch"
    format: str = "safetensors"
    stored: str = "float16"
    shard_size: int = 64
    batch_size: int = 1
    workers: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        choose("features", self.features, FEATURES)
        choose("stored", self.stored, STORED)
        for name, least in (("shard_size", 1), ("batch_size", 1), ("workers", 0), ("processes", 1)):
            number(name, getattr(self, name), least=least, integer=True)

    def identity(self, images: ImageList, size: tuple[int, int]) -> dict[str, Any]:
        """What two runs must share so that the second may go on with the first one's shards."""
        names = ("model", "keep_rate", "dense", "features", "format", "stored", "shard_size")
        return {
            **{name: getattr(self, name) for name in names},
            "image_size": list(size),
            "images": len(images),
            "names": images.digest(),
        }


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Args:
        images: in all shards now.
        new: in the shards of this run.
        skipped_shards: shards that were there already.
        unreadable: reason by name.
        seconds: of this run, without loading the model.
        dense_seconds: what the dense model would have taken for this run's images, measured on a sample; None where
            the model is dense, or nothing was left to do.
    """

    images: int
    new: int
    skipped_shards: int
    unreadable: dict[str, str]
    seconds: float
    dense_seconds: float | None

    def __str__(self) -> str:
        lines = [f"{name}: {reason}" for name, reason in self.unreadable.items()]
        if lines:
            lines.insert(0, f"{len(lines)} images cannot be read:")
        rate = f", {self.new / self.seconds:.2f} images/s" if self.new and self.seconds > 0 else ""
        lines.append(f"{self.images} images done, {self.new} of them now in {duration(self.seconds)}{rate}")
        if self.dense_seconds is not None:
            lines.append(
                f"the dense model would have taken {duration(self.dense_seconds)} for these, "
                f"{self.dense_seconds / self.seconds:.2f} times as long (measured on a sample)"
            )
        return "\n".join(lines)


def extract(
    images: str | Path,
    folder: str | Path,
    config: ExtractConfig | None = None,
    *,
    say: Callable[[str], object] = LOGGER.info,
) -> Summary:
    """Write features of ``images`` as shards in ``folder``; what is there from an earlier run is not done again.

    Args:
        images: a folder, a list file, or ``hf/NAME``, as in :func:`list_images`.
        folder: of the shards; ``read_shard`` reads them.
        config: the job's settings.
        say: called with a line of progress now and then.

    Raises:
        SparsifinerError: if there are no images, or ``folder`` holds another job.
    """
    config, folder = config or ExtractConfig(), Path(folder)
    form, listed = check_format(config.format), list_images(images)
    model = _load(config)
    size = config.image_size or _own_size(model)
    _claim(folder, config.identity(listed, size))
    job = Job(
        folder, listed, size, config.features, form, config.stored, config.shard_size, config.batch_size, config.workers
    )
    left = [shard for shard in range(job.num_shards) if not shard_files(folder, shard, form)[0].is_file()]
    skipped = job.num_shards - len(left)
    if skipped:
        say(f"{skipped} of {job.num_shards} shards are done already")
    started, new, model_seconds, batches, last = time.perf_counter(), 0, 0.0, 0, 0.0
    total = sum(len(job.numbers(shard)) for shard in left)
    seen = 0
    work = run_shards(model, job, left) if config.processes == 1 else _in_processes(config, job, left)
    for done in work:
        new, seen = new + done.images, seen + done.images + done.unreadable
        model_seconds, batches = model_seconds + done.model_seconds, batches + done.batches
        passed = time.perf_counter() - started
        if passed - last > 1 or seen == total:
            last = passed
            rest = duration(passed / seen * (total - seen))
            say(f"{seen} of {total} images, {seen / passed:.2f} images/s, {rest} left")
    seconds = time.perf_counter() - started
    dense_seconds = None
    if batches and is_sparse(model):
        # As many processes at a time did the forward passes.
        gain = _dense_share(model, job)
        dense_seconds = seconds + (gain - 1) * model_seconds / config.processes
    unreadable = unreadable_images(folder, range(job.num_shards), form)
    return Summary(len(listed) - len(unreadable), new, skipped, unreadable, seconds, dense_seconds)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _load(config: ExtractConfig) -> nn.Module:
    model = load_model(config.model, img_size=config.image_size)
    if is_sparse(model):
        if config.dense:
            raise SparsifinerError(f"{config.model} is a sparse model; name the dense one it was made from")
        if config.keep_rate is not None:
            set_keep_rate(model, config.keep_rate)
        return model
    return model if config.dense else sparsify(model, keep_rate=config.keep_rate, inplace=True)


def _own_size(model: Any) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        raise SparsifinerError(f"{type(model).__name__} has no image size of its own; name one with --img-size")
    return (size[0], size[1])


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Note whose shards ``folder`` holds; refuse another job's."""
    file = folder / MANIFEST
    if file.is_file():
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise SparsifinerError(f"{file} is damaged; remove the folder, or name another") from error
        for name, value in identity.items():
            if before.get(name) != value:
                what = "other images" if name in ("images", "names") else f"{name}={before.get(name)!r}, not {value!r}"
                raise SparsifinerError(f"{folder} holds a job with {what}; name another folder, or the same settings")
        return
    make_folder(folder)
    write_atomically(file, json.dumps(identity, indent=1) + "\n")


def _dense_share(model: nn.Module, job: Job, most: int = 3) -> float:
    """Time of dense forward passes over sparse ones, from a few batches one after the other."""
    preparation, batch = preprocess(model, job.image_size), []
    for image in range(len(job.images)):
        try:
            batch.append(preparation(job.images.read(image)))
        except Exception:  # listed as unreadable already
            continue
        if len(batch) == job.batch_size:
            break
    x = torch.stack(batch)

    def run(mode: Any) -> float:
        started = time.perf_counter()
        if mode is None:
            features_of(model, x, job)
        else:
            with use_policy(getattr(model, "source", model), mode):
                features_of(getattr(model, "source", model), x, job)
        return time.perf_counter() - started

    dense, sparse = [], []
    for _ in range(most):
        sparse.append(run(None))
        dense.append(run(Policy("dense")))
    return min(dense) / min(sparse)


def _in_processes(config: ExtractConfig, job: Job, shards: list[int]) -> Iterator[ShardDone]:
    """The shards from several model processes, each on cores of its own, in the order in which they are done."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    count = min(config.processes, len(cores), max(1, len(shards)))
    groups = [cores[first::count] for first in range(count)]
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    results: Any = context.Queue()
    for shard in [*shards, *[None] * count]:
        todo.put(shard)
    environment = {"OMP_NUM_THREADS": str(max(len(group) for group in groups))}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # read when a process loads its OpenMP library
    processes = [
        context.Process(target=serve, args=(partial(_load, config), job, group, todo, results)) for group in groups
    ]
    try:
        for process in processes:
            process.start()
        running = count
        while running:
            try:
                found = results.get(timeout=1)
            except queue.Empty:
                if any(process.exitcode not in (None, 0) for process in processes):
                    raise SparsifinerError(
                        "a model process was killed, perhaps for want of memory; the shards that are done stay, and "
                        "the same command goes on from them"
                    ) from None
                continue
            if isinstance(found, Exception):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
