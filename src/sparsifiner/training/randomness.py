"""Randomness as a function of position: the same step draws the same numbers, resumed or not."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_of(*position: int | float | str) -> int:
    """A seed for a place in the run, such as (seed, phase, step, process); 63 bits."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(*position: int | float | str) -> Iterator[None]:
    """Python's, numpy's and torch's generators as a function of ``position``; afterwards as they were."""
    seed = seed_of(*position)
    on_gpu = torch.cuda.is_initialized()  # never in a process that decodes images
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if on_gpu else None
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if on_gpu:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Ask torch for operators that give the same bits each time; one that has none warns. Then as it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    benchmark, fill = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        memory.fill_uninitialized_memory = False  # nothing here reads unwritten memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill
