"""Settings of how a finished model is held and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .._utils.checks import choose, number
from ..errors import SparsifinerError

Activations = Literal["model", "bfloat16"]
Linears = Literal["model", "int8"]
Compilation = Literal["none", "torch.compile", "ahead"]


@dataclass(frozen=True)
class Runtime:
    """How a model is held and run; the default is as PyTorch made it.

    Args:
        activations: ``bfloat16`` brings weights and what flows between layers to it, ``model`` leaves them.
        linears: ``int8`` holds the weights of linear layers in bytes, one scale per output channel, and rounds their
            inputs to bytes with one scale per token (torchao's ``Int8DynamicActivationInt8WeightConfig``).
        compilation: ``ahead`` compiles by AOTInductor with frozen weights, ``torch.compile`` by that, each at the first
            input of each shape; ``none`` runs PyTorch's own operations one by one.
        threads: of PyTorch while the model runs; its own number if None.
    """

    activations: Activations = "model"
    linears: Linears = "model"
    compilation: Compilation = "none"
    threads: int | None = None

    def __post_init__(self) -> None:
        choose("activations", self.activations, get_args(Activations))
        choose("linears", self.linears, get_args(Linears))
        choose("compilation", self.compilation, get_args(Compilation))
        number("threads", self.threads, least=1, integer=True, optional=True)

    def __str__(self) -> str:
        parts = [self.activations] * (self.activations != "model") + ["int8 linears"] * (self.linears == "int8")
        how = {"none": "eager", "torch.compile": "torch.compile", "ahead": "compiled"}[self.compilation]
        threads = [] if self.threads is None else [f"{self.threads} thread{'s' if self.threads > 1 else ''}"]
        return ", ".join([*parts, how, *threads])

    def replace(self, **changes: Any) -> Runtime:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Runtime:
        """The inverse of :meth:`to_dict`; unknown names are refused with the nearest known one."""
        if not isinstance(settings, Mapping):
            raise SparsifinerError(f"runtime must be named settings such as linears: int8, got {settings!r}")
        for name in settings:
            choose("runtime setting", name, tuple(field.name for field in dataclasses.fields(cls)))
        return cls(**settings)
