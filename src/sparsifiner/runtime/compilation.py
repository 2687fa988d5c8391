"""Compiled models: ahead of time by AOTInductor, here or in a process that can be stopped, and by ``torch.compile``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.messages import one_line
from ..errors import SparsifinerError

Options = Mapping[str, Any]
INT8_OPTIONS: Options = {"realize_opcount_threshold": 4, "realize_reads_threshold": 2}
"""Otherwise inductor computes GELU twice, for the largest value of a row and for its bytes."""


def compile_ahead(model: nn.Module, x: Tensor, options: Options | None = None) -> Callable[[Tensor], Any]:
    """``model`` exported and compiled by AOTInductor for inputs like ``x``, its weights frozen.

    In float32 its linear layers get oneDNN's packed weights and absorb GELU, where ``torch.compile`` calls MKL.

    Args:
        model: in evaluation mode.
        x: images ``[B, 3, height, width]``.
        options: further settings of inductor.
    """
    with tempfile.TemporaryDirectory(prefix="sparsifiner-") as folder:
        return load_package(write_package(model, x, f"{folder}/model.pt2", options))


def write_package(
    model: nn.Module | torch.export.ExportedProgram, x: Tensor, path: str, options: Options | None = None
) -> str:
    """What :func:`compile_ahead` compiles, or a program exported before, as a file at ``path``; returns the path."""
    with torch.no_grad():
        program = model if isinstance(model, torch.export.ExportedProgram) else torch.export.export(model, (x,))
        settings = {"freezing": True, "cpp.threads": torch.get_num_threads(), **(options or {})}
        return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)


def load_package(path: str) -> Callable[[Tensor], Any]:
    """The model in a file of :func:`write_package`, which this computer has just written: it holds machine code."""
    return torch._inductor.aoti_load_package(path)


def compile_just_in_time(model: nn.Module, options: Options | None = None) -> Callable[[Tensor], Any]:
    """``model`` under ``torch.compile`` with frozen weights, for inputs of one shape."""
    compiled = torch.compile(model, dynamic=False)

    def run(x: Tensor) -> Any:
        # Inductor compiles in the first call. It takes ``freezing`` from here, not from the options of compile.
        with torch._inductor.config.patch(freezing=True, **(options or {})):
            return compiled(x)

    return run


class CompilingProcess:
    """AOTInductor at work on a model in a process of its own, which can be stopped and uses one core.

    Args:
        model: in evaluation mode; one that can be pickled.
        x: images ``[B, 3, height, width]``.
        options: further settings of inductor.

    Raises:
        SparsifinerError: if the model cannot be pickled.
    """

    def __init__(self, model: nn.Module, x: Tensor, options: Options | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sparsifiner-")
        self._package, self._errors = Path(self._folder.name, "model.pt2"), Path(self._folder.name, "errors")
        job = Path(self._folder.name, "job.pt")
        settings = {"cpp.threads": torch.get_num_threads(), **(options or {})}
        try:
            torch.save({"model": model, "x": x, "options": settings, "package": str(self._package)}, job)
        except OSError:
            self._folder.cleanup()
            raise
        except Exception as error:
            self._folder.cleanup()
            raise SparsifinerError(f"{type(model).__name__} cannot be pickled ({one_line(error)[:200]})") from error
        # Classes in the pickle must be found where this process found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self.started = time.monotonic()
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sparsifiner.runtime._compile_worker", str(job)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment,
            )  # fmt: skip

    def done(self) -> bool:
        """True once it has ended, well or not."""
        return self._process.poll() is not None

    def result(self, timeout: float | None = None) -> Callable[[Tensor], Any]:
        """The compiled model, waited for.

        Args:
            timeout: seconds after which it is stopped.

        Raises:
            TimeoutError: if it was not done by then.
            SparsifinerError: if it failed, with the last line of what it said.
        """
        try:
            self._process.wait(timeout)
            if self._process.returncode:
                lines = self._errors.read_text(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"exit code {self._process.returncode}, probably out of memory"
                raise SparsifinerError(reason[:300])
            return load_package(str(self._package))
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"compilation was not done after {timeout:.0f} s") from error
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, whatever it is doing, and remove its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
