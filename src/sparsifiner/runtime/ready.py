"""A model ready to run as a :class:`Runtime` says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.messages import LOGGER, one_line
from ..errors import SparsifinerError
from .compilation import INT8_OPTIONS, CompilingProcess, Options, compile_ahead, compile_just_in_time
from .quantization import quantize_linears
from .settings import Runtime

MOST_SHAPES = 8
"""Input shapes a model is compiled for; each holds packed weights of its own."""


def prepare(model: nn.Module, runtime: Runtime) -> ReadyModel:
    """A copy of ``model`` that runs as ``runtime`` says.

    Raises:
        SparsifinerError: if it cannot be quantised, with the reason.
    """
    return ReadyModel(model, runtime)


class ReadyModel(nn.Module):
    """A model for inference in the precision of a :class:`Runtime`; called like the one it was made from.

    ``forward`` and ``forward_features`` take and return the dtype of their input; other attributes are the model's.
    It takes images of every size that the model takes. It is compiled at the first batch of each shape, which takes
    its time (:meth:`compile_for` does it beforehand); what cannot be compiled, and every shape after the eighth, runs
    uncompiled, and the logger ``sparsifiner`` says so.

    Args:
        source: the model in its own precision, which is kept for saving and must not change afterwards.
        runtime: precision, compilation and threads.
    """

    def __init__(self, source: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.training = False
        self.runtime = runtime
        vars(self)["source"] = source  # no submodule: its weights are not those that run
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        if runtime.activations == "bfloat16":
            self.model.to(torch.bfloat16)
        if runtime.linears == "int8":
            quantize_linears(self.model)
        self._compiled: dict[Any, Callable[[Tensor], Any]] = {}

    def forward(self, x: Tensor) -> Any:
        """What the model returns for images ``[B, 3, height, width]``."""
        if self._method == "forward":
            return self._run("forward", x)
        with torch.no_grad():
            features = self._run("forward_features", x, as_input=False)
            head: Any = self.model.forward_head
            return _floats_to(head(features), x.dtype)

    def forward_features(self, x: Tensor) -> Any:
        """Final tokens, ``[B, N, C]`` in timm's models."""
        return self._run("forward_features", x)

    def compile_for(self, x: Tensor) -> None:
        """Compile for batches of the shape and dtype of ``x``, if it is not and the runtime asks for it.

        Raises:
            SparsifinerError: if the model cannot be compiled, with the reason.
        """
        x, signature = self._prepared(x, self._method)
        if self.runtime.compilation == "none" or signature in self._compiled:
            return
        module = _Method(self.model, self._method).eval()
        try:
            with torch.inference_mode(False), torch.no_grad(), use_threads(self.runtime.threads):
                if self.runtime.compilation == "ahead":
                    run = compile_ahead(module, x, self.compile_options)
                else:
                    run = compile_just_in_time(module, self.compile_options)
                    run(x)
        except Exception as error:  # exporters and compilers raise what they like
            raise SparsifinerError(
                f"{type(self.model).__name__} cannot be compiled: {one_line(error)[:300]}"
            ) from error
        self._compiled[signature] = run

    def start_compiling(self, x: Tensor) -> CompilingProcess:
        """What :meth:`compile_for` does ahead of time, begun in a process of its own; give its result to
        :meth:`adopt`."""
        x, _ = self._prepared(x, self._method)
        with use_threads(self.runtime.threads):
            return CompilingProcess(_Method(self.model, self._method).eval(), x, self.compile_options)

    def adopt(self, run: Callable[[Tensor], Any], x: Tensor) -> None:
        """Take what :meth:`start_compiling` made for batches like ``x``."""
        self._compiled[self._prepared(x, self._method)[1]] = run

    @property
    def compile_options(self) -> Options:
        """Settings of inductor for this precision."""
        return INT8_OPTIONS if self.runtime.linears == "int8" else {}

    def train(self, mode: bool = True) -> ReadyModel:
        """Refuses to train: weights are rounded or frozen."""
        if mode:
            raise SparsifinerError("a model prepared for inference cannot train; train the one it was made from")
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "source"):
                raise
            return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are compiled anew."""
        return {**vars(self), "_compiled": {}}

    @property
    def _method(self) -> str:
        """The part of the model that is compiled: all but the head where it comes in two parts."""
        two = hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head")
        return "forward_features" if two else "forward"

    def _prepared(self, x: Tensor, method: str) -> tuple[Tensor, Any]:
        if self.runtime.activations == "bfloat16":
            x = x.to(torch.bfloat16)
        return x, (method, tuple(x.shape), x.dtype, x.device)

    def _run(self, method: str, x: Tensor, *, as_input: bool = True) -> Any:
        dtype = x.dtype
        x, signature = self._prepared(x, method)
        if self.runtime.compilation != "none" and method == self._method and signature not in self._compiled:
            self._compile_or_say_why(x)
        with torch.inference_mode(False), torch.no_grad(), use_threads(self.runtime.threads):
            run = self._compiled.get(signature) or getattr(self.model, method)
            out = run(x)
        return _floats_to(out, dtype) if as_input else out

    def _compile_or_say_why(self, x: Tensor) -> None:
        shape = "x".join(str(side) for side in x.shape)
        try:
            if len(self._compiled) >= MOST_SHAPES:
                raise SparsifinerError(f"it is compiled for {MOST_SHAPES} shapes already")
            LOGGER.info("compiling %s for batches of %s", type(self.model).__name__, shape)
            self.compile_for(x)
        except SparsifinerError as error:
            LOGGER.warning("batches of %s run uncompiled: %s", shape, error)
            self._compiled[self._prepared(x, self._method)[1]] = getattr(self.model, self._method)


class _Method(nn.Module):
    """A module whose ``forward`` is another method of ``model``, for exporters."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


def _floats_to(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """PyTorch with so many threads while the block runs; None leaves it as it is."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
