"""Whole models of a search: prepared, compiled within the time there is, measured beside the dense model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..convert import sparsify
from ..errors import SparsifinerError
from ..measure.fidelity import Fidelity
from ..runtime import ReadyModel, prepare
from .bound import Bound, Error
from .clock import Clock
from .images import Images
from .probes import seconds_of
from .space import Candidate

RESERVE = 0.01
"""Share of all time that is left for stopping a compilation and what follows."""


class NoTime(Exception):
    """What was to be done would have ended after the time limit."""


@dataclass(eq=False)
class WholeModel:
    """A model that was run.

    Args:
        candidate: its settings.
        model: ready to run; None for the dense model as it was given, or where it was let go.
        seconds: of its runs.
        dense: seconds of the dense float32 runs between them.
        fidelity: on the images that judge; None for the dense model itself.
        error: on the tuning images, likewise.
        share: of the allowed error, on the images that judge.
        label: a name of its own, for what ``candidate`` does not describe.
        rival: it is only measured beside the others and never the result.
    """

    candidate: Candidate
    model: nn.Module | None
    seconds: list[float]
    dense: list[float]
    fidelity: Fidelity | None = None
    error: Error | None = None
    share: float = 0.0
    label: str = ""
    rival: bool = False

    @property
    def name(self) -> str:
        return self.label or str(self.candidate)

    @property
    def within(self) -> bool:
        """True if its fidelity is within the bound."""
        return self.share <= 1

    @property
    def speedup(self) -> float:
        """Dense float32 median over its own."""
        return statistics.median(self.dense) / statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, seconds."""
        return {
            "name": self.name,
            **self.candidate.to_dict(),
            "median_s": statistics.median(self.seconds),
            "dense_median_s": statistics.median(self.dense),
            "speedup": self.speedup,
            "within_bound": self.within,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "rival": self.rival,
        }


def compiled(
    model: nn.Module, candidate: Candidate, x: Tensor, clock: Clock, kind: str, *, until: float,
    meanwhile: Callable[[], bool] | None = None,
) -> ReadyModel:  # fmt: skip
    """``model`` as the candidate's runtime wants it, compiled for ``x``.

    Args:
        model: dense or sparse, in its own precision.
        candidate: its settings.
        x: a batch of images.
        clock: of the search.
        kind: of compilation, whose time is remembered.
        until: seconds of the clock by which it must be done.
        meanwhile: called again and again while another process compiles, until it returns False.

    Raises:
        NoTime: if it would end too late, or did.
        SparsifinerError: if it cannot be quantised or compiled, with the reason.
    """
    ready = prepare(model, candidate.runtime)
    if candidate.runtime.compilation == "none":
        return ready
    until -= RESERVE * clock.max_seconds
    left = until - clock.elapsed
    if clock.estimate(kind, 0.0) > left:
        raise NoTime(f"compiling takes {clock.estimate(kind, 0.0):.0f} s")
    start = time.monotonic()
    if candidate.runtime.compilation != "ahead":
        with clock.timing(kind):
            ready.compile_for(x)
        return ready
    try:
        process = ready.start_compiling(x)
    except SparsifinerError:  # it cannot be handed to another process
        if clock.estimate(kind, 60.0) > left:
            raise NoTime("it can only be compiled in this process, which cannot be stopped") from None
        with clock.timing(kind):
            ready.compile_for(x)
        return ready
    try:
        busy = meanwhile is not None
        while not process.done() and until > clock.elapsed:
            busy = busy and meanwhile is not None and meanwhile()
            if not busy:
                time.sleep(0.1)
        ready.adopt(process.result(timeout=0.5), x)
    except TimeoutError as error:
        clock.note(kind, time.monotonic() - start)
        raise NoTime(str(error)) from error
    finally:
        process.stop()
    clock.note(kind, time.monotonic() - start)
    return ready


def converted(dense: nn.Module, candidate: Candidate) -> nn.Module:
    """The dense model, sparse where the candidate is."""
    return dense if candidate.config is None else sparsify(dense, candidate.config)


def measured(
    ready: nn.Module, candidate: Candidate, dense: nn.Module, tuning: Images, judging: Images, batch: int, bound: Bound,
    *, rounds: int = 5, limit: float = 15.0,
) -> WholeModel:  # fmt: skip
    """Time beside dense float32 in turn, and fidelity on both sets of images."""
    x = judging.batch(0, batch)
    times = seconds_of({"dense": dense, "this": ready}, x, rounds=rounds, limit=limit)
    images = judging.compare(ready, batch)
    error = Error.of(tuning.compare(ready, batch))
    return WholeModel(
        candidate, ready, times["this"], times["dense"], Fidelity(images, {}), error, bound.share(Error.of(images)),
    )  # fmt: skip
