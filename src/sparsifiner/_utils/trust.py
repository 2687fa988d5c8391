"""Limits of what files of others make timm and torch do: build a known architecture, unpickle tensors only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import SparsifinerError
from .messages import shown

if TYPE_CHECKING:
    from torch import nn

_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_lock = Lock()
_inside = 0
_before: dict[str, str | None] = {}


def create_model(name: str, **arguments: Any) -> nn.Module:
    """``timm.create_model`` that unpickles tensors and plain values only, wherever the weights come from."""
    import timm

    with weights_only():
        return timm.create_model(name, **arguments)


@contextmanager
def weights_only() -> Iterator[None]:
    """In the block, every ``torch.load`` of every library loads as with ``weights_only=True``, whatever it was given.

    torch has a variable of the environment for it, so that this holds for all threads until the last block ends.
    """
    global _inside
    with _lock:
        if not _inside:
            _before.update({name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)})
            os.environ[_FORCED] = "1"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for name, value in _before.items():
                    os.environ.pop(name, None)
                    if value is not None:
                        os.environ[name] = value


def check_architecture(name: object, file: object) -> None:
    """Refuse what is not the plain name of an architecture, with or without a tag, but leads elsewhere.

    Args:
        name: as ``file`` gives it.
        file: which names it.

    Raises:
        SparsifinerError: for ``hf-hub:`` and ``local-dir:`` names, addresses and paths.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise SparsifinerError(
            f"{file} names the model {shown(name)}; a saved model may name an architecture of timm only, not where to "
            f"fetch one"
        )


def check_model_args(arguments: object, file: object) -> None:
    """Refuse arguments of ``timm.create_model`` that say where to load something from.

    Args:
        arguments: as ``file`` gives them.
        file: which holds them.

    Raises:
        SparsifinerError: for names that choose weights, and values that are paths or addresses.
    """
    if not isinstance(arguments, Mapping):
        raise SparsifinerError(f"model_args in {file} must be arguments by name, got {shown(arguments)}")
    for name, value in arguments.items():
        if not isinstance(name, str) or name in ("checkpoint_path", "cache_dir") or name.startswith("pretrained"):
            raise SparsifinerError(
                f"model_args in {file} hold {shown(name)}, which chooses other weights than the folder's own; remove it"
            )
        if path := next((text for text in _texts(value) if re.search(r"[/\\:]", text)), None):
            raise SparsifinerError(
                f"model_args in {file} hold {name}={shown(path)}, a path or an address; a saved model may only name "
                f"what lies in its folder"
            )


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and named values, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value, *value.values()):
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
