"""Swap a model's dense attention layers for sparse ones, and back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ._utils import checks
from ._utils.copying import copy_model
from ._utils.messages import shown
from .attention.adapters import Refusal, find_adapter
from .attention.layer import SparseAttention
from .attention.markers import mark, unmark
from .attention.module_state import COMPILED
from .attention.policy import Policy, check_fit
from .config import SparsifinerConfig
from .errors import SparsifinerError
from .geometry.conv_grid import GridSource, count_prefix_tokens
from .geometry.patch_grid import PatchGrid, add_grid_hook, drop_unused_grids
from .ops.attend import why_never

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Swapped:
    """An attention layer that became sparse: its path in the model and the class it had."""

    name: str
    dense_class: str


@dataclass(frozen=True)
class StayedDense:
    """A module that stayed as it was: its path, its class and the reason.

    ``costly`` is False where it costs O(N) already.
    """

    name: str
    dense_class: str
    reason: str
    costly: bool = True


@dataclass(frozen=True)
class Conversion:
    """Result of :func:`sparsify` for a model, layer by layer; ``str()`` of it is a summary.

    Args:
        swapped: layers that became sparse.
        stayed: modules that stayed dense, and why.
        notes: what no longer works as it did, such as hooks of modules that a sparse layer does not run.
        grid: path of the convolution and number of prefix tokens that the caller named, or None.
    """

    swapped: list[Swapped] = field(default_factory=list)
    stayed: list[StayedDense] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    grid: tuple[str, int] | None = None

    def __str__(self) -> str:
        classes = ", ".join(sorted({item.dense_class for item in self.swapped}))
        lines = [f"{len(self.swapped)} attention layers made sparse ({classes})"]
        lines += [f"left as it was: {item.name} ({item.dense_class}): {item.reason}" for item in self.stayed]
        return "\n".join([*lines, *self.notes])


def sparsify(
    model: M,
    config: SparsifinerConfig | None = None,
    *,
    keep_rate: float | Sequence[float] | None = None,
    grid: GridSource | None = None,
    num_prefix_tokens: int | None = None,
    inplace: bool = False,
) -> M:
    """Make the attention of a Vision Transformer sparse, different for every image.

    The model is copied unless ``inplace``; the original stays dense and untouched. Weights keep their
    names in the state dict. :func:`conversion` lists what was swapped and what was left and why.

    Args:
        model: a model of timm, transformers, torchvision, open_clip or a repository of its own, or any module that
            contains one.
        config: all settings; the training-free default if None.
        keep_rate: share of keys to keep, for all layers or one per layer; overrides the one in ``config``.
        grid: the convolution that makes the patches, for models where it is not found, such as
            ``GridSource.from_conv("conv_proj")``; it serves all layers.
        num_prefix_tokens: with ``grid``, class and register tokens before the patches; counted by the names of the
            model's parameters if None.
        inplace: convert ``model`` itself and return it.

    Returns:
        The sparse model; its ``forward`` takes and returns what the dense model's does.

    Raises:
        SparsifinerError: if no attention layer can be converted (the reasons are listed), the model drops patches,
            ``config`` is no configuration, a keep rate is out of range, ``grid`` names no convolution, the patch grid
            has no room for a tile with ``mode="sparse"``, or the backend cannot run on this machine whatever becomes
            of the model. ``model`` is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise SparsifinerError(
            f"sparsify takes a model, an nn.Module such as timm.create_model(...) returns; got {shown(model)}"
        )
    if config is None:
        config = SparsifinerConfig()
    elif not isinstance(config, SparsifinerConfig):
        raise SparsifinerError(
            f"config must be a SparsifinerConfig, got {type(config).__name__}; "
            f"use keep_rate=0.1 or SparsifinerConfig(keep_rate=0.1)"
        )
    if keep_rate is not None:
        config = config.replace(keep_rate=keep_rate)
    _check_grid(grid, num_prefix_tokens)
    if not inplace:
        model = copy_model(model)
    found, stayed = _survey(model, grid)
    if not found:
        raise SparsifinerError(_nothing_to_convert(model, stayed))
    grids: dict[str, PatchGrid] = {}
    # Every layer is built before the first is swapped, so that a failure leaves the model as it was.
    layers: list[SparseAttention] = []
    for number, layer in enumerate(found):
        dense, layer_config = model.get_submodule(layer.paths[0]), config.for_layer(number, len(found))
        adapter = find_adapter(dense)
        assert isinstance(adapter, type)
        if grid is not None and not grids:
            tokens = count_prefix_tokens(model) if num_prefix_tokens is None else num_prefix_tokens
            grids[layer.owner] = grid.follow(model, tokens)
        if layer.owner not in grids:
            grids[layer.owner] = adapter.follow_grid(_owner_of(model, layer.owner), dense)
        check_fit(grids[layer.owner].shape, layer_config)
        layers.append(adapter(dense, layer_config, grids[layer.owner]))
        if (reason := why_never(config.backend, layers[-1].head_width())) is not None:
            raise SparsifinerError(f"backend {config.backend!r} cannot run here: {reason}")
    for sparse, layer in zip(layers, found, strict=True):
        add_grid_hook(sparse.register_forward_pre_hook, sparse._forward_pre_hooks, grids[layer.owner], "attended")
        for path in layer.paths:
            if sparse.child is None:
                model.set_submodule(path, sparse)
            else:
                model.get_submodule(path).add_module(sparse.child, sparse)
    for owner, followed in grids.items():
        blocks = [_block_of(model, path) for layer in found if layer.owner == owner for path in layer.paths]
        followed.attach(_owner_of(model, owner), [model.get_submodule(block) for block in blocks if block != owner])
    mark(model)
    swapped = [Swapped(path, layer.dense_class) for layer in found for path in layer.paths]
    notes = [f"{layer.paths[0]}.{name}: {why}" for layer in found for name, why in layer.unused_hooks.items()]
    named = None if grid is None else (grid.conv, grids[""].num_prefix_tokens)
    vars(model)["_sparsifiner_conversion"] = Conversion(swapped, stayed, notes, named)
    costly = Counter((item.dense_class, item.reason) for item in stayed if item.costly)
    for (dense_class, reason), count in costly.items():
        warnings.warn(f"{count} {dense_class} left dense: {reason}", stacklevel=2)
    return model


def sparsify_as_saved(model: M, config: SparsifinerConfig) -> M:
    """:func:`sparsify` a model in place by settings that came with it.

    A backend that cannot run on this machine is left to the forward pass to refuse: the model can be looked at, moved,
    changed and saved.
    """
    sparsify(model, config.replace(backend="auto"), inplace=True)
    for layer in sparse_layers(model).values():
        layer.configure(layer.config.replace(backend=config.backend))
    mark(model)
    return model


def densify(model: M, *, inplace: bool = False) -> M:
    """The inverse of :func:`sparsify`: dense attention with the current weights, predictors dropped.

    Args:
        model: a sparse model. It is copied unless ``inplace``.

    Raises:
        ValueError: if no layer of ``model`` is sparse.
    """
    sparse_layers(model)
    if not inplace:
        model = copy_model(model)
    layers = [item for item in model.named_modules(remove_duplicate=False) if isinstance(item[1], SparseAttention)]
    dense: dict[int, nn.Module] = {}
    for _, layer in layers:
        if layer.child is None and id(layer) not in dense:
            dense[id(layer)] = layer.to_dense()
    for name, layer in layers:
        if id(layer) in dense:
            model.set_submodule(name, dense[id(layer)])
        else:
            parent, _, child = name.rpartition(".")
            vars(model.get_submodule(parent))["_modules"].pop(child, None)
        vars(layer).pop("grid", None)
    unmark(model)
    del layer, layers
    drop_unused_grids(model)
    for module in model.modules():
        vars(module).pop("_sparsifiner_conversion", None)
    return model


def conversion(model: nn.Module) -> Conversion:
    """Layers of ``model`` that :func:`sparsify` swapped, and those it left and why."""
    record = getattr(model, "_sparsifiner_conversion", None)
    if record is None:
        raise SparsifinerError(f"{type(model).__name__} is not the result of sparsify()")
    return record


def sparse_layers(model: nn.Module) -> dict[str, SparseAttention]:
    """The sparse attention layers by their path in the model, in order.

    Raises:
        ValueError: if there is none.
    """
    layers = find_sparse_layers(model)
    if not layers:
        raise SparsifinerError(f"{type(model).__name__} has no sparse attention layer; call sparsify(model) first")
    return layers


def find_sparse_layers(model: nn.Module) -> dict[str, SparseAttention]:
    """:func:`sparse_layers` for a model that may be dense: empty then.

    Raises:
        SparsifinerError: if ``model`` is no model.
    """
    if not isinstance(model, nn.Module):
        raise SparsifinerError(f"a model is needed, an nn.Module such as sparsify(...) returns; got {shown(model)}")
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttention)}


def is_sparse(model: nn.Module) -> bool:
    """True for a model with sparse layers."""
    return any(isinstance(module, SparseAttention) for module in model.modules())


@contextmanager
def always_sparse(model: nn.Module) -> Iterator[None]:
    """Sparse attention at every size while the block runs, for numbers about sparsity: by itself a model in
    evaluation mode attends densely where that is faster. Dense models stay dense."""
    with use_policy(model, Policy("sparse")):
        yield


@contextmanager
def use_policy(model: nn.Module, policy: Policy) -> Iterator[None]:
    """Let all sparse layers decide by ``policy`` while the block runs."""
    layers = list(find_sparse_layers(model).values())
    before = [layer.override for layer in layers]
    try:
        for layer in layers:
            layer.override = policy
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.override = own


def set_keep_rate(model: nn.Module, keep_rate: float | Sequence[float]) -> None:
    """Change the keep rate of all layers, or of each, in place and without new weights."""
    layers = sparse_layers(model)
    configs = [
        layer.config.replace(keep_rate=keep_rate).for_layer(number, len(layers))
        for number, layer in enumerate(layers.values())
    ]
    for layer, config in zip(layers.values(), configs, strict=True):
        layer.configure(config)
    mark(model)


@dataclass(frozen=True)
class _Found:
    """An attention layer to convert: its paths (several where blocks share it), its model's path and its class."""

    paths: list[str]
    owner: str
    dense_class: str
    unused_hooks: dict[str, str]


def _check_grid(grid: GridSource | None, num_prefix_tokens: int | None) -> None:
    if grid is not None and not isinstance(grid, GridSource):
        raise SparsifinerError(f'grid must be a GridSource, such as GridSource.from_conv("conv_proj"); got {grid!r}')
    if num_prefix_tokens is not None:
        checks.number("num_prefix_tokens", num_prefix_tokens, least=0, integer=True)
        if grid is None:
            raise SparsifinerError("num_prefix_tokens goes with grid=GridSource.from_conv(...), which is missing")


def _survey(model: nn.Module, grid: GridSource | None = None) -> tuple[list[_Found], list[StayedDense]]:
    """Attention layers to convert, each with the path of the model that embeds its patches; and the others."""
    found: dict[int, _Found] = {}
    stayed: list[StayedDense] = []
    for name, module in model.named_modules(remove_duplicate=False):
        adapter = find_adapter(module)
        if isinstance(adapter, type) and name.rpartition(".")[2] == "_orig_mod":
            adapter = Refusal(COMPILED)
        if isinstance(adapter, type):
            owner = adapter.find_owner(model, name)
            if grid is not None and (not isinstance(owner, Refusal) or owner.lacks_grid):
                owner = ""
            if isinstance(owner, str):
                _check_patch_drop(_owner_of(model, owner))
                layer = found.setdefault(id(module), _Found([], owner, type(module).__name__, _hooks_that_stop(module)))
                layer.paths.append(name)
                continue
            adapter = owner or Refusal(
                f"no module above it has {adapter.tells_grid}, so the patch grid is unknown; pass "
                f'grid=GridSource.from_conv("path.of.the.convolution")'
            )
        if adapter is not None:
            stayed.append(StayedDense(name, type(module).__name__, adapter.reason, adapter.costly))
    return list(found.values()), stayed


def _hooks_that_stop(attention: nn.Module) -> dict[str, str]:
    """Hooks on the dropout of attention weights: a sparse layer has no map of all weights to drop from."""
    dropout = getattr(attention, "attn_drop", None)
    if isinstance(dropout, nn.Module) and (
        dropout._forward_hooks or dropout._forward_pre_hooks or dropout._backward_hooks or dropout._backward_pre_hooks
    ):
        return {
            "attn_drop": "its hooks are not called any more, since a sparse layer has no dense attention weights; "
            "use sparsifiner.record(model) to see the connectivity"
        }
    return {}


def _check_patch_drop(owner: Any) -> None:
    drop = getattr(owner, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise SparsifinerError(
            f"cannot sparsify {type(owner).__name__}: it drops patches at random in training, which leaves no patch "
            f"grid; build it with patch_drop_rate=0"
        )


def _block_of(model: nn.Module, path: str) -> str:
    """The block of the attention layer at ``path``: the module in a list of modules around it, or the one above it."""
    block = path.rpartition(".")[0]
    above = block
    while above:
        parent = above.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)):
            return above
        above = parent
    return block


def _owner_of(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _nothing_to_convert(model: nn.Module, stayed: list[StayedDense]) -> str:
    counts = Counter((item.dense_class, item.reason) for item in stayed)
    found = "; ".join(f"{count} {name}: {reason}" for (name, reason), count in counts.items())
    return f"nothing to convert in {type(model).__name__}: {found or 'it has no attention layer that timm ViTs use'}"
