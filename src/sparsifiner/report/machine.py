"""Machine that measurements were made on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Machine that the measurements were made on."""

    processor: str
    device: str
    threads: int
    system: str
    python: str
    torch: str


def this_machine(device: torch.device) -> Machine:
    """Processor, device and versions, for the report."""
    name = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Machine(
        processor=_processor(),
        device=name,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores"
