"""Triton kernels in tests: compiled where there is a GPU, interpreted on the CPU elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsifiner.ops import OPERATIONS
from sparsifiner.ops.triton import interpreted, why_missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]  # the interpreter rounds bfloat16 wrongly; there it is widened

if why_missing() is not None:
    pytest.skip(str(why_missing()), allow_module_level=True)
if DEVICE == "cpu" and not interpreted():
    pytest.skip("there is no GPU and TRITON_INTERPRET is off", allow_module_level=True)


def run(operation: str, *arguments: Any) -> Any:
    """The Triton kernel of an operation, on the CPU and back."""
    moved = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    found = OPERATIONS[operation].op(*moved, "triton")
    return [x.cpu() for x in found] if isinstance(found, list | tuple) else found.cpu()


def exactly(operation: str, *arguments: Any) -> Any:
    """The reference of an operation in float64."""
    return OPERATIONS[operation].op(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments), "reference"
    )


def interpret_helpers_quickly() -> None:
    """Spare the interpreter preparing Triton's language anew for each helper that a kernel calls: once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if tl.core.is_builtin(tl.core.full):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call


if DEVICE == "cpu":
    interpret_helpers_quickly()
