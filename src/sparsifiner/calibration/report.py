"""Gains of a calibration: per layer and at the end of the model, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.layer import SparseAttention
from ..measure.fidelity import Fidelity, ImageFidelity

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerCalibration:
    """One attention layer before and after.

    Args:
        name: path of the layer.
        keep_rate_before: share of keys it kept.
        keep_rate: share of keys it keeps now.
        error_before: relative L2 error of its attention output on dense inputs, mean over the images.
        error: the same now.
        tail_offset: mean over the heads of the fitted offset, or None without a tail.
    """

    name: str
    keep_rate_before: float
    keep_rate: float
    error_before: float
    error: float
    tail_offset: float | None


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`sparsifiner.calibrate`; ``str()`` of it is a table.

    Args:
        layers: one entry per sparse layer.
        before: fidelity of the final features to the dense model's, before.
        after: the same after.
        num_images: images it was fitted to.
        held_out: whether the errors were measured on other images than those.
    """

    layers: list[LayerCalibration]
    before: Fidelity
    after: Fidelity
    num_images: int
    held_out: bool

    @property
    def patch_errors(self) -> tuple[float, float]:
        """Relative L2 of the final patch features before and after, mean over the images."""
        before, after = self.before.mean("patch_l2"), self.after.mean("patch_l2")
        assert before is not None
        assert after is not None
        return before, after

    @property
    def applied(self) -> bool:
        """The model has what was fitted: not where held-out images became worse by it."""
        before, after = self.patch_errors
        return not (self.held_out and after > before)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "num_images": self.num_images,
            "measured_on": len(self.after.images),
            "held_out": self.held_out,
            "applied": self.applied,
            "layers": [asdict(layer) for layer in self.layers],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def table(self) -> Table:
        """The table as ``rich`` prints it."""
        from rich import box
        from rich.table import Table

        images = f"{len(self.after.images)} {'held-out' if self.held_out else 'calibration'} images"
        table = Table(
            title=f"Fitted to {self.num_images} images, measured on {images}", title_justify="left", box=box.SIMPLE_HEAD
        )
        table.add_column("", no_wrap=True)
        for column in ("keep before", "after", "error before", "after", "tail offset"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            offset = "" if layer.tail_offset is None else f"{layer.tail_offset:+.2f}"
            rates = f"{layer.keep_rate_before:.4g}", f"{layer.keep_rate:.4g}"
            table.add_row(layer.name, *rates, f"{layer.error_before:.4f}", f"{layer.error:.4f}", offset)
        table.add_section()
        means = (
            sum(getattr(layer, name) for layer in self.layers) / len(self.layers)
            for name in ("keep_rate_before", "keep_rate")
        )
        table.add_row("mean keep rate", *(f"{mean:.4g}" for mean in means))
        for label, term in (
            ("final patches, relative L2", "patch_l2"),
            ("final patches, cosine", "patch_cosine"),
            ("class token, relative L2", "class_l2"),
        ):
            before, after = self.before.mean(term), self.after.mean(term)
            if before is not None and after is not None:
                table.add_row(label, "", "", f"{before:.4f}", f"{after:.4f}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def summarise(
    before: Mapping[str, SparseAttention],
    after: Mapping[str, SparseAttention],
    tensors: Mapping[str, Tensor],
    num_images: int,
    num_measured: int,
    *,
    held_out: bool,
) -> Calibration:
    """Put the measured errors together.

    Args:
        before: the layers as they were.
        after: the fitted layers.
        tensors: ``measured.layers.{image}`` ``[L, 2]``, and ``measured.before.{image}`` and
            ``measured.after.{image}`` ``[4]``, the terms of an ``ImageFidelity`` in order, NaN for None.
        num_images: images it was fitted to.
        num_measured: images it was measured on.
        held_out: whether these are others.
    """
    errors = torch.stack([tensors[f"measured.layers.{number}"] for number in range(num_measured)]).mean(0).tolist()
    layers = []
    for (name, layer), (old, new) in zip(after.items(), errors, strict=True):
        offset = layer.predictor.tail_offset
        mean_offset = None if offset is None else offset.float().mean().item()
        rates = before[name].predictor.keep_rate, layer.predictor.keep_rate
        layers.append(LayerCalibration(name, *rates, old, new, mean_offset))

    def fidelity(which: str) -> Fidelity:
        images = []
        for number in range(num_measured):
            patches, classes = tensors[f"measured.{which}.{number}"].split(2)
            class_terms = (None, None) if classes.isnan().any() else classes.tolist()
            images.append(ImageFidelity(str(number), *patches.tolist(), *class_terms))
        return Fidelity(images, {})

    return Calibration(layers, fidelity("before"), fidelity("after"), num_images, held_out)
