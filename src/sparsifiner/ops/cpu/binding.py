"""The compiled module ``sparsifiner._native``: loading it, its instruction sets, and how tensors are handed to it.

It is built without torch, so that it fits every release of it, and takes addresses and strides. Only this file knows
of them: kernels call :func:`call` with tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...errors import SparsifinerError

LEVEL_VARIABLE = "SPARSIFINER_CPU_LEVEL"
INTERFACE = 2  # of the module's functions, raised with every change of them

_missing: str | None = None
# What the kernels would say; a compiler that traces cannot ask them.
_level: str | None = None
_precisions: tuple[str, ...] = ()
try:
    _native: Any = import_module("sparsifiner._native")
except ImportError as error:
    _missing = (
        f"the compiled module sparsifiner._native is not there ({error}); install a C++17 compiler "
        f"(g++ or clang) and run `pip install --force-reinstall --no-deps sparsifiner` to build it"
    )
else:
    if getattr(_native, "interface", 1) != INTERFACE:
        raise ImportError(
            f"the compiled module {_native.__file__} was built from other sources than this package; build it again, "
            f"for instance with `pip install -e .`"
        )
    try:
        _native.force_level(os.environ.get(LEVEL_VARIABLE, ""))
        _level, _precisions = str(_native.level()), tuple(_native.precisions())
    except ValueError as error:
        _missing = f"{LEVEL_VARIABLE} asks for what this machine cannot do: {error}"


def why_missing() -> str | None:
    """Why the compiled kernels cannot be used on this machine, in words, or None if they can."""
    return _missing


def levels() -> list[str]:
    """Instruction sets this machine can run, best last.

    All there are: ``portable``, ``avx2``, ``avx512``, ``avx512vnni``, ``avx512bf16``, ``amx``.
    """
    return [] if _missing is not None else list(_native.levels())


def missing_levels() -> dict[str, str]:
    """Why each of the other instruction sets cannot run here, in words."""
    return {} if _missing is not None else dict(_native.reasons_against())


def level() -> str | None:
    """The instruction set the kernels run with."""
    return None if _missing is not None else _level


def precisions() -> tuple[str, ...]:
    """What attention of float32 inputs can be rounded to for speed with the instruction set in use."""
    return () if _missing is not None else _precisions


@contextmanager
def force_level(name: str) -> Iterator[None]:
    """Run the kernels with the instruction set ``name``, in all threads. For tests and comparisons.

    Modules built with ``SPARSIFINER_AMX_EMULATION`` have one more, ``amx_emulated``: the ``amx`` kernels with each tile
    instruction carried out by plain C++. Slow and never chosen by itself; tests follow ``amx`` there on any machine.

    Raises:
        ValueError: if it is unknown or this machine does not have it.
    """
    if _missing is not None:
        raise SparsifinerError(_missing)
    before = str(_native.level())
    _set_level(name)
    try:
        yield
    finally:
        _set_level(before)


def _set_level(name: str) -> None:
    global _level, _precisions
    _native.force_level(name)
    _level, _precisions = str(_native.level()), tuple(_native.precisions())


def readable_rows(x: Tensor) -> Tensor:
    """``x`` ``[B, H, N, D]``, copied only if its rows are not contiguous or not aligned to 4 bytes."""
    aligned = x.data_ptr() % 4 == 0 and (x.dtype != torch.bfloat16 or all(s % 2 == 0 for s in x.stride()[:3]))
    if x.stride(3) == 1 and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address of ``x`` ``[B, H, N, D]``, and its strides of batch, head and token in elements. Keep ``x`` alive."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` contiguous in ``dtype``, or None."""
    return None if x is None else x.to(dtype).contiguous()


def address(x: Tensor | None) -> int:
    """Address of the elements of a contiguous tensor; 0 for None. Keep ``x`` alive."""
    return 0 if x is None else x.data_ptr()


def call(function: str, *arguments: Any, **options: Any) -> None:
    """Call a function of the compiled module with as many threads as torch has."""
    getattr(_native, function)(*arguments, torch.get_num_threads(), **options)


def is_not_a_number(error: ValueError) -> bool:
    """True where the module refused scores because they hold NaN, and not for wrong arguments."""
    return "NaN" in str(error)
