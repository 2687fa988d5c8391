"""A model as a ``torch.export`` program."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import find_sparse_layers
from ..errors import SparsifinerError
from .standard import decompositions

MOST_BATCH = 4096
"""Images in a batch of a program for any batch; a bound, so that sizes stay within 32 bits."""


def traced_program(model: nn.Module, x: Tensor, any_batch: bool) -> Any:
    """The ``ExportedProgram`` of ``model`` for images like ``x``, of any number with ``any_batch``."""
    if any_batch and x.shape[0] < 2:  # one example of two: torch.export takes sizes of 1 for constants
        x = torch.cat([x, x])
    sizes = ({0: torch.export.Dim("batch", min=1, max=MOST_BATCH)},) if any_batch else None
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=sizes)


def standard_program(model: nn.Module, x: Tensor, any_batch: bool) -> Any:
    """:func:`traced_program` with the library's operations written in standard operators."""
    return traced_program(model, x, any_batch).run_decompositions(decompositions())


def exact_copy(model: nn.Module) -> nn.Module:
    """A float32 copy of ``model`` whose sparse layers compute in float32, in PyTorch's own arithmetic.

    Compiled kernels may round the scores that keys are chosen by, other runtimes do not.
    """
    exact = copy.deepcopy(model).eval().float().requires_grad_(False)
    for layer in find_sparse_layers(exact).values():
        layer.configure(layer.config.replace(attention_dtype="model", backend="gather"))
    return exact


def with_size(model: nn.Module, image_size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int]]:
    """``model`` for images of ``image_size``, rows and columns in pixels, its own if None; and that size.

    Raises:
        SparsifinerError: if it has no size of its own and none was named, or cannot be brought to ``image_size``.
    """
    embed: Any = getattr(model, "patch_embed", None)
    own = getattr(embed, "img_size", None)
    if image_size is None:
        if own is None:
            raise SparsifinerError(f"{type(model).__name__} has no image size of its own; name one with image_size")
        return model, (own[0], own[1])
    if own is None or tuple(own) == image_size or getattr(model, "dynamic_img_size", False):
        return model, image_size
    resized: Any = copy.deepcopy(model)
    if not hasattr(resized, "set_input_size"):
        raise SparsifinerError(
            f"{type(model).__name__} takes images of {own[0]}x{own[1]} pixels only; build it for "
            f"{image_size[0]}x{image_size[1]}"
        )
    resized.set_input_size(img_size=image_size)
    return resized, image_size
