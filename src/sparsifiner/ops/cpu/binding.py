"""The compiled module ``sparsifiner._native``: loading it, its instruction sets, and how tensors are handed to it.

It is built without torch, so that it fits every release of it, and takes addresses and strides. Only this file knows
of them: kernels call :func:`call` with tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..._utils import native_module
from ...errors import SparsifinerError

_native: Any = native_module.native
_missing = native_module.missing
# What the kernels would say; a compiler that traces cannot ask them.
_level: str | None = None if _missing is not None else str(_native.level())
_precisions: tuple[str, ...] = () if _missing is not None else tuple(_native.precisions())


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
