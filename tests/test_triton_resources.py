"""The Triton kernels compile ahead of time for GPUs nobody has here, within their registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsifiner.ops.triton import why_missing

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")


@pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
def test_kernels_fit_their_gpus() -> None:
    """No spills, no more shared memory than there is, asynchronous gathers of 16 bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/triton_resources.py"), "--quick"]
    command += [f"--arch={arch}" for arch in ARCHITECTURES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for arch in ARCHITECTURES:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert {"attend_kernel", "score_kernel", "select_kernel", "join_kernel"} <= kernels
