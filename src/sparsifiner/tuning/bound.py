"""The fidelity a tuned model must keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._utils.checks import number
from ..measure.fidelity import ImageFidelity


@dataclass(frozen=True)
class Bound:
    """A bound on the mean over images of how far final patch features may be from the dense model's.

    Args:
        min_cosine: least mean cosine, in (0, 1); None for no such bound.
        max_relative_l2: largest mean relative L2, above 0; None for no such bound.

    Raises:
        SparsifinerError: if a number is out of range.
    """

    min_cosine: float | None = 0.99
    max_relative_l2: float | None = None

    def __post_init__(self) -> None:
        number("min_cosine", self.min_cosine, above=0, most=1, optional=True)
        number("max_relative_l2", self.max_relative_l2, above=0, optional=True)

    def __str__(self) -> str:
        parts = [] if self.min_cosine is None else [f"mean cosine >= {self.min_cosine:g}"]
        parts += [] if self.max_relative_l2 is None else [f"mean relative L2 <= {self.max_relative_l2:g}"]
        return " and ".join(parts) or "no bound"

    def share(self, error: Error) -> float:
        """``error`` as a share of what is allowed, the largest of the parts; at most 1 within the bound."""
        parts = [0.0]
        if self.min_cosine is not None:
            parts.append(error.cosine / max(1 - self.min_cosine, 1e-9))
        if self.max_relative_l2 is not None:
            parts.append(error.l2 / self.max_relative_l2)
        return max(parts)


@dataclass(frozen=True)
class Error:
    """Mean distance from the dense model's features.

    Args:
        cosine: 1 less the cosine.
        l2: relative L2.
    """

    cosine: float
    l2: float

    @classmethod
    def of(cls, images: Sequence[ImageFidelity]) -> Error:
        """The mean over images."""
        count = len(images)
        return cls(
            sum(1 - image.patch_cosine for image in images) / count, sum(image.patch_l2 for image in images) / count
        )

    def plus(self, other: Error) -> Error:
        """The error of two independent causes together: squared distances add up."""
        return Error(self.cosine + other.cosine, (self.l2**2 + other.l2**2) ** 0.5)

    def scaled(self, factor: float) -> Error:
        """``factor`` times the squared distance."""
        return Error(self.cosine * factor, self.l2 * factor**0.5)
