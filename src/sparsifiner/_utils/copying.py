"""Copies of models."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A deep copy of ``model``, also where modules hold tensors that were computed from parameters.

    The old ``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the weight they compute in every forward pass as
    an attribute, which torch does not copy. The copy gets its values, and computes it anew in its own forward pass.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    return copy.deepcopy(model, known)
