"""Look at the connectivity of a forward pass. Nothing is kept unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .attention.layer import LayerRecord, SparseAttention
from .config import SparsifinerConfig
from .convert import sparse_layers, sparsify


@contextmanager
def record(model: nn.Module, *, tensors: bool = False) -> Iterator[dict[str, LayerRecord]]:
    """Keep the connectivity of every sparse layer while the block runs.

    ``with record(model) as seen: y = model(x)`` fills ``seen`` with a :class:`LayerRecord` per layer path,
    always of the latest forward pass.

    Args:
        model: a sparse model.
        tensors: keep q, k, v and the bias as well; they stay in memory as long as the records do.
    """
    layers = sparse_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    seen: dict[str, LayerRecord] = {}

    def observe(layer: SparseAttention, did: LayerRecord) -> None:
        seen[names[id(layer)]] = did if tensors else LayerRecord(did.connectivity)

    previous = {name: layer.observer for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.observer = observe
        yield seen
    finally:
        for name, layer in layers.items():
            layer.observer = previous[name]


def observable_twin(dense: nn.Module) -> nn.Module:
    """A copy of a dense model that attends densely, too, and whose attention layers tell q, k and v.

    Its layers are sparse ones in the paper's reconstruction phase, in which attention is the dense model's.
    """
    config = SparsifinerConfig(
        predictor="lowrank", attn_recon=True, query_tile=(1, 1), tail=None, n_down=1, reduce_c_factor=1
    )
    twin = sparsify(dense, config)
    for layer in sparse_layers(twin).values():
        layer.training = True  # this module alone; dropout inside it stays off
    return twin
