"""Everything an ``nn.Module`` instance holds, handed from one module to another: weights, hooks, attributes."""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparsifinerError

LEAF = "torch.nn"
"""As ``__module__`` of an instance it makes ``torch.fx`` call the module instead of looking into it, as it does with
PyTorch's own: attention asks for shapes, which symbols do not have. The class keeps its own."""

_NAMED = ("_parameters", "_buffers", "_modules")
_COMPILED = "_compiled_call_impl"
COMPILED = "it was compiled and would go on running as before; convert first, then compile"
"""The reason for modules after ``module.compile()`` or inside ``torch.compile(module)``."""
_DECORATORS = ("torch", "functools", "contextlib", "typing_extensions")
"""Packages whose decorators classes carry by themselves."""


def overridden_attributes(module: nn.Module) -> list[str]:
    """Names set on this instance that replace what its class does: a patched ``forward``, a compiled call.

    A converted module would go on doing what they say, dense, with nobody told.
    """
    own = vars(module)
    fresh = vars(nn.Module())
    shadowing = [
        name
        for name, value in own.items()
        if name not in fresh and callable(value) and callable(getattr(type(module), name, None))
    ]
    return shadowing + ([_COMPILED] if own.get(_COMPILED) is not None else [])


def replaced_method(kind: type) -> str | None:
    """A ``forward`` that somebody else has put on a module's class or its bases, in words, or None.

    The class that takes over has a ``forward`` of its own, so that what was put there would be lost with nobody told. A
    function knows the module that it was written in, also where ``functools.wraps`` names another.
    """
    for base in kind.__mro__:
        if base is nn.Module:
            return None
        for name in ("forward", "__call__"):
            function: Any = vars(base).get(name)
            while isinstance(function, FunctionType):
                home = str(function.__globals__.get("__name__", base.__module__))
                if home.partition(".")[0] not in (base.__module__.partition(".")[0], *_DECORATORS):
                    return f"{name} of the class {base.__name__} was replaced by a function of {home}"
                function = getattr(function, "__wrapped__", None)
    return None


def why_not_movable(module: nn.Module, path: str = "") -> str | None:
    """The reason why ``module`` cannot be converted although its class can, with the remedy, or None.

    Hooks of ``accelerate`` replace ``forward`` as well; :func:`move_state` carries them over.
    """
    replaced = replaced_method(type(module))
    if replaced is not None:
        return f"{replaced}, which the converted module would not run; take that back and convert first"
    names = [name for name in overridden_attributes(module) if not (name == "forward" and _accelerate_hook(module))]
    if not names:
        return None
    if _COMPILED in names:
        return COMPILED
    return (
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} replaced on this instance, which would go on running "
        f"as before; take that back (del module.{names[0]}) and convert first"
    )


def move_state(source: nn.Module, target: nn.Module, skip: tuple[str, ...] = ()) -> None:
    """Give ``target`` the parameters, buffers, submodules, hooks and attributes of ``source``, by reference.

    Handles of hooks stay valid: the tables of hooks themselves change hands. Hooks that know their module (of
    ``state_dict``) know the new one. ``source`` must not be used afterwards.

    Args:
        source: the module to take over.
        target: a module after ``nn.Module.__init__``.
        skip: names that stay behind.

    Raises:
        SparsifinerError: if something set on ``source`` replaces what its class does.
    """
    hook = _accelerate_hook(source)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(source)
        if getattr(vars(source).get("forward"), "__func__", None) is type(source).forward:
            del source.forward  # put back by accelerate as an attribute of the instance
    reason = why_not_movable(source)
    if reason is not None:
        raise SparsifinerError(f"cannot convert {type(source).__name__}: {reason}")
    fresh = vars(nn.Module())
    for name, value in vars(source).items():
        if name in (*skip, "training", "__module__"):
            continue
        if name in _NAMED:
            vars(target)[name].update({k: v for k, v in value.items() if k not in skip})
        elif name in fresh:
            vars(target)[name] = value
        else:
            setattr(target, name, value)
    for name in fresh:
        if name.endswith("_hooks") and isinstance(vars(target)[name], dict):
            _rebind(vars(target)[name], source, target)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(target, hook)


def _rebind(hooks: dict[int, Any], source: nn.Module, target: nn.Module) -> None:
    """Point hooks that hold their module weakly to ``target``."""
    for hook in hooks.values():
        held = getattr(hook, "module", None)
        if isinstance(held, weakref.ref) and held() is source:
            hook.module = weakref.ref(target)


def _accelerate_hook(module: nn.Module) -> Any:
    return getattr(module, "_hf_hook", None)


def weight_like(module: nn.Module) -> Tensor:
    """A floating-point tensor of ``module``, for its device and dtype; float32 on the CPU where there is none.

    Quantized linears and adapters hold their weights as they like.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)
