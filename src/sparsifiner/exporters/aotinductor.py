"""Packages of PyTorch's AOTInductor: machine code for this kind of CPU, which calls the library's own kernels."""

from __future__ import annotations

from pathlib import Path

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime.compilation import load_package, write_package
from .program import traced_program
from .registry import Exporter, Run, register_exporter

NOTE = "import sparsifiner before torch._inductor.aoti_load_package: the package calls its kernels"


def write(model: nn.Module, x: Tensor, path: Path, any_batch: bool) -> None:
    """Write ``model`` for images like ``x``, its weights frozen."""
    write_package(traced_program(model, x, any_batch), x, str(path))


def load(path: Path) -> Run:
    """The model in a package that this computer has just written."""
    package = load_package(str(path))

    def run(x: Tensor) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(package(x)) if isinstance(leaf, Tensor)]

    return run


register_exporter(
    Exporter(
        "torch",
        "AOTInductor",
        suffixes=(".pt2",),
        needs=(),
        write=write,
        load=load,
        standard_operators=False,
        note=NOTE,
    )
)
