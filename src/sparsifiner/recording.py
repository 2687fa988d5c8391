"""A look at the attention of a forward pass. Nothing is kept unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn

from .attention.attend import LayerRecord
from .attention.layer import SparseAttention
from .config import SparsifinerConfig
from .convert import sparse_layers, sparsify
from .predictors import LocalConfig

See = Callable[[str, SparseAttention, LayerRecord], None]
"""Called with a layer's path, the layer, and what it does, tensors included, before it attends."""


@contextmanager
def observe(model: nn.Module, see: See, names: Collection[str] | None = None) -> Iterator[None]:
    """Call ``see`` for every attention call of the sparse layers while the block runs.

    Args:
        model: a sparse model.
        see: the observer.
        names: paths of the layers to watch; all if None.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if names is None or name in names}
    paths = {id(layer): name for name, layer in layers.items()}
    previous = {name: layer.observer for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.observer = lambda layer, did: see(paths[id(layer)], layer, did)
        yield
    finally:
        for name, layer in layers.items():
            layer.observer = previous[name]


@contextmanager
def record(model: nn.Module, *, tensors: bool = False) -> Iterator[dict[str, LayerRecord]]:
    """Keep the connectivity of every sparse layer while the block runs.

    ``with record(model) as seen: y = model(x)`` fills ``seen`` with a :class:`LayerRecord` per layer path,
    always of the latest forward pass.

    Args:
        model: a sparse model.
        tensors: keep q, k, v and the bias as well; they stay in memory as long as the records do.
    """
    seen: dict[str, LayerRecord] = {}

    def see(name: str, layer: SparseAttention, did: LayerRecord) -> None:
        seen[name] = did if tensors else LayerRecord(did.connectivity)

    with observe(model, see):
        yield seen


def observable_twin(dense: nn.Module) -> nn.Module:
    """A copy of a dense model that attends densely, too, and whose attention layers can be observed."""
    return sparsify(dense, SparsifinerConfig(predictor=LocalConfig(), query_tile=(1, 1), tail=None, mode="dense"))
