"""The size from which on a sparse attention layer beats dense attention on this machine, measured."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attention.layer import SparseAttention
from ..attention.policy import Policy
from ..convert import sparse_layers
from ..geometry.patch_grid import PatchGrid
from .latency import Progress, interleave

NEVER_WITH_BIAS = (
    "attention layers that add a bias to the logits use the gather backend, which is not faster than dense attention"
)


@dataclass(frozen=True)
class BreakEvenPoint:
    """One attention layer at one token count, seconds per image (medians of interleaved runs)."""

    num_tokens: int
    image_size: int
    dense_s: float
    sparse_s: float


@dataclass(frozen=True)
class BreakEven:
    """From which size on a sparse attention layer beats dense attention on this machine.

    Args:
        points: what was measured, by growing token count.
        num_tokens: the smallest measured token count from which sparse won at every measured size; None if
            it did not win at the largest.
        image_size: side of the square image that has so many patches, pixels.
        max_tokens: the largest token count measured.
        max_image_size: its image side, pixels.
    """

    points: list[BreakEvenPoint]
    num_tokens: int | None
    image_size: int | None
    max_tokens: int
    max_image_size: int

    @property
    def reached(self) -> bool:
        return self.num_tokens is not None

    def __str__(self) -> str:
        if self.reached:
            return f"one attention layer is faster sparse from {self.num_tokens} tokens ({self.image_size} px)"
        return (
            f"one attention layer was not faster sparse up to {self.max_tokens} tokens ({self.max_image_size} px), "
            f"the largest size measured"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, seconds and pixels."""
        return {
            "num_tokens": self.num_tokens,
            "image_size": self.image_size,
            "max_tokens": self.max_tokens,
            "max_image_size": self.max_image_size,
            "points": [vars(point) for point in self.points],
        }


def break_even(
    sparse: nn.Module,
    *,
    max_tokens: int = 16384,
    max_seconds: float = 60.0,
    repeats: int = 5,
    progress: Progress | None = None,
) -> BreakEven | None:
    """Find from which token count a sparse attention layer beats dense attention on this machine.

    Measures the first sparse layer of ``sparse`` (prediction, selection, pooling, tail and attention) against
    ``scaled_dot_product_attention`` on the same random q, k, v, laid out as the packed projection leaves them, at
    the dtype and device of the layer and batch 1. Token counts grow by about 1.5 from 14 x 14 patches on; the
    interval in which sparse begins to win is then halved twice. Projections and MLP cost both sides the same.
    On a machine that is busy with other work sparse looks worse than it is: it is many small parallel steps, each
    of which waits for the slowest thread.

    Args:
        sparse: a sparse model.
        max_tokens: largest token count to try.
        max_seconds: no larger size is started after so many seconds, nor one expected to exceed them.
        repeats: pairs of runs per size.
        progress: called with the token count measured last and ``max_tokens``.

    Returns:
        What was found; None, unmeasured, where the layer adds a bias to the logits (:data:`NEVER_WITH_BIAS`).

    Raises:
        ValueError: if no layer of ``sparse`` is sparse.
    """
    layer = next(iter(sparse_layers(sparse).values()))
    if layer.takes_bias:
        return None
    layer = copy.deepcopy(layer).eval()
    layer.grid = PatchGrid(layer.grid.shape, layer.grid.patch_size, layer.grid.num_prefix_tokens)
    layer.override = Policy("sparse")
    side, start, sides = 14, time.perf_counter(), []
    while side**2 <= max_tokens:
        sides.append(side)
        side = math.ceil(side * 1.5**0.5 / 2) * 2
    if sides and sides[-1] != math.isqrt(max_tokens):
        sides.append(math.isqrt(max_tokens))
    sides = [side for side in sides if _fits(layer, side)] or [math.isqrt(max_tokens)]
    points: dict[int, BreakEvenPoint] = {}

    def measure(side: int) -> None:
        points[side] = _measure_layer(layer, side, repeats)
        if progress is not None:
            progress(points[side].num_tokens, max_tokens)

    for number, side in enumerate(sides):
        before = time.perf_counter()
        measure(side)
        spent = time.perf_counter() - before
        growth = (sides[number + 1] / side) ** 4 if number + 1 < len(sides) else 1.0
        if time.perf_counter() - start + spent * growth > max_seconds:
            break
    for _ in range(2):
        first = _first_win(points)
        below = [side for side in points if first is not None and side < first]
        if first is None or not below or first - max(below) < 4 or time.perf_counter() - start > max_seconds:
            break
        measure((first + max(below)) // 2)
    first = _first_win(points)
    ordered = [points[side] for side in sorted(points)]
    won = None if first is None else points[first]
    return BreakEven(
        points=ordered,
        num_tokens=None if won is None else won.num_tokens,
        image_size=None if won is None else won.image_size,
        max_tokens=ordered[-1].num_tokens,
        max_image_size=ordered[-1].image_size,
    )


def _first_win(points: Mapping[int, BreakEvenPoint]) -> int | None:
    """The smallest size from which sparse was faster at every size measured."""
    first = None
    for side in sorted(points, reverse=True):
        if points[side].sparse_s >= points[side].dense_s:
            break
        first = side
    return first


def _measure_layer(layer: SparseAttention, side: int, repeats: int) -> BreakEvenPoint:
    num_tokens = layer.grid.num_prefix_tokens + side**2
    heads, width = layer.num_heads, layer.head_width()
    weight = next(layer.parameters())
    generator = torch.Generator(device=weight.device).manual_seed(0)
    packed = torch.randn(1, num_tokens, 3, heads, width, generator=generator, device=weight.device, dtype=weight.dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    layer.grid.shape = (side, side)
    with torch.inference_mode():
        timings = interleave(
            lambda: F.scaled_dot_product_attention(q, k, v, scale=layer.scale).transpose(1, 2).flatten(2),
            lambda: layer.attend(q, k, v).transpose(1, 2).flatten(2),
            repeats=repeats,
            warmup=1,
        )
    patch = layer.grid.patch_size
    return BreakEvenPoint(num_tokens, side * max(patch), timings.dense_median, timings.sparse_median)


def _fits(layer: SparseAttention, side: int) -> bool:
    """True where tiles and tail blocks fit a grid of ``side`` x ``side`` patches."""
    return all(side >= max(rectangle) for rectangle in layer.config.rectangles)
