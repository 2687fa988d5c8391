"""Peak memory of a forward pass, measured in a process of its own.

On a CPU each model runs in a fresh process, so that neither the other model nor the caller's memory is seen.
The peak the kernel has recorded for that process (``VmHWM``, elsewhere ``ru_maxrss``) never falls, so the gap
between it and what is resident now is first filled with ballast: every page the forward pass then adds raises the
peak, and the rise is the figure. On a GPU it is ``torch.cuda.max_memory_allocated`` over what is allocated before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.messages import one_line


@dataclass(frozen=True)
class PeakMemory:
    """Memory that a forward pass needs on top of what is there before it.

    Args:
        forward_bytes: peak during the forward pass, weights and input not included.
        weight_bytes: parameters and buffers of the model.
        method: how it was measured.
    """

    forward_bytes: int
    weight_bytes: int
    method: str

    @property
    def total_bytes(self) -> int:
        return self.forward_bytes + self.weight_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, bytes."""
        return {**vars(self), "total_bytes": self.total_bytes}


def measure_memory(model: nn.Module, x: Tensor, *, timeout: float = 600.0) -> PeakMemory:
    """Peak memory of ``model(x)`` without gradients.

    Args:
        model: any model that can be pickled, in evaluation mode.
        x: images ``[B, 3, height, width]`` on the model's device.
        timeout: seconds after which the measuring process is given up.

    Raises:
        RuntimeError: if it cannot be measured here; one line says why.
    """
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if x.is_cuda:
        return PeakMemory(_cuda_peak(model, x), weights, "torch.cuda.max_memory_allocated")
    with tempfile.TemporaryDirectory(prefix="sparsifiner-") as folder:
        file = Path(folder, "model.pt")
        try:
            torch.save({"model": model, "x": x, "threads": torch.get_num_threads()}, file)
        except Exception as error:
            raise RuntimeError(f"the model cannot be pickled ({one_line(error)})") from error
        command = [sys.executable, "-m", "sparsifiner.measure._memory_worker", str(file)]
        # Classes in the pickle must be found where this process found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the measuring process was not done after {timeout:.0f} s") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, probably out of memory"])[-1]
        raise RuntimeError(f"the measuring process failed: {reason}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return PeakMemory(answer["bytes"], weights, answer["method"])


def _cuda_peak(model: nn.Module, x: Tensor) -> int:
    with torch.inference_mode():
        model(x)
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        model(x)
        torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before
