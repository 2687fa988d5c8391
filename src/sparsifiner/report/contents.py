"""Contents of a report: one case per image size and keep rate, dense beside sparse."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..measure.crossover import BreakEven
from ..measure.fidelity import Fidelity
from ..measure.flops import FlopReport
from ..measure.latency import Timings
from ..measure.memory import PeakMemory
from .machine import Machine

FORMAT = 1
_TIE = 0.03  # medians closer than this are called equal


@dataclass(frozen=True)
class Fast:
    """The same model in the fastest form that needs no search, beside the dense float32 model.

    Args:
        name: in words: precision, tiles, compilation.
        runtime: of the model, as plain values.
        config: settings of its sparse attention.
        fidelity: of the final features, over all images.
        latency: interleaved with dense float32 runs, None if not measured.
    """

    name: str
    runtime: dict[str, Any]
    config: dict[str, Any]
    fidelity: Fidelity
    latency: Timings | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "runtime": self.runtime,
            "config": self.config,
            "fidelity": self.fidelity.to_dict(),
            "latency": None if self.latency is None else self.latency.to_dict(),
        }


@dataclass(frozen=True)
class Case:
    """One image size and one keep rate.

    Args:
        image_size: rows and columns in pixels.
        grid: rows and columns of patches.
        num_tokens: prefix tokens and patches.
        keep_rate: one for all layers, or one per layer.
        config: settings of the sparse model.
        fidelity: of the final features, over all images.
        flops_dense: MACs of the dense model.
        flops_sparse: MACs of the sparse one.
        latency: interleaved runs, None if not measured.
        memory_dense: None if it could not be measured; ``notes`` says why.
        memory_sparse: likewise.
        break_even: of one attention layer at this keep rate, None if not measured.
        pictures: file names.
        fast: the fast form of the same model, None where there is none.
    """

    image_size: tuple[int, int]
    grid: tuple[int, int]
    num_tokens: int
    keep_rate: float | tuple[float, ...]
    config: dict[str, Any]
    fidelity: Fidelity
    flops_dense: FlopReport
    flops_sparse: FlopReport
    latency: Timings | None = None
    memory_dense: PeakMemory | None = None
    memory_sparse: PeakMemory | None = None
    break_even: BreakEven | None = None
    pictures: list[str] = field(default_factory=list)
    fast: Fast | None = None

    @property
    def size_label(self) -> str:
        """``518 px`` or ``480x640 px``."""
        rows, columns = self.image_size
        return f"{rows} px" if rows == columns else f"{rows}x{columns} px"

    @property
    def rate_label(self) -> str:
        """``keep 0.1``, or the mean of one rate per layer."""
        if isinstance(self.keep_rate, float):
            return f"keep {self.keep_rate:g}"
        return f"keep {sum(self.keep_rate) / len(self.keep_rate):.3g} (mean)"

    @property
    def ran_dense(self) -> bool:
        """True where every layer of the sparse model ran its attention dense, because sparse would not pay."""
        return not any(layer.sparse for layer in self.flops_sparse.layers)

    @property
    def verdict(self) -> str:
        """One or two plain sentences: is sparse faster here, and if not, from where."""
        if self.ran_dense:
            times = "" if self.latency is None else f" ({self.latency.speedup:.2f}x)"
            return (
                f"At {self.size_label} and {self.rate_label} the sparse model ran its attention DENSE, because sparse "
                f"attention would not be faster there: same output, same speed{times}.{self._pays_from()}"
            )
        if self.latency is None:
            return f"At {self.size_label} and {self.rate_label} latency was not measured."
        dense, sparse = self.latency.dense_median, self.latency.sparse_median
        times = f"median {seconds(sparse)} against {seconds(dense)}, {self.latency.speedup:.2f}x"
        where = f"At {self.size_label} and {self.rate_label} the sparse model is"
        if self.latency.speedup > 1 + _TIE:
            return f"{where} faster than the dense one on this machine: {times}."
        if self.latency.speedup >= 1 - _TIE:
            return f"{where} about as fast as the dense one on this machine: {times}.{self._pays_from()}"
        return f"{where} SLOWER than the dense one on this machine: {times}.{self._pays_from()}"

    @property
    def fast_verdict(self) -> str:
        """A sentence about the fast form; empty where it was not timed."""
        if self.fast is None or self.fast.latency is None:
            return ""
        return (
            f"At {self.size_label} its fast form ({self.fast.name}) is {self.fast.latency.speedup:.2f}x as fast as the "
            f"dense float32 model, at a mean cosine of {self.fast.fidelity.mean('patch_cosine'):.4f}."
        )

    def _pays_from(self) -> str:
        found = self.break_even
        if found is None:
            return ""
        if found.num_tokens is None:
            return (
                f" No size at which it would pay was found: one attention layer was slower sparse than dense at "
                f"every size up to {found.max_tokens} tokens ({found.max_image_size} px), where the search ended."
                if all(point.sparse_s >= point.dense_s for point in found.points)
                else f" No size from which it would pay was found up to {found.max_tokens} tokens "
                f"({found.max_image_size} px), where the search ended."
            )
        if found.num_tokens <= self.num_tokens:
            return (
                f" One attention layer alone is faster sparse from {found.num_tokens} tokens "
                f"({found.image_size} px) on; the whole model at this size does not show it."
            )
        where = f"{found.image_size} px ({found.num_tokens} tokens)"
        return f" It would pay from about {where}, measured on one attention layer."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        optional = ("latency", "memory_dense", "memory_sparse", "break_even", "fast")
        return {
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            "num_tokens": self.num_tokens,
            "keep_rate": list(self.keep_rate) if isinstance(self.keep_rate, tuple) else self.keep_rate,
            "config": self.config,
            "fidelity": self.fidelity.to_dict(),
            "flops": {"dense": self.flops_dense.to_dict(), "sparse": self.flops_sparse.to_dict()},
            **{name: value.to_dict() if (value := getattr(self, name)) is not None else None for name in optional},
            "pictures": self.pictures,
            "ran_dense": self.ran_dense,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Report:
    """The whole report; :meth:`to_dict` is what ``report.json`` holds.

    Args:
        model: the name or folder it was asked for.
        architecture: class and, if known, timm name.
        parameters: of the dense model.
        dtype: in which both models ran.
        machine: where.
        source: where the images come from.
        images: their names.
        skipped: pictures that could not be read, and why.
        converted: what was made sparse, and what was left and why.
        cases: by image size, then keep rate.
        notes: what a reader has to know about the figures.
        pictures: PNG files by name; they are written beside the page and not part of the JSON.
    """

    model: str
    architecture: str
    parameters: int
    dtype: str
    machine: Machine
    source: str
    images: list[str]
    skipped: dict[str, str]
    converted: list[str]
    cases: list[Case]
    notes: list[str]
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "machine": asdict(self.machine),
            "images": {"source": self.source, "names": self.images, "skipped": self.skipped},
            "converted": self.converted,
            "notes": self.notes,
            "cases": [case.to_dict() for case in self.cases],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def by_size(self) -> list[list[Case]]:
        """The cases of each image size."""
        groups: dict[tuple[int, int], list[Case]] = {}
        for case in self.cases:
            groups.setdefault(case.image_size, []).append(case)
        return list(groups.values())


def seconds(value: float) -> str:
    """``12.3 ms`` or ``1.23 s``."""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"
