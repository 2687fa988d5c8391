"""Images that a search is made on and others that judge it, with the dense model's features of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparsifinerError
from ..measure.fidelity import ImageFidelity, compare_features, final_features

Features = tuple[Tensor, "Tensor | None"]
"""Patches ``[1, n, C]`` and class token ``[1, C]`` or None, of one image."""


@dataclass
class Images:
    """Some images and what the dense model makes of them.

    Args:
        x: ``[n, 3, H, W]``, normalised.
        names: of the images.
        features: the dense model's, as many as were computed.
    """

    x: Tensor
    names: list[str]
    features: list[Features]

    def batch(self, number: int, size: int) -> Tensor:
        """The ``number``-th batch of ``size`` images; the last one is filled up with images from the start."""
        picked = torch.arange(number * size, (number + 1) * size) % len(self.x)
        return self.x[picked]

    def compare(
        self, model: nn.Module, batch: int = 1, *, until: Callable[[list[ImageFidelity]], bool] | None = None
    ) -> list[ImageFidelity]:
        """Fidelity of ``model`` on each image whose dense features are known.

        Args:
            model: has ``forward_features``.
            batch: images at once.
            until: asked after every batch whether that is enough.
        """
        found: list[ImageFidelity] = []
        count = len(self.features)
        for number in range(math.ceil(count / batch)):
            patches, classes = final_features(model, self.batch(number, batch))
            for row in range(min(batch, count - number * batch)):
                got = patches[row : row + 1], None if classes is None else classes[row : row + 1]
                place = number * batch + row
                found.append(compare_features(self.names[place], self.features[place], got))
            if until is not None and until(found):
                break
        return found

    def add_features(self, dense: nn.Module, number: int) -> None:
        """Compute the dense features of the image ``number``, the next one."""
        patches, classes = final_features(dense, self.x[number : number + 1])
        self.features.append((patches, classes))


def split_images(images: Any, names: list[str] | None = None) -> tuple[Images, Images]:
    """Images to tune on and images to judge by, in turn from a normalised tensor ``[n, 3, H, W]``.

    Raises:
        SparsifinerError: for what is no such tensor, fewer than two images, or values that are not finite.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"a tensor {list(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else repr(images)[:60]
        raise SparsifinerError(f"images must be a folder or a normalised float tensor [n, 3, height, width], got {got}")
    if len(images) < 2:
        raise SparsifinerError("tune needs at least 2 images: those that judge are others than those it tunes on")
    if not torch.isfinite(images).all():
        raise SparsifinerError("images hold numbers that are not finite; leave the broken ones out")
    names = [str(number) for number in range(len(images))] if names is None else names
    tuning, judging = range(0, len(images), 2), range(1, len(images), 2)

    def chosen(numbers: range) -> Images:
        return Images(images[list(numbers)], [names[number] for number in numbers], [])

    return chosen(tuning), chosen(judging)
