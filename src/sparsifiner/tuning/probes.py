"""Time and error of everything but attention, in each precision, from the first blocks of the dense model alone."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.latency import interleave_all
from ..runtime import ReadyModel, Runtime
from .bound import Error

BLOCKS = 2
"""Blocks of a probe; a whole model of twelve takes five times as long to compile."""


@dataclass
class Probe:
    """One precision of the model.

    Args:
        runtime: precision, and compilation as far as it works here.
        rest: seconds of a whole model without its attention.
        error: of the dense model in this precision, None until it is measured.
    """

    runtime: Runtime
    rest: float
    error: Error | None = None


def first_blocks(dense: nn.Module) -> tuple[nn.Module, float]:
    """A copy of ``dense`` with its first blocks alone, and how many times as many blocks the whole model has."""
    probe: Any = copy.deepcopy(dense)
    blocks = getattr(probe, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) <= BLOCKS:
        return probe, 1.0
    probe.blocks = blocks[:BLOCKS]
    return probe, len(blocks) / BLOCKS


def precision_of(runtime: Runtime) -> torch.dtype:
    """The dtype attention gets its inputs in."""
    return torch.bfloat16 if runtime.activations == "bfloat16" else torch.float32


def seconds_of(models: dict[str, Callable[[Tensor], Any]], x: Tensor, *, rounds: int, limit: float) -> dict[str, list]:
    """Interleaved seconds of each model on ``x``, at most ``rounds`` runs and about ``limit`` seconds in all."""
    with torch.inference_mode():
        work = {name: partial(run, x) for name, run in models.items()}
        return interleave_all(work, repeats=rounds, warmup=1, max_seconds=limit, min_repeats=2)


def time_rest(ready: ReadyModel, x: Tensor, factor: float, attention: float) -> float:
    """Seconds of a whole model without attention.

    Args:
        ready: the first blocks, dense, prepared and compiled.
        x: a batch of images.
        factor: blocks of the whole model by those of ``ready``.
        attention: seconds of dense attention in all layers of the whole model.
    """
    times = seconds_of({"probe": ready.forward_features}, x, rounds=5, limit=3.0)["probe"]
    return max(factor * statistics.median(times) - attention, 0.05 * attention)
