"""Token pruning that removes tokens: the patches the class token looks at least leave the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .._utils.copying import copy_model
from .._utils.messages import one_line
from ..attention.adapters.scored import ScoredAttention, SparseScoredAttention
from ..attention.adapters.vit import SparseVitAttention
from ..attention.layer import SparseAttention
from ..config import check_keep_rate
from ..errors import SparsifinerError
from ..geometry.counting import num_kept
from ..geometry.forward_pass import num_tokens_of
from ..geometry.patch_grid import PatchGrid, drop_unused_grids, find_grid, follow_grid
from ..geometry.subset import z_order
from ..ops.topk import top_keys
from .blocks import ReducingBlock, check_reducible, refuse_maps


@dataclass(frozen=True)
class TokenPruning:
    """Settings of :func:`prune_tokens`.

    Args:
        keep_rate: share of the patches left by each pruning layer; the s-th leaves ``keep_rate ** s`` of all.
        layers: numbers of the pruning blocks, from 0, rising.
        fuse: whether the removed patches live on in one fused token.

    Raises:
        ValueError: if a setting is out of range.
    """

    keep_rate: float = 0.7
    layers: tuple[int, ...] = (3, 6, 9)
    fuse: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_rate", check_keep_rate(self.keep_rate))
        given = self.layers if isinstance(self.layers, Iterable) else ()
        layers = tuple(int(n) if isinstance(n, Integral) else n for n in given)  # NumPy's whole numbers, too
        if not layers or any(not isinstance(n, int) for n in layers) or list(layers) != sorted(set(layers)):
            raise SparsifinerError(f"layers must be rising block numbers such as (3, 6, 9), got {self.layers!r}")
        object.__setattr__(self, "layers", layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, settings: Any) -> TokenPruning:
        """The inverse of :meth:`to_dict`."""
        try:
            return cls(**settings)
        except TypeError as error:
            raise SparsifinerError(
                f"token pruning needs keep_rate, layers and fuse, got {settings!r}: {one_line(error)}"
            ) from error


class PruningBlock(ReducingBlock):
    """A block that keeps the patches with the highest class attention, and goes on with fewer tokens.

    Its MLP and all later blocks see prefix tokens, the fused token (if there is one) and the kept patches, in this
    order. Each image keeps other patches, but equally many.

    Args:
        block: the block to take over; its attention must be scored.
        grid: the patch grid of the model.
        share: share of all patches of the image that are left.
        fuse: whether removed patches, and an earlier fused token, become one token: their mean, weighted by their
            class attention. (EViT takes the weighted sum, whose length a model that was not trained for it
            does not expect, and lets an earlier fused token compete with the patches.)
    """

    def __init__(self, block: Block, grid: PatchGrid, share: float, fuse: bool) -> None:
        super().__init__(block)
        self.grid, self.share, self.fuse = grid, share, fuse

    def own_attributes(self) -> tuple[str, ...]:
        return ("grid", "share", "fuse")

    def reduce(self, x: Tensor, seen: Tensor) -> Tensor:
        num_tokens = num_tokens_of(x)
        first = self.grid.num_prefix_tokens
        state = self.grid.current
        before = state.kept.get(num_tokens)
        present = state.num_patches if before is None else before.shape[1]
        start = num_tokens - present  # of the patches; more than `first` where there is a fused token
        if start - first not in ((0,) if before is None else (0, 1)):
            raise SparsifinerError(
                f"token pruning got {num_tokens} tokens, but the image has a {state.shape[0]}x"
                f"{state.shape[1]} patch grid and {first} prefix tokens; patch dropout is not supported"
            )
        count = min(present, num_kept(self.share, state.num_patches))
        if first + self.fuse + count >= num_tokens:  # fusing a single patch would gain nothing
            return x
        best = top_keys(seen[:, start:], count).long()
        positions = best if before is None else before.gather(1, best)
        order = z_order(state.shape, x.device)[positions].argsort(dim=1)
        best, positions = best.gather(1, order), positions.gather(1, order)
        kept = take_tokens(x, start + best)
        parts = [x[:, :first], kept]
        if self.fuse:
            weight = seen[:, first:].scatter(1, start - first + best, 0.0).to(x.dtype)
            total = weight.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
            parts.insert(1, (weight[..., None] * x[:, first:]).sum(1, keepdim=True) / total[..., None])
        x = torch.cat(parts, dim=1)
        state.kept[num_tokens_of(x)] = positions
        return x

    def extra_repr(self) -> str:
        return f"share={self.share:.4g}, fuse={self.fuse}"


def take_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """Each image's own ``tokens`` ``[B, n]`` of ``x`` ``[B, N, C]``: ``[B, n, C]``."""
    batch, num_tokens, _ = x.shape
    rows = tokens + torch.arange(batch, device=x.device)[:, None] * num_tokens
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, tokens.shape)


def prune_tokens(
    model: nn.Module,
    *,
    keep_rate: float = 0.7,
    layers: Sequence[int] = (3, 6, 9),
    fuse: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Remove the patches that the class token attends to least, for each image its own (Liang et al., EViT, 2022).

    At each of ``layers``, between attention and MLP, ``ceil(keep_rate ** s * patches)`` patches are left (``s``
    counts the pruning layers from 1), chosen by the class token's attention, mean over heads. Only that row of the
    attention map is computed. Works on dense models and sparse ones alike, and a pruned model can be made sparse
    afterwards: attention keeps its budget of ``keep_rate`` times the image's tokens (Wei et al., section 4.4).

    Final features ``forward_features(x)`` are ``[B, prefix + fused + kept, C]``; :func:`kept_patches` tells which
    patches they are. Use a pruned model from one thread at a time.

    Args:
        model: a timm ``VisionTransformer`` with a class token. It is copied unless ``inplace``.
        keep_rate: share of the patches that each pruning layer leaves, in (0, 1]; 1 removes none.
        layers: numbers of the pruning blocks, from 0. EViT and the paper use 3, 6 and 9 of 12.
        fuse: whether the removed patches are fused into one token right after the prefix tokens.
        inplace: prune ``model`` itself and return it.

    Raises:
        ValueError: if the model or a setting does not allow it; one line says why. ``model`` is unchanged then.
    """
    settings = TokenPruning(keep_rate, layers, fuse)  # type: ignore[arg-type]
    check_reducible(model, list(settings.layers), (Attention, SparseVitAttention), "prune tokens of")
    if not getattr(model, "has_class_token", False):
        raise SparsifinerError(
            f"cannot prune tokens of {type(model).__name__}: it has no class token to rank the patches by"
        )
    if not inplace:
        model = copy_model(model)
    vit: Any = model
    grid = follow_grid(vit)
    for stage, layer in enumerate(settings.layers, start=1):
        block = vit.blocks[layer]
        block.attn = _scored(block.attn)
        vit.blocks[layer] = PruningBlock(block, grid, settings.keep_rate**stage, fuse)
    grid.attach(vit, vit.blocks)
    vit._sparsifiner_tokens = settings
    refuse_maps(model)
    return model


def unprune_tokens(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The inverse of :func:`prune_tokens`: the same weights, no token removed; sparse attention stays.

    Raises:
        ValueError: if no token of ``model`` is pruned.
    """
    token_pruning(model)
    if not inplace:
        model = copy_model(model)
    vit: Any = model
    for number, block in enumerate(vit.blocks):
        if isinstance(block, PruningBlock):
            block.attn = _plain(block.attn)
            vit.blocks[number] = block.to_block()
            vars(block).pop("grid", None)
    drop_unused_grids(model)
    del vit._sparsifiner_tokens
    refuse_maps(model)
    return model


def is_pruned(model: nn.Module) -> bool:
    """True for the result of :func:`prune_tokens`."""
    return hasattr(model, "_sparsifiner_tokens")


def token_pruning(model: nn.Module) -> TokenPruning:
    """The settings ``model`` was pruned with.

    Raises:
        ValueError: if it is not the result of :func:`prune_tokens`.
    """
    if not is_pruned(model):
        raise SparsifinerError(f"{type(model).__name__} is not the result of prune_tokens()")
    vit: Any = model
    return vit._sparsifiner_tokens


def kept_patches(model: nn.Module) -> Tensor:
    """Raster numbers of the patches that survived the latest forward pass, int64 ``[B, n]``, as the features lie.

    ``[1, patches]`` where nothing was removed, as at a keep rate of 1.
    """
    token_pruning(model)
    grid = find_grid(model)
    assert grid is not None
    if not grid.kept:
        return torch.arange(grid.num_patches)[None]
    return grid.kept[min(grid.kept)]


def _scored(attention: Any) -> nn.Module:
    """The attention layer with class scores."""
    if not isinstance(attention, SparseAttention):
        return ScoredAttention(attention)
    return _rebuilt(attention, SparseScoredAttention, ScoredAttention)


def _plain(attention: Any) -> nn.Module:
    """The inverse of :func:`_scored`."""
    if not isinstance(attention, SparseAttention):
        return attention.to_plain()
    return _rebuilt(attention, SparseVitAttention, ScoredAttention.to_plain)


def _rebuilt(
    attention: SparseAttention, kind: type[SparseAttention], dense: Callable[[Any], nn.Module]
) -> SparseAttention:
    """A sparse layer of another kind around the same weights and the same predictor."""
    predictor, observer, override = attention.predictor, attention.observer, attention.override
    layer = kind(dense(attention.to_dense()), attention.config, attention.grid)
    layer.predictor, layer.observer, layer.override = predictor, observer, override
    return layer
