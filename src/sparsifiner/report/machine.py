"""Machine that measurements were made on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from .._utils.processor import processor_name


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
        processor=f"{processor_name()}, {os.cpu_count()} logical cores",
        device=name,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
    )
