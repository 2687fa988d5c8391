"""Registration with transformers when, and only when, the program imports it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from functools import wraps
from types import ModuleType
from typing import Any

_WATCHED = "transformers.modeling_utils"


def connect(modeling: Any) -> None:
    """Register ``attn_implementation="sparsifiner"``, and convert models that are built with it.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """
    base = modeling.PreTrainedModel
    if hasattr(base.post_init, "_sparsifiner"):
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from .transformers import NAME, convert_new, sparse_attention_forward

    original = base.post_init

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        if vars(self.config).get(NAME) is not None or self.config._attn_implementation == NAME:
            convert_new(self)

    post_init._sparsifiner = True  # type: ignore[attr-defined]
    base.post_init = post_init
    modeling.AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        connect(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def watch() -> None:
    """Call :func:`connect` now if transformers is loaded, or as soon as the program loads it."""
    modeling = sys.modules.get(_WATCHED)
    if modeling is not None:
        connect(modeling)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
