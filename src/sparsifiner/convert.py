"""Swap a model's dense attention layers for sparse ones, and back."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .attention.adapters import find_adapter
from .attention.adapters.refused import CHEAP
from .attention.layer import SparseAttention
from .config import SparsifinerConfig
from .errors import SparsifinerError
from .geometry.patch_grid import drop_unused_grids, find_grid, follow_grid
from .geometry.tiling import Tiling


@dataclass(frozen=True)
class Swapped:
    """An attention layer that became sparse: its path in the model and the class it had."""

    name: str
    dense_class: str


@dataclass(frozen=True)
class Left:
    """A module that stayed as it was: its path, its class and the reason."""

    name: str
    dense_class: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What :func:`sparsify` did to a model; ``str()`` of it is a summary."""

    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        classes = ", ".join(sorted({item.dense_class for item in self.swapped}))
        lines = [f"{len(self.swapped)} attention layers made sparse ({classes})"]
        lines += [f"left as it was: {item.name} ({item.dense_class}): {item.reason}" for item in self.left]
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    config: SparsifinerConfig | None = None,
    *,
    keep_rate: float | Sequence[float] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Make the attention of a timm Vision Transformer sparse, different for every image.

    The model is copied unless ``inplace``; the original stays dense and untouched. Weights keep their
    names in the state dict. :func:`conversion` lists what was swapped and what was left and why.

    Args:
        model: a timm model, or any module that contains one.
        config: all settings; the training-free default if None.
        keep_rate: share of keys to keep, for all layers or one per layer; overrides the one in ``config``.
        inplace: convert ``model`` itself and return it.

    Returns:
        The sparse model; its ``forward`` takes and returns what the dense model's does.

    Raises:
        ValueError: if no attention layer can be converted (the reasons are listed), ``config`` is no
            configuration, a keep rate is out of range, or the patch grid is smaller than a tile. ``model`` is
            unchanged then.
    """
    if config is None:
        config = SparsifinerConfig()
    elif not isinstance(config, SparsifinerConfig):
        raise SparsifinerError(
            f"config must be a SparsifinerConfig, got {type(config).__name__}; "
            f"use keep_rate=0.1 or SparsifinerConfig(keep_rate=0.1)"
        )
    if keep_rate is not None:
        config = config.replace(keep_rate=keep_rate)
    if not inplace:
        model = copy.deepcopy(model)
    owners, left = _survey(model)
    if not owners:
        raise SparsifinerError(_nothing_to_convert(model, left))
    grids = {owner: follow_grid(model.get_submodule(owner)) for owner in set(owners.values())}
    # Every layer is built before the first is swapped, so that a failure leaves the model as it was.
    layers: dict[str, SparseAttention] = {}
    swapped = []
    for number, (name, owner) in enumerate(owners.items()):
        dense, layer_config = model.get_submodule(name), config.for_layer(number, len(owners))
        check_fit(grids[owner].shape, layer_config)
        adapter = find_adapter(dense)
        assert isinstance(adapter, type)
        layers[name] = adapter(dense, layer_config, grids[owner])
        swapped.append(Swapped(name, type(dense).__name__))
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for owner, grid in grids.items():
        if find_grid(model.get_submodule(owner)) is None:
            model.get_submodule(f"{owner}.patch_embed".lstrip(".")).register_forward_hook(grid)
    model._sparsifiner_conversion = Conversion(swapped, left)  # type: ignore[assignment]
    costly = Counter((item.dense_class, item.reason) for item in left if item.reason not in CHEAP)
    for (dense_class, reason), count in costly.items():
        warnings.warn(f"{count} {dense_class} left dense: {reason}", stacklevel=2)
    return model


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The inverse of :func:`sparsify`: dense attention with the current weights, predictors dropped.

    Args:
        model: a sparse model. It is copied unless ``inplace``.

    Raises:
        ValueError: if no layer of ``model`` is sparse.
    """
    sparse_layers(model)
    if not inplace:
        model = copy.deepcopy(model)
    for name, layer in sparse_layers(model).items():
        model.set_submodule(name, layer.to_dense())
    drop_unused_grids(model)
    for module in model.modules():
        vars(module).pop("_sparsifiner_conversion", None)
    return model


def conversion(model: nn.Module) -> Conversion:
    """What :func:`sparsify` swapped in ``model``, and what it left and why."""
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
    """:func:`sparse_layers` for a model that may be dense: empty then."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttention)}


def is_sparse(model: nn.Module) -> bool:
    """Whether a model has sparse layers."""
    return any(isinstance(module, SparseAttention) for module in model.modules())


@contextmanager
def always_sparse(model: nn.Module) -> Iterator[None]:
    """Sparse attention at every size while the block runs, for numbers about sparsity: by itself a model in
    evaluation mode attends densely where that is faster. Dense models stay dense."""
    layers = list(find_sparse_layers(model).values())
    configs = [layer.config for layer in layers]
    try:
        for layer in layers:
            layer.configure(layer.config.replace(dense_below=0))
        yield
    finally:
        for layer, config in zip(layers, configs, strict=True):
            layer.configure(config)


def set_keep_rate(model: nn.Module, keep_rate: float | Sequence[float]) -> None:
    """Change the keep rate of all layers, or of each, in place and without new weights."""
    layers = sparse_layers(model)
    configs = [
        layer.config.replace(keep_rate=keep_rate).for_layer(number, len(layers))
        for number, layer in enumerate(layers.values())
    ]
    for layer, config in zip(layers.values(), configs, strict=True):
        layer.configure(config)


def _survey(model: nn.Module) -> tuple[dict[str, str], list[Left]]:
    """Paths of the layers to convert, each with the path of the model that embeds its patches; and the rest."""
    owners: dict[str, str] = {}
    left: list[Left] = []
    for name, module in model.named_modules():
        found = find_adapter(module)
        if isinstance(found, type):
            owner = _owner(model, name)
            if owner is not None:
                owners[name] = owner
                continue
            found = "no module above it has a patch_embed and num_prefix_tokens, so the patch grid is unknown"
        if found is not None:
            left.append(Left(name, type(module).__name__, found))
    return owners, left


def _owner(model: nn.Module, name: str) -> str | None:
    """Path of the nearest module above ``name`` that embeds the patches, or None."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        embed = getattr(module, "patch_embed", None)
        if hasattr(module, "num_prefix_tokens") and getattr(embed, "grid_size", None) is not None:
            return name
    return None


def check_fit(grid: tuple[int, int], config: SparsifinerConfig) -> None:
    """Refuse settings whose tiles or tail blocks are larger than the patch grid, rows and columns."""
    for rectangle in config.rectangles:
        Tiling(grid, rectangle)


def _nothing_to_convert(model: nn.Module, left: list[Left]) -> str:
    counts = Counter((item.dense_class, item.reason) for item in left)
    found = "; ".join(f"{count} {name}: {reason}" for (name, reason), count in counts.items())
    return f"nothing to convert in {type(model).__name__}: {found or 'it has no attention layer that timm ViTs use'}"
