"""The compiled module ``sparsifiner._native``, or why it cannot be used. It is built, and loads, without torch."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

LEVEL_VARIABLE = "SPARSIFINER_CPU_LEVEL"
INTERFACE = 2  # of the module's functions, raised with every change of them

native: Any = None
missing: str | None = None
"""Why it cannot be used on this machine, in words, or None if it can."""
try:
    native = import_module("sparsifiner._native")
except ImportError as error:
    missing = (
        f"the compiled module sparsifiner._native is not there ({error}); install a C++17 compiler "
        f"(g++ or clang) and run `pip install --force-reinstall --no-deps sparsifiner` to build it"
    )
else:
    if getattr(native, "interface", 1) != INTERFACE:
        raise ImportError(
            f"the compiled module {native.__file__} was built from other sources than this package; build it again, "
            f"for instance with `pip install -e .`"
        )
    try:
        native.force_level(os.environ.get(LEVEL_VARIABLE, ""))
    except ValueError as error:
        missing = f"{LEVEL_VARIABLE} asks for what this machine cannot do: {error}"


def describe() -> dict[str, Any]:
    """The kernels' instruction set, those this machine can run, and why not the others, as plain JSON values."""
    if missing is not None:
        return {"level": None, "levels": [], "missing_levels": {}, "missing": missing}
    return {
        "level": str(native.level()),
        "levels": list(native.levels()),
        "missing_levels": dict(native.reasons_against()),
        "missing": None,
    }
