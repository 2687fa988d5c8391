"""The file a calibration continues from after it was killed: tensors and counters, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._utils.checks import number
from .._utils.digest import digest
from .._utils.files import make_folder_of, replacing
from .._utils.reading import parse_json
from ..errors import SparsifinerError


class State:
    """State of a calibration: named tensors, and how far each of its stages is.

    Args:
        path: the file, read if it exists; None keeps everything in memory.
        identity: identifies the calibration: same model, images and settings.

    Raises:
        ValueError: if the file belongs to another calibration, or cannot be read or written.
    """

    def __init__(self, path: str | Path | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        self.tensors: dict[str, Tensor] = {}
        self.done: dict[str, int] = {}
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path)
        else:
            make_folder_of(self.path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.done = parse_json(metadata["done"])
            identity = metadata["identity"]
            for stage, steps in self.done.items():
                number(stage, steps, least=0, integer=True)
        except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
            raise SparsifinerError(
                f"{path} is not the state of a calibration that can be continued; delete it or name another"
            ) from error
        if identity != self.identity:
            raise SparsifinerError(
                f"{path} is the state of a calibration of another model, other images or other settings; "
                f"delete it or name another"
            )

    def save(self) -> None:
        """Write everything, whole or not at all."""
        if self.path is None:
            return
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        with replacing(self.path, sole_writer=True) as temporary:
            save_file(tensors, temporary, metadata={"done": json.dumps(self.done), "identity": self.identity})


def fingerprint(settings: dict[str, Any], tensors: Iterable[Tensor]) -> str:
    """SHA-256 over settings that JSON can hold, and over the bytes of tensors."""
    return digest([json.dumps(settings, sort_keys=True), *tensors])


class Optimizer(torch.optim.AdamW):
    """AdamW whose state is kept as named tensors of a :class:`State`."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts under ``optimizer.{parameter number}.{name}``."""
        state = self.state_dict()["state"]
        return {
            f"optimizer.{number}.{name}": torch.as_tensor(value)
            for number, entry in state.items()
            for name, value in entry.items()
        }

    def from_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`to_tensors`; other names are left alone."""
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                entries.setdefault(int(number), {})[name] = value
        self.load_state_dict({"state": entries, "param_groups": self.state_dict()["param_groups"]})
