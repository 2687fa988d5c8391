"""Dense attention of a few query patches beside the keys that the sparse model keeps for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.layer import LayerRecord, SparseAttention
from ..convert import sparse_layers
from ..errors import SparsifinerError
from ..ops.connectivity import Connectivity
from ..recording import observable_twin, observe
from ..reduction.blocks import refuse_reduced

# Rows and columns of the default queries, as shares of the grid: spread out, and off the border.
QUERY_PLACES = ((0.28, 0.42), (0.55, 0.68), (0.82, 0.22))


@dataclass(frozen=True)
class LayerMap:
    """One layer and a few queries ``Q`` of one image; grid ``rows x columns``.

    Args:
        name: path of the layer.
        number: its place among the sparse layers, from 1.
        attention: dense attention of each query to every patch, mean over the heads, ``[Q, rows, columns]``.
        kept: share of the heads in which the sparse model keeps the patch, in 0..1, ``[Q, rows, columns]``.
        mass: share of the dense attention (prefix tokens included) on the keys kept, mean over heads, ``[Q]``.
        tiles: first row, first column, rows and columns of the query tile, in patches.
    """

    name: str
    number: int
    attention: Tensor
    kept: Tensor
    mass: Tensor
    tiles: list[tuple[int, int, int, int]]


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of one image.

    Args:
        queries: row and column of each query patch.
        grid: rows and columns of the patch grid.
        layers: an early, a middle and a late one of the layers that chose keys, or those asked for.
        num_layers: sparse layers of the model.
        keep_rate: of the first of ``layers``.
    """

    queries: list[tuple[int, int]]
    grid: tuple[int, int]
    layers: list[LayerMap]
    num_layers: int
    keep_rate: float


def attention_maps(
    dense: nn.Module,
    sparse: nn.Module,
    x: Tensor,
    *,
    queries: Sequence[tuple[int, int]] | None = None,
    layers: Sequence[int] | None = None,
) -> AttentionMaps:
    """Compare dense attention and kept keys for a few query patches of one image.

    Args:
        dense: a dense model in evaluation mode.
        sparse: its sparse version.
        x: one preprocessed image ``[1, 3, height, width]``.
        queries: rows and columns of patches; three places spread over the grid if None.
        layers: numbers of sparse layers from 0; the first, the middle and the last that chose keys if None.

    Raises:
        ValueError: if ``x`` holds more than one image, a query lies outside the grid, attention ran dense (in all
            layers, or in one of ``layers``), or the model prunes or merges tokens.
    """
    refuse_reduced(sparse, "attention maps")
    if x.ndim != 4 or x.shape[0] != 1:
        raise SparsifinerError(f"x must hold one image, [1, 3, height, width], got {list(x.shape)}")
    names = list(sparse_layers(sparse))
    wanted = {names[number]: number for number in (range(len(names)) if layers is None else sorted(set(layers)))}
    kept: dict[str, Connectivity] = {}

    def keep(name: str, layer: SparseAttention, did: LayerRecord) -> None:
        if did.connectivity is not None:
            kept[name] = did.connectivity

    with torch.no_grad(), observe(sparse, keep, wanted):
        sparse(x)
    if layers is None and kept:
        chose = [number for name, number in wanted.items() if name in kept]
        wanted = {names[number]: number for number in (chose[0], chose[(len(chose) - 1) // 2], chose[-1])}
    if not wanted.keys() <= kept.keys():
        raise SparsifinerError(
            "attention ran dense at this size, so no keys were chosen; set mode='sparse' to see them"
        )
    tiling = next(iter(kept.values())).tiling
    rows, columns = tiling.grid
    if queries is None:
        queries = [(int(y * rows), int(z * columns)) for y, z in QUERY_PLACES]
    if any(not (0 <= y < rows and 0 <= z < columns) for y, z in queries):
        raise SparsifinerError(f"a query lies outside the {rows}x{columns} patch grid: {list(queries)}")
    tokens = torch.tensor([tiling.num_prefix_tokens + y * columns + z for y, z in queries], device=x.device)
    weights: dict[str, Tensor] = {}

    def attend(name: str, layer: SparseAttention, did: LayerRecord) -> None:
        assert did.q is not None
        assert did.k is not None
        logits = did.q[0][:, tokens].float() @ did.k[0].float().transpose(-1, -2) * layer.scale
        if did.attn_bias is not None:
            logits = logits + did.attn_bias[0][:, tokens].float()
        weights[name] = logits.softmax(-1).cpu()  # [H, Q, N]

    twin = observable_twin(dense)
    with torch.no_grad(), observe(twin, attend, wanted):
        twin(x)
    maps = [_layer_map(name, wanted[name], weights[name], kept[name], list(queries)) for name in wanted]
    rate = sparse_layers(sparse)[maps[0].name].predictor.keep_rate
    return AttentionMaps(list(queries), (rows, columns), maps, len(names), rate)


def _layer_map(
    name: str, number: int, weights: Tensor, connectivity: Connectivity, queries: list[tuple[int, int]]
) -> LayerMap:
    tiling = connectivity.tiling
    heads, (rows, columns), prefix = weights.shape[0], tiling.grid, tiling.num_prefix_tokens
    tile_of_patch = tiling.tile_of_patch(torch.device("cpu"))
    kept, mass, tiles = [], [], []
    for query, (y, z) in enumerate(queries):
        tile = int(tile_of_patch[y * columns + z])
        indices = connectivity.indices[0, :, tile].long().cpu()  # [H, K]
        valid = torch.ones(indices.shape)
        if connectivity.bias is not None:
            valid = (connectivity.bias[0, :, tile] > float("-inf")).float().cpu()
        mask = torch.zeros(heads, tiling.num_tokens).scatter_reduce_(-1, indices, valid, "amax")
        kept.append(mask.mean(0)[prefix:].view(rows, columns))
        mass.append((weights[:, query] * mask).sum(-1).mean())
        top, left = y // tiling.tile[0] * tiling.tile[0], z // tiling.tile[1] * tiling.tile[1]
        tiles.append((top, left, min(tiling.tile[0], rows - top), min(tiling.tile[1], columns - left)))
    attention = weights.mean(0)[:, prefix:].unflatten(1, (rows, columns))
    return LayerMap(name, number + 1, attention, torch.stack(kept), torch.stack(mass), tiles)
