"""Copies of models."""

from __future__ import annotations

import copy
import inspect
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import SparsifinerError

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A deep copy of ``model``, also where modules hold tensors that were computed from parameters.

    The old ``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the weight they compute in every forward pass as
    an attribute, which torch does not copy. The copy gets its values, and computes it anew in its own forward pass.

    Raises:
        SparsifinerError: if a function put on a module, such as ``model.forward = lambda x: model.norm(x)``, uses
            modules of ``model``: the copy would go on running those.
    """
    known: dict[int, Any] = {}
    own = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        # A class with a state of its own, such as what torch.compile returns, makes its functions anew.
        plain = getattr(type(module), "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
            elif plain and _replaces(type(module), name, value) and _uses(value, own):
                place = f"{path}.{name}" if path else name
                raise SparsifinerError(
                    f"cannot copy {type(model).__name__}: {place} was replaced by a function that uses modules of this "
                    f"very model, and so would the copy's; convert with inplace=True, or make it a method "
                    f"(types.MethodType) that uses self"
                )
    return copy.deepcopy(model, known)


def _replaces(kind: type, name: str, value: Any) -> bool:
    return isinstance(value, FunctionType) and callable(getattr(kind, name, None))


def _uses(function: FunctionType, modules: set[int]) -> bool:
    """True if a function reads one of ``modules``, by ``id``, from its closure, its defaults or its globals."""
    seen = inspect.getclosurevars(function)
    values = [*seen.nonlocals.values(), *seen.globals.values()]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(id(value) in modules or id(getattr(value, "__self__", None)) in modules for value in values)
