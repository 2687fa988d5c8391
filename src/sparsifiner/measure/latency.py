"""Measured latency: things that are to be compared run in turn, in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is at most."""


@dataclass(frozen=True)
class Timings:
    """Seconds of two things measured in turn: dense, sparse, dense, sparse, ...

    Args:
        dense: seconds of each dense run.
        sparse: seconds of each sparse run, the partner of the dense run at the same place.
    """

    dense: list[float]
    sparse: list[float]

    @property
    def dense_median(self) -> float:
        """Seconds."""
        return statistics.median(self.dense)

    @property
    def sparse_median(self) -> float:
        """Seconds."""
        return statistics.median(self.sparse)

    @property
    def speedup(self) -> float:
        """Median dense over median sparse; above 1 sparse is faster."""
        return self.dense_median / self.sparse_median

    @property
    def paired_speedup(self) -> float:
        """Median of the ratios of neighbouring runs, which slow drifts of the machine leave alone."""
        return statistics.median(d / s for d, s in zip(self.dense, self.sparse, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, seconds."""
        return {
            "dense_median_s": self.dense_median,
            "sparse_median_s": self.sparse_median,
            "speedup": self.speedup,
            "paired_speedup": self.paired_speedup,
            "dense_s": self.dense,
            "sparse_s": self.sparse,
        }


def interleave(
    dense: Callable[[], object],
    sparse: Callable[[], object],
    *,
    repeats: int = 9,
    warmup: int = 2,
    max_seconds: float = math.inf,
    min_repeats: int = 3,
    progress: Progress | None = None,
) -> Timings:
    """Run two callables in turn and time each run; arguments as in :func:`interleave_all`.

    Args:
        dense: the first of each pair.
        sparse: the second.
    """
    times = interleave_all(
        {"dense": dense, "sparse": sparse},
        repeats=repeats,
        warmup=warmup,
        max_seconds=max_seconds,
        min_repeats=min_repeats,
        progress=progress,
    )
    return Timings(times["dense"], times["sparse"])


def interleave_all(
    work: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 9,
    warmup: int = 2,
    max_seconds: float = math.inf,
    min_repeats: int = 3,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Run callables in turn, round after round, and time each run, seconds by name; a GPU is waited for.

    Args:
        work: what to run, by name.
        repeats: rounds to time.
        warmup: rounds to run before, not timed.
        max_seconds: no further round is started after so many seconds, warm-up included...
        min_repeats: ...but so many rounds are timed in any case.
        progress: called with the rounds timed and ``repeats``.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    start = time.perf_counter()
    for number in range(warmup):
        for run in work.values():
            run()
        if time.perf_counter() - start > max_seconds / 3 and number + 1 < warmup:
            break
    for number in range(repeats):
        if number >= min_repeats and time.perf_counter() - start > max_seconds:
            break
        for name, run in work.items():
            _synchronise()
            before = time.perf_counter()
            run()
            _synchronise()
            times[name].append(time.perf_counter() - before)
        if progress is not None:
            progress(number + 1, repeats)
    return times


def compare_latency(dense: nn.Module, sparse: nn.Module, x: Tensor, **settings: Any) -> Timings:
    """Latency of ``dense(x)`` and ``sparse(x)`` without gradients, interleaved.

    Args:
        dense: a model, in evaluation mode.
        sparse: its sparse version.
        x: images ``[B, 3, height, width]`` on the models' device.
        settings: those of :func:`interleave`.
    """
    with torch.inference_mode():
        return interleave(lambda: dense(x), lambda: sparse(x), **settings)


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
