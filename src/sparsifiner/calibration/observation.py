"""Dense passes through a sparse model, with a look at what each attention layer gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.layer import Observer, SparseAttention
from ..attention.policy import Policy
from ..convert import sparse_layers
from ..errors import SparsifinerError
from ..measure.fidelity import final_features
from ..reduction.pruning import is_pruned, kept_patches

Visit = Callable[[str, SparseAttention, Tensor, Tensor, Tensor, "Tensor | None"], None]
"""Called with a layer's path, the layer, q, k, v ``[B, H, N, D]`` and the bias of its logits or None."""


@contextmanager
def dense_attention(layers: Mapping[str, SparseAttention], visit: Visit | None = None) -> Iterator[None]:
    """While the block runs, ``layers`` attend densely; ``visit`` sees the input of each before it does."""

    def watch(name: str) -> Observer | None:
        if visit is None:
            return None
        return lambda layer, did: visit(name, layer, did.q, did.k, did.v, did.attn_bias)  # type: ignore[arg-type]

    before = [(layer.override, layer.observer) for layer in layers.values()]
    try:
        for name, layer in layers.items():
            layer.override, layer.observer = Policy("dense"), watch(name)
        yield
    finally:
        for layer, (override, observer) in zip(layers.values(), before, strict=True):
            layer.override, layer.observer = override, observer


@contextmanager
def sparse_again(layer: SparseAttention) -> Iterator[None]:
    """Inside :func:`dense_attention`: while the block runs, this layer attends sparsely."""
    dense, observer = layer.override, layer.observer
    layer.override, layer.observer = Policy("sparse"), None
    try:
        yield
    finally:
        layer.override, layer.observer = dense, observer


def visit_densely(model: nn.Module, x: Tensor, visit: Visit) -> tuple[Tensor, Tensor | None]:
    """One dense pass of ``x`` ``[1, 3, height, width]``; ``visit`` sees every attention layer's input in turn.

    Returns:
        The final dense features, as ``measure.fidelity.final_features`` has them.

    Raises:
        ValueError: if a layer is not reached: its model does more than attend.
    """
    layers = sparse_layers(model)
    reached = set()

    def note(name: str, layer: SparseAttention, *tensors: Any) -> None:
        reached.add(name)
        visit(name, layer, *tensors)

    with torch.no_grad(), dense_attention(layers, note):
        features = final_features(model, x)
    if len(reached) < len(layers):
        missed = next(name for name in layers if name not in reached)
        raise SparsifinerError(
            f"{type(model).__name__} does not run {missed} as plain attention; it cannot be calibrated"
        )
    return features


Features = tuple[Tensor, "Tensor | None"]
"""Patches ``[1, n, C]`` and class token ``[1, C]`` or None, as ``measure.fidelity.final_features`` has them."""


def last_kept(model: nn.Module) -> Tensor | None:
    """Raster numbers of the patches left at the end of the latest pass of one image, ``[n]``; None without pruning."""
    return kept_patches(model)[0] if is_pruned(model) else None


def common_patches(
    dense: Features, dense_kept: Tensor | None, sparse: Features, sparse_kept: Tensor | None
) -> tuple[Features, Features]:
    """The features of the patches that both passes of a pruned model kept; all of them where nothing is pruned.

    Both come in the same order, that of ``SubsetTiling``, behind a fused token where there is one.
    """
    if dense_kept is None or sparse_kept is None:
        return dense, sparse
    common = [
        patches[:, patches.shape[1] - len(kept) :][:, torch.isin(kept, other)]
        for patches, kept, other in ((dense[0], dense_kept, sparse_kept), (sparse[0], sparse_kept, dense_kept))
    ]
    return (common[0], dense[1]), (common[1], sparse[1])


def forward_features(model: Any, x: Tensor) -> Tensor:
    """Final tokens ``[B, N, C]`` of a timm model."""
    tokens: Tensor = model.forward_features(x)
    return tokens


class Replay:
    """Runs a model's last blocks again from the inputs they had, so that what precedes is computed once.

    Args:
        model: a sparse model that may be taken apart: use a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = [name.rpartition(".")[0] for name in sparse_layers(model)]
        self.inputs: dict[str, Tensor] = {}
        self.image: Tensor | None = None
        self.exact: bool | None = None

    def start(self, x: Tensor) -> Tensor:
        """Final tokens of a whole pass of ``x``, whose inputs of the blocks are kept."""
        self.image, self.inputs = x, {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self.inputs[name] = inputs[0]

            return hook

        handles = [self.model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in self.blocks if name]
        try:
            tokens = forward_features(self.model, x)
        finally:
            for handle in handles:
                handle.remove()
        if self.exact is None:  # some models pass more than tokens from block to block
            middle = len(self.blocks) // 2
            self.exact = all(self.blocks) and torch.equal(self._from(middle), tokens)
        return tokens

    def run(self, first: int) -> Tensor:
        """Final tokens once more, the blocks before layer number ``first`` as they were in :meth:`start`."""
        assert self.image is not None
        return self._from(first) if self.exact else forward_features(self.model, self.image)

    def _from(self, first: int) -> Tensor:
        name = self.blocks[first]
        skipped = {other: self.model.get_submodule(other) for other in self.blocks[:first]}

        def replace(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.inputs[name], *inputs[1:])

        handle = self.model.get_submodule(name).register_forward_pre_hook(replace)
        try:
            for other in skipped:
                self.model.set_submodule(other, _Pass())
            return forward_features(self.model, self.image)  # type: ignore[arg-type]
        finally:
            handle.remove()
            for other, block in skipped.items():
                self.model.set_submodule(other, block)


class _Pass(nn.Module):
    def forward(self, x: Tensor, *args: Any, **context: Any) -> Tensor:
        return x
