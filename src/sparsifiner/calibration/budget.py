"""Keep rates per layer under one budget, from the measured error that each layer alone causes."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..convert import sparse_layers
from ..geometry.counting import num_kept
from .observation import Replay, dense_attention, sparse_again

STEPS = (1 / 3, 1.0, 3.0)
"""Measured keep rates, relative to the budget."""


def measured_rates(budget: float) -> tuple[float, ...]:
    """The keep rates at which every layer is measured, rising; a layer gets none outside their range."""
    return tuple(sorted({min(1.0, budget * step) for step in STEPS}))


def layer_errors(replay: Replay, x: Tensor, rates: Sequence[float]) -> Tensor:
    """Relative L2 error of the final tokens with one layer sparse and the others dense, float64 ``[L, rates]``.

    Args:
        replay: around a copy of the sparse model; the keep rates of its layers are changed.
        x: one image ``[1, 3, height, width]``.
        rates: keep rates to measure.
    """
    layers = sparse_layers(replay.model)
    errors = torch.zeros(len(layers), len(rates), dtype=torch.float64)
    with torch.no_grad(), dense_attention(layers):
        dense = replay.start(x).float()
        for number, layer in enumerate(layers.values()):
            with sparse_again(layer):
                for column, rate in enumerate(rates):
                    layer.configure(layer.config.replace(keep_rate=rate))
                    errors[number, column] = ((replay.run(number).float() - dense).norm() / dense.norm()).item()
    return errors


def combine_images(errors: Tensor, middle: int) -> Tensor:
    """Squared errors ``[L, rates]`` of all images, from ``[images, L, rates]``.

    Errors of different layers add up like independent ones, in squares. Each image is weighted by the inverse of
    its own total, so that a step along the sum is one along the mean relative error, which the images with the
    largest errors would otherwise decide alone.

    Args:
        errors: as from :func:`layer_errors`, one per image.
        middle: column of the budget itself.
    """
    squares = errors.square()
    total = squares[:, :, middle].sum(1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (squares / total[:, None, None]).mean(0)


def allocate(squares: Tensor, rates: Sequence[float], budget: float, candidates: int) -> tuple[float, ...]:
    """Keep rates of least total error that list as many keys as ``budget`` does for every layer.

    Each layer's error between measured rates is interpolated linearly in logarithms and replaced by its lower
    convex hull, on which giving every next key to the layer that gains most is optimal.

    Args:
        squares: squared errors ``[L, rates]``.
        rates: where they were measured, rising.
        budget: mean keep rate.
        candidates: keys a tile chooses from.

    Returns:
        One rate per layer; ``ceil(rate * candidates)`` summed over the layers is
        ``L * ceil(budget * candidates)``.
    """
    counts = [num_kept(rate, candidates) for rate in rates]
    low, high = counts[0], counts[-1]
    target = len(squares) * num_kept(budget, candidates)
    gains = [_gains(_curve(row, counts)) for row in squares]
    given = [low] * len(squares)
    queue = [(-gain[0], number) for number, gain in enumerate(gains) if len(gain)]
    heapq.heapify(queue)
    for _ in range(target - low * len(squares)):
        _, number = heapq.heappop(queue)
        given[number] += 1
        if given[number] < high:
            heapq.heappush(queue, (-gains[number][given[number] - low], number))
    return tuple(_rate(count, candidates) for count in given)


def _curve(squares: Tensor, counts: Sequence[int]) -> list[float]:
    """Errors at every whole number of keys from the first of ``counts`` to the last."""
    logs = squares.clamp(min=1e-30).log().cummin(0).values.tolist()
    curve = [math.exp(logs[0])]
    for (left, right), (start, stop) in zip(itertools.pairwise(counts), itertools.pairwise(logs), strict=True):
        for count in range(left + 1, right + 1):
            share = math.log(count / left) / math.log(right / left)
            curve.append(math.exp(start + share * (stop - start)))
    return curve


def _gains(curve: list[float]) -> list[float]:
    """Gain of each further key along the lower convex hull of ``curve``; never rising."""
    hull: list[int] = []
    for point in range(len(curve)):
        while len(hull) >= 2 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-1], point):
            hull.pop()
        hull.append(point)
    gains: list[float] = []
    for left, right in itertools.pairwise(hull):
        gains += [-_slope(curve, left, right)] * (right - left)
    return gains


def _slope(curve: list[float], left: int, right: int) -> float:
    return (curve[right] - curve[left]) / (right - left)


def _rate(count: int, candidates: int) -> float:
    """A rate of few digits for which ``ceil(rate * candidates)`` is ``count``."""
    for digits in range(2, 17):
        rate = math.floor(count / candidates * 10**digits) / 10**digits
        if rate > 0 and num_kept(rate, candidates) == count:
            return rate
    return (count - 0.5) / candidates
