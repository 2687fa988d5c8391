"""Precision and compilation of a finished model: the same network, held and run in another way."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ._utils.checks import choose, flag, number
from ._utils.messages import one_line
from .errors import SparsifinerError

Activations = Literal["model", "bfloat16"]
Linears = Literal["model", "int8"]

_INT8_OPTIONS = {"realize_opcount_threshold": 4, "realize_reads_threshold": 2}
"""Otherwise inductor computes GELU twice, for the largest value of a row and for its bytes."""


@dataclass(frozen=True)
class Runtime:
    """How a model is held and run; the default is as PyTorch made it.

    Args:
        activations: ``bfloat16`` brings weights and what flows between layers to it, ``model`` leaves them.
        linears: ``int8`` holds the weights of linear layers in bytes, one scale per output channel, and rounds their
            inputs to bytes with one scale per token (torchao's ``Int8DynamicActivationInt8WeightConfig``).
        compiled: compiled ahead of time by AOTInductor with frozen weights, at the first input of each shape.
        threads: of PyTorch while the model runs; its own number if None.
    """

    activations: Activations = "model"
    linears: Linears = "model"
    compiled: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        choose("activations", self.activations, get_args(Activations))
        choose("linears", self.linears, get_args(Linears))
        flag("compiled", self.compiled)
        number("threads", self.threads, least=1, integer=True, optional=True)

    def __str__(self) -> str:
        parts = [self.activations] * (self.activations != "model") + ["int8 linears"] * (self.linears == "int8")
        return ", ".join([*parts, "compiled" if self.compiled else "eager"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Runtime:
        """The inverse of :meth:`to_dict`; unknown names are refused with the nearest known one."""
        for name in settings:
            choose("runtime setting", name, tuple(field.name for field in dataclasses.fields(cls)))
        return cls(**settings)


def prepare(model: nn.Module, runtime: Runtime) -> ReadyModel:
    """A copy of ``model`` that runs as ``runtime`` says.

    Raises:
        SparsifinerError: if it cannot be quantised, with the reason. What cannot be compiled is refused at the first
            call.
    """
    return ReadyModel(model, runtime)


class ReadyModel(nn.Module):
    """A model for inference in the precision of a :class:`Runtime`; called like the one it was made from.

    ``forward`` and ``forward_features`` take and return the dtype of their input; other attributes are the model's.

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
            _quantise(self.model)
        self._compiled: dict[Any, Callable[[Tensor], Any]] = {}

    def forward(self, x: Tensor) -> Any:
        """What the model returns for images ``[B, 3, height, width]``."""
        if not (hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head")):
            return self._run("forward", x)
        with torch.no_grad():
            features = self._run("forward_features", x, as_input=False)
            head: Any = self.model.forward_head
            return _floats_to(head(features), x.dtype)

    def forward_features(self, x: Tensor) -> Any:
        """Final tokens, ``[B, N, C]`` in timm's models."""
        return self._run("forward_features", x)

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

    def _run(self, method: str, x: Tensor, *, as_input: bool = True) -> Any:
        dtype = x.dtype
        if self.runtime.activations == "bfloat16":
            x = x.to(torch.bfloat16)
        with torch.inference_mode(False), torch.no_grad(), _threads(self.runtime.threads):
            run = self._compiled_for(method, x) if self.runtime.compiled else getattr(self.model, method)
            out = run(x)
        return _floats_to(out, dtype) if as_input else out

    def _compiled_for(self, method: str, x: Tensor) -> Callable[[Tensor], Any]:
        signature = (method, tuple(x.shape), x.dtype, x.device)
        if signature not in self._compiled:
            options = _INT8_OPTIONS if self.runtime.linears == "int8" else {}
            try:
                self._compiled[signature] = compile_ahead(_Method(self.model, method).eval(), x, options)
            except Exception as error:  # exporters and compilers raise what they like
                raise SparsifinerError(
                    f"{type(self.model).__name__} cannot be compiled: {one_line(error)[:300]}"
                ) from error
        return self._compiled[signature]


def compile_ahead(model: nn.Module, x: Tensor, options: Mapping[str, Any] | None = None) -> Callable[[Tensor], Any]:
    """``model`` exported and compiled by AOTInductor for inputs like ``x``, its weights frozen.

    In float32 its linear layers get oneDNN's packed weights and absorb GELU, where ``torch.compile`` calls MKL.

    Args:
        model: in evaluation mode.
        x: images ``[B, 3, height, width]``.
        options: further settings of inductor.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs={"freezing": True, **(options or {})}
        )
        return torch._inductor.aoti_load_package(package)


class _Method(nn.Module):
    """A module whose ``forward`` is another method of ``model``, for exporters."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


def _quantise(model: Any) -> None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise SparsifinerError("int8 linears need torchao; pip install 'sparsifiner[tune]'") from error
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not classifier and ".predictor." not in f".{name}."

    if not any(chosen(module, name) for name, module in model.named_modules()):
        raise SparsifinerError(f"{type(model).__name__} has no linear layer to hold in int8")
    try:
        # Its settings of inductor are for the whole process; those that matter are given where it compiles.
        quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=chosen)
    except Exception as error:
        raise SparsifinerError(f"{type(model).__name__} cannot be held in int8: {one_line(error)[:300]}") from error


def _floats_to(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
