"""Index tensors that depend on shapes only, made once per shape and device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Made = TypeVar("Made")


def cached_tensors(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep the tensors that ``make`` returns, which depend on its arguments only: numbers and devices.

    A compiler traces the arithmetic instead, and folds it into constants: a tensor made while tracing, or under
    ``FakeTensorMode``, must not outlive that in a cache.
    """

    @lru_cache(maxsize=256)
    def kept(*args: object) -> Made:
        with torch.inference_mode(False):  # so that autograd may save them
            return make(*args)

    @wraps(make)
    def made(*args: object) -> Made:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
            return make(*args)
        return kept(*args)

    return made
