"""Every method by name, so that a sweep can compare them: a model and a keep rate give a cheaper model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._utils.checks import choose
from ._utils.copying import copy_model
from .config import SparsifinerConfig, check_keep_rate
from .convert import sparsify
from .geometry.patch_grid import follow_grid
from .predictors import read_predictor_config
from .reduction import linformer, merge_tokens
from .reduction.pruning import prune_tokens


@dataclass(frozen=True)
class Method:
    """One way to make a model cheaper.

    Args:
        convert: takes a dense timm model and a keep rate in (0, 1]; returns a converted copy.
        config: the sparse settings at a keep rate, or None where attention is not sparse.
    """

    convert: Callable[[nn.Module, float], nn.Module]
    config: Callable[[float], SparsifinerConfig] | None = None


def find_method(name: str) -> Method:
    """The method ``name`` of :data:`METHODS`.

    Raises:
        ValueError: if there is none of that name.
    """
    choose("method", name, tuple(METHODS))
    return METHODS[name]


def convert_with(name: str, model: nn.Module, keep_rate: float) -> nn.Module:
    """A copy of ``model`` converted by the method ``name`` of :data:`METHODS`.

    Raises:
        ValueError: if there is no such method, or it cannot convert the model.
    """
    return find_method(name).convert(model, check_keep_rate(keep_rate))


def _sparse(config: Callable[[float], SparsifinerConfig]) -> Method:
    return Method(lambda model, keep_rate: sparsify(model, config(keep_rate)), config)


def _tiles(predictor: str, **changes: Any) -> Method:
    """Query tiles that keep ``keep_rate`` of the keys, at every size: a comparison must not fall back to dense."""

    def config(keep_rate: float) -> SparsifinerConfig:
        return SparsifinerConfig(
            keep_rate=keep_rate, predictor=read_predictor_config(predictor), mode="sparse", **changes
        )

    return _sparse(config)


def _paper_config(keep_rate: float) -> SparsifinerConfig:
    return SparsifinerConfig.paper(keep_rate=keep_rate)


def _dense(model: nn.Module, keep_rate: float) -> nn.Module:
    return copy_model(model)


def _tiles_with_pruning(model: nn.Module, keep_rate: float) -> nn.Module:
    return sparsify(_pruned(model, 0.7, fuse=True), SparsifinerConfig(keep_rate=keep_rate, mode="sparse"))


def _paper_with_pruning(model: nn.Module, keep_rate: float) -> nn.Module:
    return sparsify(_pruned(model, 0.7, fuse=True), _paper_config(keep_rate))


def _linformer(model: nn.Module, keep_rate: float) -> nn.Module:
    return linformer(model, keep_rate=keep_rate)


def _pruned(model: nn.Module, keep_rate: float, *, fuse: bool) -> nn.Module:
    """Pruning after each quarter of the depth: blocks 3, 6 and 9 of 12, 4, 8 and 12 of LV-ViT-S's 16."""
    depth = len(getattr(model, "blocks", ()))
    return prune_tokens(model, keep_rate=keep_rate, layers=sorted({depth * n // 4 for n in (1, 2, 3)}), fuse=fuse)


def _evit(model: nn.Module, keep_rate: float) -> nn.Module:
    return _pruned(model, keep_rate, fuse=True)


def _token_pruning(model: nn.Module, keep_rate: float) -> nn.Module:
    return _pruned(model, keep_rate, fuse=False)


def _tome(model: nn.Module, keep_rate: float) -> nn.Module:
    """Merge evenly over the blocks until ``keep_rate`` of the patches are left."""
    depth = len(getattr(model, "blocks", ()))
    if getattr(model, "patch_embed", None) is None:
        return merge_tokens(model, 0)  # which refuses it and says why
    gone = round((1 - keep_rate) * follow_grid(model).num_patches)
    return merge_tokens(model, [gone * (n + 1) // depth - gone * n // depth for n in range(depth)])


METHODS: dict[str, Method] = {
    "dense": Method(_dense),
    "sparsifiner": _tiles("pooled"),
    "sparsifiner-no-tail": _tiles("pooled", tail=None),
    "sparsifiner-evit": Method(
        _tiles_with_pruning, lambda keep_rate: SparsifinerConfig(keep_rate=keep_rate, mode="sparse")
    ),
    "lowrank": _tiles("lowrank"),
    "paper": _sparse(_paper_config),
    "paper-evit": Method(_paper_with_pruning, _paper_config),
    "oracle": _tiles("oracle"),
    "oracle-no-tail": _tiles("oracle", tail=None),
    "local": _tiles("local"),
    "local-no-tail": _tiles("local", tail=None),
    "strided": _tiles("strided"),
    "strided-no-tail": _tiles("strided", tail=None),
    "random": _tiles("random"),
    "random-no-tail": _tiles("random", tail=None),
    "linformer": Method(_linformer),
    "token-pruning": Method(_token_pruning),
    "evit": Method(_evit),
    "tome": Method(_tome),
}
"""Meaning of the keep rate: keys per query for the sparse methods (those with ``-evit`` add pruning at 0.7), rows of
the projections over tokens for ``linformer``, patches left by each of three pruning layers over those before it for
``token-pruning`` and ``evit`` (so its third power in the end), patches left in the end for ``tome``. That merges
at most half of the patches a block has, so below about 0.1 more are left than asked for: at 0.05 17 of 256 in 12
blocks."""
