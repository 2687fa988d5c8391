"""Adapters by the dense class they take over."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...errors import SparsifinerError
from ..layer import SparseAttention
from ..module_state import why_not_movable
from .decomposed import find_decomposed_adapter
from .packed import find_packed_adapter
from .refused import REFUSED, Refusal

Adapter = type[SparseAttention]
"""A subclass of ``SparseAttention`` that says how q, k, v of one dense class come about and what follows attention."""

_ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register_adapter(dense_class: type[nn.Module], sparse_class: Adapter) -> None:
    """Let :func:`sparsifiner.sparsify` convert attention modules of exactly ``dense_class``.

    Args:
        dense_class: the attention class of a model zoo.
        sparse_class: a subclass of ``SparseAttention``, and of ``dense_class`` where its methods are needed, with
            ``project`` (``x`` to q, k, v ``[B, H, N, D]`` and a bias or None) and ``merge`` (attended values
            ``[B, N, H * D]`` to the layer's output).

    Raises:
        SparsifinerError: if one of the two is not such a class.
    """
    for given, base in ((dense_class, nn.Module), (sparse_class, SparseAttention)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise SparsifinerError(f"register_adapter needs a subclass of {base.__name__}, got {given!r}")
    if "dense_class" not in vars(sparse_class):
        sparse_class.dense_class = dense_class
    _ADAPTERS[dense_class] = sparse_class


def register_attention(dense_class: type[nn.Module]) -> Callable[[type], Adapter]:
    """Decorator of a class with ``project`` and ``merge``: the sparse counterpart of ``dense_class``.

    The class gets ``SparseAttention`` and ``dense_class`` as further bases and is registered as by
    :func:`register_adapter`.

    Args:
        dense_class: the attention class whose modules :func:`sparsifiner.sparsify` shall convert.

    Raises:
        SparsifinerError: if the class lacks one of the two methods, or ``dense_class`` is no module's class.
    """

    def decorate(methods: type) -> Adapter:
        missing = [name for name in ("project", "merge") if not callable(getattr(methods, name, None))]
        if missing:
            raise SparsifinerError(
                f"{methods.__name__} needs the methods project (x to q, k, v [B, H, N, D]) and merge; it lacks "
                f"{' and '.join(missing)}"
            )
        if not (isinstance(dense_class, type) and issubclass(dense_class, nn.Module)):
            raise SparsifinerError(f"register_attention needs the class of a module, got {dense_class!r}")
        if issubclass(methods, SparseAttention):
            sparse: type = methods
        else:
            names = {name: getattr(methods, name) for name in ("__module__", "__qualname__", "__doc__")}
            sparse = type(methods.__name__, (methods, SparseAttention, dense_class), names)
        register_adapter(dense_class, sparse)
        return sparse

    return decorate


def find_adapter(module: nn.Module) -> Adapter | Refusal | None:
    """The sparse class for ``module``, the reason why there is none, or None if it is not attention."""
    adapter = _ADAPTERS.get(type(module))
    if adapter is not None:
        reason = adapter.refusal(module) or why_not_movable(module)
        return adapter if reason is None else Refusal(reason)
    name = type(module).__name__
    if name.endswith("Attention"):
        decomposed = find_decomposed_adapter(module)
        if decomposed is not None:
            return decomposed
    if type(module).__module__.startswith("transformers."):
        from .transformers import find_interface_adapter

        return find_interface_adapter(module)
    if name in REFUSED:
        return REFUSED[name]
    if isinstance(module, SparseAttention):
        return Refusal("it is sparse already; change it with set_keep_rate, or densify the model first")
    if name.endswith(("Attention", "Attn")):
        packed = None if type(module).__module__.startswith("timm.") else find_packed_adapter(module)
        if packed is not None:
            return packed
        return Refusal(f"there is no adapter for {type(module).__module__}.{name}")
    return None
