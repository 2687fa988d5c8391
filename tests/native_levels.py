"""The CPU levels that tests run on: those of this machine, and AMX over emulated tiles where the module has them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sparsifiner.ops import cpu

LEVEL_NAMES = [*cpu.levels(), "amx_emulated"] if cpu.why_missing() is None else []


def _has_emulation() -> bool:
    try:
        with cpu.force_level("amx_emulated"):
            return True
    except ValueError:
        return False


_without_emulation = pytest.mark.skipif(
    not _has_emulation(),
    reason="this module emulates no AMX; pip install -e . --config-settings=cmake.define.SPARSIFINER_AMX_EMULATION=ON",
)


def level_parameters(names: Iterable[str] = LEVEL_NAMES) -> list:
    """Parameters of a test; ``amx_emulated`` is skipped where the module was built without it."""
    return [pytest.param(name, marks=_without_emulation if name == "amx_emulated" else ()) for name in names]


LEVELS = level_parameters()
ROUNDING_LEVELS = [name for name in LEVEL_NAMES if name in ("avx512vnni", "avx512bf16", "amx", "amx_emulated")]
"""Those whose scores come from products of bytes or of bfloat16 (amx)."""
EXACT_LEVELS = [name for name in LEVEL_NAMES if name not in ROUNDING_LEVELS]
