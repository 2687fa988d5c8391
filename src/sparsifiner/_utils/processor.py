"""Name of the processor."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """The processor's name as the system gives it, such as ``AMD EPYC``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
