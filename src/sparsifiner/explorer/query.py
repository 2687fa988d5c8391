"""Attention of one query patch: the keys its tile keeps, the pooled tail, and the dense attention of the same query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .look import DenseLayer, Look, SparseLayer


@dataclass(frozen=True)
class QueryAttention:
    """One query patch in one layer, float32 on the CPU; rows of weights sum to 1 over kept keys and tail together.

    Args:
        dense: attention of the dense model, ``[H, N]``.
        kept: keys that the query's tile keeps, bool ``[H, N]``.
        sparse: weights of the kept keys in the sparse model, ``[H, N]``.
        pooled: weights of the tail's pooled keys, ``[H, P]``; ``P`` is 0 without a tail.
        tail: the pooled weight of the group that each patch belongs to, ``[H, num_patches]``.
        members: group of each patch, ``[H, num_patches]``; None without a tail.
        tile: first row, first column, rows and columns of the query tile, in patches.
    """

    dense: Tensor
    kept: Tensor
    sparse: Tensor
    pooled: Tensor
    tail: Tensor
    members: Tensor | None
    tile: tuple[int, int, int, int]

    @property
    def mass(self) -> Tensor:
        """Share of the dense attention on the kept keys, ``[H]``."""
        return (self.dense * self.kept).sum(-1)

    @property
    def tail_share(self) -> Tensor:
        """Share of the sparse attention on the tail, ``[H]``."""
        return self.pooled.sum(-1)


def query_attention(look: Look, layer: int, patch: tuple[int, int]) -> QueryAttention:
    """Attention of the query at ``patch``, row and column, in layer ``layer``, from 0."""
    own = look.layers[layer]
    tiling = own.connectivity.tiling
    row, column = patch
    rows, columns = tiling.grid
    token = tiling.num_prefix_tokens + row * columns + column
    with torch.inference_mode():
        dense = _dense_weights(look.dense.layers[layer], token, own.scale)
        kept, sparse, pooled = _sparse_weights(own, token)
        if own.groups is None:
            tail, members = torch.zeros(len(pooled), tiling.num_patches), None
        else:
            tail = own.groups.of_patches(pooled[None, ..., None].to(own.k.device))[0, ..., 0].cpu()
            numbers = torch.arange(pooled.shape[1], device=own.k.device).expand(pooled.shape)
            members = own.groups.of_patches(numbers[None, ..., None])[0, ..., 0].cpu()
    top, left = row // tiling.tile[0] * tiling.tile[0], column // tiling.tile[1] * tiling.tile[1]
    tile = (top, left, min(tiling.tile[0], rows - top), min(tiling.tile[1], columns - left))
    return QueryAttention(dense, kept, sparse, pooled, tail, members, tile)


def kept_mass(look: Look, patch: tuple[int, int]) -> list[Tensor]:
    """Share of the dense attention of the query at ``patch`` on the keys its tile keeps, ``[H]`` for every layer."""
    masses = []
    for dense, own in zip(look.dense.layers, look.layers, strict=True):
        tiling = own.connectivity.tiling
        token = tiling.num_prefix_tokens + patch[0] * tiling.grid[1] + patch[1]
        with torch.inference_mode():
            masses.append((_dense_weights(dense, token, own.scale) * _kept(own, token)[0]).sum(-1))
    return masses


def _dense_weights(layer: DenseLayer, token: int, scale: float) -> Tensor:
    logits = (layer.k.float() @ layer.q[:, token, :, None].float())[..., 0] * scale
    if layer.bias is not None:
        logits = logits + layer.bias[:, token].float()
    return logits.softmax(-1).cpu()


def _kept(layer: SparseLayer, token: int) -> tuple[Tensor, Tensor]:
    """Which keys the tile of ``token`` keeps, bool ``[H, N]``, and the bias of each on the logits, ``-inf`` if not."""
    connectivity = layer.connectivity
    tiling = connectivity.tiling
    tile = int(tiling.tile_of_patch(torch.device("cpu"))[token - tiling.num_prefix_tokens])
    indices = connectivity.indices[0, :, tile].long().cpu()
    added = torch.zeros(indices.shape) if connectivity.bias is None else connectivity.bias[0, :, tile].float().cpu()
    bias = torch.full((len(indices), tiling.num_tokens), float("-inf")).scatter_reduce_(-1, indices, added, "amax")
    return bias > float("-inf"), bias


def _sparse_weights(layer: SparseLayer, token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Kept keys and their weights, ``[H, N]``, and the weights of the pooled keys, ``[H, P]``."""
    kept, bias = _kept(layer, token)
    query = layer.q[:, token, :, None].float()
    logits = (layer.k.float() @ query)[..., 0].cpu() * layer.scale + bias
    own_bias = None if layer.bias is None else layer.bias[:, token].float()
    if own_bias is not None:
        logits = logits + own_bias.cpu()
    if layer.tail is None or layer.groups is None:
        return kept, logits.softmax(-1), torch.zeros(len(kept), 0)
    tiling = layer.connectivity.tiling
    tile = int(tiling.tile_of_patch(torch.device("cpu"))[token - tiling.num_prefix_tokens])
    pooled = (layer.tail.k[0].float() @ query)[..., 0] * layer.scale + layer.tail.bias[0, :, tile].float()
    if own_bias is not None:
        patches = own_bias[:, tiling.num_prefix_tokens :, None]
        pooled = pooled + layer.groups.blocks.mean_patches(patches)[..., 0]
    weights = torch.cat([logits, pooled.cpu()], dim=-1).softmax(-1)
    return kept, weights[:, : tiling.num_tokens], weights[:, tiling.num_tokens :]
