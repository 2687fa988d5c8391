"""The library's operations as PyTorch's dispatcher knows them, and the backends that have kernels for them.

Every operation is one ``torch.library`` operation ``sparsifiner::<name>`` whose last argument names a backend. Its body
looks up that backend's kernel, or with ``auto`` the first one that can serve the call, and runs it as it was written:
no autocast. Derivatives are taken around the operations (:meth:`Operation.__call__`), never inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..errors import SparsifinerError

NAMESPACE = "sparsifiner"
AUTO, REFERENCE = "auto", "reference"

Kernel = Callable[..., Any]
"""A function of an operation's arguments, in the order of its schema and without the backend."""

WhyNot = Callable[..., "str | None"]
"""``why_not(operation, *, needs_gradients, **arguments)``: why a backend cannot serve a call, in words, or None."""

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATIONS: dict[str, Operation] = {}
_BACKENDS: dict[str, Backend] = {}
_AUTOMATIC: dict[str, tuple[Backend, ...]] = {}
"""For each operation the backends that ``auto`` asks, in this order."""


@dataclass(frozen=True)
class Backend:
    """Kernels for some of the operations.

    Args:
        name: what callers write.
        device_types: devices of the tensors it takes, as in ``torch.device.type``; None for all.
        kernels: a kernel per operation it serves.
        why_not: its answer to calls it cannot serve.
        automatic: whether ``auto`` may choose it; or a function of a device that says why not, or None.
    """

    name: str
    device_types: tuple[str, ...] | None
    kernels: Mapping[str, Kernel]
    why_not: WhyNot
    automatic: bool | Callable[[torch.device], str | None]

    def is_elsewhere(self, arguments: Mapping[str, Any]) -> bool:
        """True for a backend of other devices that most machines lack, which ``auto`` need not speak of."""
        if not callable(self.automatic) or self.device_types is None:
            return False
        return _device_type(arguments.values()) not in self.device_types

    def refusal(self, operation: Operation, needs_gradients: bool, arguments: Mapping[str, Any]) -> str | None:
        """Why it cannot serve a call of an operation it has a kernel for, in words, or None if it can."""
        if self.device_types is not None:
            device = _device_type(arguments.values())
            if device not in self.device_types:
                return f"it runs on {' and '.join(self.device_types)}, the tensors are on {device}"
        return self.why_not(operation.name, needs_gradients=needs_gradients, **arguments)


class Operation:
    """One operation: its name, its ``torch.library`` schema, and what holds for every backend.

    Args:
        name: the operation is ``torch.ops.sparsifiner.<name>``.
        schema: arguments and results as ``torch.library.define`` takes them; ``str backend`` is added at the end.
        reference: plain PyTorch on any device, differentiable where a derivative is defined.
        fake: shapes and dtypes of the results.
        batched: names of the arguments whose first dimension counts images, for ``torch.func.vmap``. Those of
            ``shared`` may have size 1 there instead.
        shared: see ``batched``.
        flops: floating-point operations from the arguments, tensors given as shapes; None where there are no products.
        differentiable: whether results have derivatives. Others detach their arguments.
        backward: the operation that gives ``(gradient of the result, *arguments)`` the gradients of the floating-point
            tensors among the arguments; by default the reference is differentiated.
        gradient_of: the name of the operation whose gradients this one gives.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Kernel,
        fake: Kernel,
        batched: Sequence[str],
        shared: Sequence[str] = (),
        flops: Callable[..., int] | None = None,
        differentiable: bool = False,
        backward: Operation | None = None,
        gradient_of: str | None = None,
    ) -> None:
        self.name, self.reference, self.batched, self.shared = name, reference, tuple(batched), tuple(shared)
        self.differentiable, self.backward, self.gradient_of = differentiable, backward, gradient_of
        arguments, results = schema.rsplit(") ->", 1)
        _LIBRARY.define(f"{name}{arguments}, str backend) ->{results}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        if gradient_of is not None:  # its reference differentiates
            _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", self._run_mapped, lib=_LIBRARY)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.op: Callable[..., Any] = packet.default
        self.arguments = tuple(argument.name for argument in packet.default._schema.arguments)[:-1]
        if flops is not None and packet not in flop_registry:
            register_flop_formula(packet)(flops)
        OPERATIONS[name] = self

    def __call__(self, *arguments: Any, backend: str = AUTO) -> Any:
        """Run the operation on ``arguments``, so that derivatives of every kind are right or refused.

        Reverse mode (``backward``, ``torch.func.grad``, also under ``vmap`` and twice) goes around the operation;
        forward mode (``torch.func.jvp``, ``forward_ad``) goes through the reference. Graphs of ``torch.export`` and
        ``torch.jit.trace`` are for inference: they choose their kernels where they run.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self.op(*arguments, backend)
        if not needs_derivatives(*arguments):
            return self.op(*arguments, backend)
        if not self.differentiable:
            return self.op(*(x.detach() if isinstance(x, Tensor) else x for x in arguments), backend)
        if forward_ad._current_level >= 0:
            if backend not in (AUTO, REFERENCE):
                raise SparsifinerError(
                    f"backend {backend!r} cannot run here: it has no forward-mode derivatives (torch.func.jvp, "
                    f"jacfwd, forward_ad); use backend='auto' or 'reference'"
                )
            chosen = REFERENCE
        else:
            chosen, _ = serving(self, backend, True, self.named(arguments))
        if chosen == REFERENCE:
            with no_autocast(arguments):
                return self.reference(*arguments)
        return _Differentiable.apply(self.name, chosen, *arguments)

    def named(self, arguments: Iterable[Any]) -> dict[str, Any]:
        """The arguments by their names in the schema."""
        return dict(zip(self.arguments, arguments))  # noqa: B905  (strict costs half a microsecond, and callers may give less)

    def kernel(self, backend: str) -> Kernel:
        """The kernel of a backend that has one."""
        return self.reference if backend == REFERENCE else _BACKENDS[backend].kernels[self.name]

    def _run(self, *arguments: Any) -> Any:
        inputs, backend = arguments[:-1], arguments[-1]
        kernel = self.kernel(serving(self, backend, False, self.named(inputs))[0])
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(_device_type(inputs)):
            return kernel(*inputs)
        with torch.no_grad(), no_autocast(inputs):
            return kernel(*inputs)

    def _run_mapped(self, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """The rule for ``torch.func.vmap``: the mapped dimension joins that of the images."""
        values = self.named(arguments)
        for name, dim in zip(values, in_dims, strict=False):
            if not isinstance(values[name], Tensor):
                continue
            if name in self.batched:
                value = values[name]
                values[name] = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            elif dim is not None:
                raise SparsifinerError(f"sparsifiner::{self.name} cannot be mapped over {name}, which images share")
        batch = values[self.batched[0]].shape[1]
        expanded = [x for x in self.shared if values[x] is not None and values[x].shape[1] != batch]
        for name in expanded:
            values[name] = values[name].expand(-1, batch, *values[name].shape[2:])
        folded = [x.flatten(0, 1) if name in self.batched and x is not None else x for name, x in values.items()]
        results = self.op(*folded, arguments[-1])
        results = pytree.tree_map(lambda x: x.unflatten(0, (info.batch_size, batch)), results)
        if self.gradient_of is not None:  # one result per number among the arguments but the first
            names = [name for name in self.arguments[1:] if has_gradient(values[name])]
            for name in expanded:
                results[names.index(name)] = results[names.index(name)].sum(1, keepdim=True)
        return results, 0


def register_backend(
    name: str,
    *,
    kernels: Mapping[str, Kernel],
    why_not: WhyNot | None = None,
    device_type: str | tuple[str, ...] | None = None,
    automatic: bool | Callable[[torch.device], str | None] = False,
) -> None:
    """Add a backend, which then serves wherever a backend can be named.

    Args:
        name: what callers write, ``backend="name"``.
        kernels: a function per operation, called with the arguments of the operation's schema
            (``torch.ops.sparsifiner.<operation>``) but the backend. Operations left out are the references'.
        why_not: called as ``why_not(operation, *, needs_gradients, **arguments)``; returns why the backend cannot
            serve the call, in words, or None. ``arguments`` may lack some where only the question is asked. Without it
            every call that needs no gradients is served.
        device_type: devices of the tensors it takes, as in ``torch.device.type``; None for all.
        automatic: whether ``auto`` may choose it: before those that take any device, after those registered earlier.
            A function is asked, with the tensors' device, why it may not on this machine; None where it may.

    Raises:
        ValueError: if the name is taken or there is no such operation.
    """
    if name in (AUTO, REFERENCE) or name in _BACKENDS:
        raise SparsifinerError(f"there is a backend {name!r} already; unregister_backend({name!r}) removes yours")
    for operation in kernels:
        if operation not in OPERATIONS:
            raise SparsifinerError(f"there is no operation {operation!r}; choose from {', '.join(OPERATIONS)}")
    devices = (device_type,) if isinstance(device_type, str) else device_type
    _BACKENDS[name] = Backend(name, devices, dict(kernels), why_not or _refuse_gradients, automatic)
    _order_backends()


def unregister_backend(name: str) -> None:
    """Remove a backend added by :func:`register_backend`."""
    if _BACKENDS.pop(name, None) is None:
        raise SparsifinerError(f"there is no backend {name!r} to remove")
    _order_backends()


def _order_backends() -> None:
    candidates = [backend for backend in _BACKENDS.values() if backend.automatic]
    candidates.sort(key=lambda backend: backend.device_types is None)  # those for any device come last
    for name in OPERATIONS:
        _AUTOMATIC[name] = tuple(backend for backend in candidates if name in backend.kernels)


@contextmanager
def registered_backend(name: str, **settings: Any) -> Iterator[None]:
    """:func:`register_backend` while the block runs."""
    register_backend(name, **settings)
    try:
        yield
    finally:
        unregister_backend(name)


def backends() -> tuple[str, ...]:
    """Names of all backends, the references first."""
    return (REFERENCE, *_BACKENDS)


def serving(operation: Operation, backend: str, needs_gradients: bool, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Which backend serves a call, and why, in words.

    Args:
        operation: the operation.
        backend: a backend's name, or ``auto``: the backends of the tensors' device, those that take any device, and
            last the reference, in this order.
        needs_gradients: whether the results have to be differentiated.
        arguments: of the call, by their names in the schema; those that no backend asks about may be missing.

    Raises:
        ValueError: if there is no such backend, or it has a kernel for the operation which cannot serve this call.
            Operations for which it has none are the reference's.
    """
    if backend == AUTO:
        reasons: list[str] = []
        for candidate in _AUTOMATIC.get(operation.name, ()):
            if candidate.is_elsewhere(arguments):
                continue
            reason = candidate.refusal(operation, needs_gradients, arguments)
            if reason is None and callable(candidate.automatic):
                reason = candidate.automatic(_device(arguments.values()))
            if reason is None:
                return candidate.name, "; ".join(reasons) or f"{candidate.name} has a kernel for this call"
            reasons.append(f"{candidate.name} cannot run here: {reason}")
        return REFERENCE, "; ".join(reasons) or "no backend has a kernel for it"
    if backend == REFERENCE:
        return REFERENCE, "it was asked for"
    if backend in _BACKENDS and operation.name not in _BACKENDS[backend].kernels:
        return REFERENCE, f"{backend} has no kernel for {operation.name}"
    reason = refusal(operation, backend, needs_gradients, arguments)
    if reason is not None:
        raise SparsifinerError(f"backend {backend!r} cannot run here: {reason}")
    return backend, "it was asked for"


def refusal(operation: Operation, backend: str, needs_gradients: bool, arguments: Mapping[str, Any]) -> str | None:
    """Why a backend's own kernel cannot serve a call, in words, or None if it can; arguments as in :func:`serving`."""
    if backend == REFERENCE:
        return None
    if backend not in _BACKENDS:
        return f"there is no such backend; choose one of {', '.join((AUTO, *backends()))}"
    if operation.name not in _BACKENDS[backend].kernels:
        return f"it has no kernel for {operation.name}"
    return _BACKENDS[backend].refusal(operation, needs_gradients, arguments)


def devices_here(backend: str) -> tuple[str, ...]:
    """Types of the devices of this machine whose tensors a backend takes; the CPU for one that takes any."""
    types = _BACKENDS[backend].device_types
    if types is None:
        return ("cpu",)
    return tuple(name for name in types if name == "cpu" or getattr(torch, name).is_available())


def needs_derivatives(*arguments: Any) -> bool:
    """True where derivatives of a function of these arguments are recorded, in whatever mode."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return True
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() == torch._C._functorch.TransformType.Grad for transform in transforms)


def no_autocast(arguments: Iterable[Any]) -> AbstractContextManager[Any]:
    """Products as they are written where the caller's autocast would round them."""
    device = _device_type(arguments)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _device_type(arguments: Iterable[Any]) -> str:
    return _device(arguments).type


def _device(arguments: Iterable[Any]) -> torch.device:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
    raise SparsifinerError("an operation needs a tensor among its arguments")


def _refuse_gradients(operation: str, *, needs_gradients: bool, **arguments: Any) -> str | None:
    return "it has no backward pass and gradients are needed" if needs_gradients else None


class _Differentiable(torch.autograd.Function):
    """``apply(operation, backend, *arguments)``: an operation with one result, differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, backend: str, *arguments: Any) -> Any:
        return OPERATIONS[name].op(*arguments, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.backend, *arguments = inputs
        _save(ctx, arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        operation, arguments = OPERATIONS[ctx.name], _saved(ctx)
        if operation.backward is None:
            with no_autocast(arguments):
                found = iter(gradients(operation.reference, arguments, grad))
        elif torch.compiler.is_compiling():
            found = iter(operation.backward.op(grad, *arguments, ctx.backend))
        else:
            found = iter(_Gradients.apply(operation.backward.name, ctx.backend, grad, *arguments))
        return None, None, *(next(found) if has_gradient(x) else None for x in arguments)


class _Gradients(torch.autograd.Function):
    """``apply(operation, backend, gradient, *arguments)``: gradients, differentiable by the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, backend: str, grad: Tensor, *arguments: Any) -> Any:
        return tuple(OPERATIONS[name].op(grad, *arguments, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, _, *arguments = inputs
        _save(ctx, arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, *arguments = _saved(ctx)
        original = OPERATIONS[str(OPERATIONS[ctx.name].gradient_of)]

        def once(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            return gradients(original.reference, arguments, grad)

        with no_autocast(arguments):
            found = iter(gradients(once, [grad, *arguments], grads))
        return None, None, *(next(found) if has_gradient(x) else None for x in (grad, *arguments))


def has_gradient(argument: Any) -> bool:
    """True for a tensor of floating-point numbers, which has a gradient."""
    return isinstance(argument, Tensor) and argument.is_floating_point()


def gradients(function: Kernel, arguments: Sequence[Any], grad: Any) -> tuple[Tensor, ...]:
    """Gradients of the floating-point tensors among ``arguments``, differentiable themselves."""
    numbers = [x for x in arguments if has_gradient(x)]

    def of_numbers(*numbers: Tensor) -> Any:
        given = iter(numbers)
        return function(*(next(given) if has_gradient(x) else x for x in arguments))

    return tuple(torch.func.vjp(of_numbers, *numbers)[1](grad))


def _save(ctx: Any, arguments: Sequence[Any]) -> None:
    ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in arguments]


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]
