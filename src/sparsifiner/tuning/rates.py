"""Keep rates by layer: more keys where a layer's error reaches the final features most."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..calibration.budget import allocate, combine_images, layer_errors
from ..calibration.observation import Replay
from ..convert import sparse_layers

MEASURED = (0.02, 0.08, 0.3)
"""Keep rates at which every layer's error is measured; an average in between can be spread."""


class LayerRates:
    """The error each layer causes alone, and the keep rates of least error for an average.

    Args:
        sparse: a sparse model of the settings to measure with; it is copied.
    """

    def __init__(self, sparse: nn.Module) -> None:
        self._replay = Replay(copy.deepcopy(sparse))
        first = next(iter(sparse_layers(sparse).values()))
        self._candidates = first.grid.shape[0] * first.grid.shape[1]
        self._errors: list[Tensor] = []
        self._spread: dict[float, tuple[float, ...]] = {}

    def measure(self, x: Tensor) -> None:
        """Measure on one more image ``[1, 3, H, W]``."""
        self._errors.append(layer_errors(self._replay, x, MEASURED))
        self._spread = {}

    @property
    def measured(self) -> bool:
        return bool(self._errors)

    def of(self, average: float) -> float | tuple[float, ...]:
        """Rates by layer of that average; the average itself where it cannot be spread."""
        if not self._errors or not MEASURED[0] < average < MEASURED[-1]:
            return average
        average = round(average, 4)
        if average not in self._spread:
            squares = combine_images(torch.stack(self._errors), 1)
            self._spread[average] = allocate(squares, MEASURED, average, self._candidates)
        return self._spread[average]
