"""One point of a sweep: what it is, and what was measured of it."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from .._utils.checks import choose, number, text
from .._utils.messages import shown
from ..calibration.fit import has_something_to_fit
from ..config import check_keep_rate
from ..errors import SparsifinerError
from ..measure.accuracy import paired_drop, wilson_interval
from ..methods import find_method

STAGES = ("training-free", "calibrated", "fine-tuned")


@dataclass(frozen=True)
class Cell:
    """A method at one keep rate, with or without fitting.

    Args:
        method: a name of :data:`sparsifiner.methods.METHODS`.
        keep_rate: in (0, 1]; what it means depends on the method.
        stage: one of :data:`STAGES`.
    """

    method: str
    keep_rate: float
    stage: str = "training-free"

    def __post_init__(self) -> None:
        find_method(self.method)
        choose("stage", self.stage, STAGES)

    @property
    def name(self) -> str:
        """Also that of its folder."""
        return f"{self.method}-{self.keep_rate:g}-{self.stage}"

    @property
    def calibratable(self) -> bool:
        """True for sparse attention with a predictor or a tail to fit."""
        config = find_method(self.method).config
        return config is not None and has_something_to_fit(config(self.keep_rate))

    @property
    def learns_predictor(self) -> bool:
        """True for predictors with weights."""
        config = find_method(self.method).config
        return config is not None and config(self.keep_rate).predictor.learned


DENSE = Cell("dense", 1.0)
"""The model that a sweep starts from, as it is: what all others are compared with."""


@dataclass
class Row:
    """Measurements of a cell. Images come in one order for all cells, so rows compare image by image.

    Args:
        cell: what was measured.
        hits: for the images so far, in the order of the sweep, whether their class came first.
        missing: places among them of images that could not be read; they count nowhere.
        mhsa_macs: multiply-adds per image as the paper counts them (:attr:`FlopReport.mhsa_macs`).
        mhsa_full_macs: the same with every product of the predictor.
        total_macs: of the whole model.
        ms: milliseconds per image, or None if not measured.
        dense_ms: of the dense model, in runs that alternated with these.
        seconds: wall-clock cost of calibrating or training.
        note: what was different from the other cells.
        weights: digest of the state dict that gave the answers; a row goes on with no other.
        fit: of a cell that was fitted: digests of the model it started from and of the training images, and the recipe.
    """

    cell: Cell
    hits: list[bool] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    mhsa_macs: int = 0
    mhsa_full_macs: int = 0
    total_macs: int = 0
    ms: float | None = None
    dense_ms: float | None = None
    seconds: float = 0.0
    note: str = ""
    weights: str = ""
    fit: dict[str, Any] | None = None

    @property
    def images(self) -> int:
        """Number of images that were classified."""
        return len(self.hits) - len(self.missing)

    @property
    def top1(self) -> float:
        """Share of the images whose class came first."""
        return sum(self.hits) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Of :attr:`top1`, 95 %, by Wilson."""
        return wilson_interval(sum(self.hits), self.images)

    def drop_from(self, other: Row) -> tuple[float, tuple[float, float]]:
        """Drop in accuracy against ``other`` on the images both have seen, with its 95 % interval."""
        count = min(len(self.hits), len(other.hits))
        gone = {*self.missing, *other.missing}
        kept = [place for place in range(count) if place not in gone]
        return paired_drop(torch.tensor(other.hits)[kept], torch.tensor(self.hits)[kept])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the hits as base64 of packed bits."""
        values = {name: value for name, value in vars(self).items() if name not in ("cell", "hits")}
        return {**asdict(self.cell), **values, "count": len(self.hits), "hits": _pack(self.hits)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`.

        Raises:
            SparsifinerError: if a value is of another kind.
        """
        values = dict(values)
        for name in ("count", "mhsa_macs", "mhsa_full_macs", "total_macs"):
            number(name, values.get(name, 0), least=0, integer=True)
        for name in ("ms", "dense_ms"):
            number(name, values.get(name), least=0, optional=True)
        number("seconds", values.get("seconds", 0), least=0)
        for name in ("hits", "note", "weights"):
            text(name, values.get(name, ""))
        if not isinstance(values.get("fit"), (dict, type(None))):
            raise SparsifinerError(f"fit must be named values or null, got {shown(values['fit'])}")
        missing = values.get("missing", [])
        if not isinstance(missing, list):
            raise SparsifinerError(f"missing must be numbers of images, got {shown(missing)}")
        for place in missing:
            number("missing", place, least=0, most=values["count"] - 1, integer=True)
        check_keep_rate(values["keep_rate"])
        cell = Cell(**{name: values.pop(name) for name in ("method", "keep_rate", "stage")})
        return cls(cell, _unpack(values.pop("hits"), values.pop("count")), **values)


def _pack(hits: list[bool]) -> str:
    return base64.b64encode(numpy.packbits(numpy.array(hits, dtype=bool)).tobytes()).decode()


def _unpack(hits: str, count: int) -> list[bool]:
    packed = numpy.frombuffer(base64.b64decode(hits), dtype=numpy.uint8)
    if not 0 <= 8 * len(packed) - count < 8:
        raise SparsifinerError(f"hits hold {8 * len(packed)} answers, not {count}")
    bits = numpy.unpackbits(packed, count=count)
    return [bool(bit) for bit in bits]


def image_order(length: int, seed: int) -> Tensor:
    """Numbers of all images in random order, so that the first of them are a fair sample, ``[length]``."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
