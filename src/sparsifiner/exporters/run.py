"""``export``: a model as a file for another runtime, compared with the model before it is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.files import check_file_writable, write_together
from .._utils.messages import one_line, shown
from .._utils.photos import bundled_photos, input_channels, preprocess
from ..convert import find_sparse_layers
from ..errors import SparsifinerError
from ..geometry.patch_grid import check_image_size
from ..recording import record
from .program import exact_copy, with_size
from .registry import EXPORTERS, Exporter, Run, exporter_for

TOLERANCE = 1e-2
"""Relative L2 error from which a file is refused. Rounding moves a few choices of keys; a wrong graph is far beyond."""


@dataclass(frozen=True)
class Exported:
    """A file that was exported and compared with its model.

    Args:
        path: the file.
        format: name of its format.
        image_size: rows and columns in pixels of the images it takes.
        batch_size: of the images, or None for any.
        layers: attention layers that are sparse in it, and all that could be.
        largest: largest difference from the model's output, as a share of the output's largest value.
        relative_l2: difference from the model's output over the output, as vectors.
        note: what users have to know.
    """

    path: Path
    format: str
    image_size: tuple[int, int]
    batch_size: int | None
    layers: tuple[int, int]
    largest: float
    relative_l2: float
    note: str = ""

    def __str__(self) -> str:
        size = "x".join(str(side) for side in self.image_size)
        batch = "any batch" if self.batch_size is None else f"batches of {self.batch_size}"
        lines = [
            f"{self.path}: {size} pixels, {batch}, {self.layers[0]} of {self.layers[1]} attention layers sparse",
            f"checked on a photograph against PyTorch: largest error {self.largest:.1e} of the largest value, relative "
            f"L2 {self.relative_l2:.1e}",
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write ``model`` as a file for another runtime, run it there and compare it with the model on a photograph.

    ``onnx`` and ``openvino`` hold standard operators in float32; ``torch`` is machine code that calls the library's
    kernels. Attention runs sparse where the model's own rule says so for ``image_size``.

    Args:
        model: in evaluation mode; sparse or dense. It stays as it is.
        path: the file; its suffix names the format: ``.onnx``, ``.xml`` for OpenVINO, ``.pt2`` for AOTInductor.
        to: the format, ``onnx``, ``openvino`` or ``torch``, instead.
        image_size: pixels, or rows and columns in pixels; the model's own if None.
        batch_size: images in a batch; any number if None.
        tolerance: relative L2 error above which the file is refused.

    Returns:
        What was written and how far it is from the model; print it.

    Raises:
        SparsifinerError: if a package is missing, the model cannot be exported, or the file computes something else;
            no file is left then.
    """
    if not isinstance(model, nn.Module):
        raise SparsifinerError(f"export takes a model, an nn.Module such as sparsify(...) returns; got {shown(model)}")
    path = Path(path)
    exporter = exporter_for(path, to)
    exporter.check_installed()
    check_file_writable(path)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    model, size = with_size(model.eval(), size)
    check_image_size(model, size)
    subject = exact_copy(model) if exporter.standard_operators else model
    x = _photograph(subject, size, batch_size or 2)
    expected, layers = _outputs(subject, x)
    with tempfile.TemporaryDirectory(prefix="sparsifiner-") as folder:
        written = Path(folder, path.name)
        try:
            exporter.write(subject, x, written, batch_size is None)
            found = exporter.load(written)(x)
        except SparsifinerError:
            raise
        except OSError as error:
            raise SparsifinerError(f"{path} cannot be written: {error.strerror or error}") from error
        except Exception as error:  # exporters and runtimes raise what they like
            raise SparsifinerError(
                f"{type(model).__name__} cannot be exported to {exporter.title}: {one_line(error)[:300]}"
            ) from error
        largest, relative = _difference(found, expected)
        if not relative <= tolerance:
            raise SparsifinerError(
                f"{path} was not written: in {exporter.title} the model's output is off by {relative:.1e} (relative "
                f"L2; at most {tolerance:g} is taken for rounding)"
            )
        _keep(exporter, written, path)
    return Exported(path, exporter.name, size, batch_size, layers, largest, relative, exporter.note)


def load_exported(path: str | Path, to: str | None = None) -> Run:
    """The model in a file of :func:`export`, in its runtime: a function of images ``[B, 3, height, width]``."""
    path = Path(path)
    exporter = exporter_for(path, to)
    exporter.check_installed()
    if not path.is_file():
        raise SparsifinerError(f"there is no file {path}")
    return exporter.load(path)


def _photograph(model: nn.Module, size: tuple[int, int], batch: int) -> Tensor:
    """A bundled photograph as the model takes it, and its mirror images, ``[batch, channels, rows, columns]``."""
    parameter = next(model.parameters(), torch.empty(0))
    if input_channels(model) in (1, 3):
        x = preprocess(model, size)(bundled_photos(1).photos[0].image)[None]
    else:
        x = torch.randn(1, input_channels(model), *size, generator=torch.Generator().manual_seed(0))
    mirrored = torch.cat([x, x.flip(-1)])
    return mirrored.repeat((batch + 1) // 2, 1, 1, 1)[:batch].to(parameter.device, parameter.dtype).contiguous()


def _outputs(model: nn.Module, x: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
    """What the model returns, and how many of its sparse layers ran sparse."""
    layers = find_sparse_layers(model)
    with torch.no_grad():
        if not layers:
            out, sparse = model(x), 0
        else:
            with record(model) as seen:
                out = model(x)
            sparse = sum(item.connectivity is not None for item in seen.values())
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)], (sparse, len(layers))


def _difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Largest relative error and relative L2 error, of the output that is farthest off."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise SparsifinerError(
            f"the exported model returns {[list(x.shape) for x in found]} where the model returns "
            f"{[list(x.shape) for x in expected]}"
        )
    largest = relative = 0.0
    for got, want in zip(found, expected, strict=True):
        got, want = got.double(), want.double()
        tiny = torch.finfo(torch.float32).tiny
        largest = max(largest, float((got - want).abs().max() / want.abs().max().clamp(min=tiny)))
        error = (got - want).norm() / want.norm().clamp(min=tiny)
        relative = float("nan") if not error.isfinite() else max(relative, float(error))
    return largest, relative


def _keep(exporter: Exporter, written: Path, path: Path) -> None:
    """Move what was written to its place; the file itself comes last, when all that it needs is there."""
    pairs = zip([written, *exporter.companions(written)], [path, *exporter.companions(path)], strict=True)

    def copy_of(source: Path) -> Any:
        return lambda target: shutil.copyfile(source, target)

    path.parent.mkdir(parents=True, exist_ok=True)
    files = {target: copy_of(source) for source, target in pairs if os.path.exists(source)}
    write_together(files)


__all__ = ["EXPORTERS", "Exported", "export", "load_exported"]
