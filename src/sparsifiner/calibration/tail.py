"""The tail's offset per head, fitted to what dense attention returns; and the error that remains of each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.attend import dense_attention, tail_groups
from ..attention.layer import SparseAttention
from ..geometry.tiling import Tiling
from ..ops.connectivity import Connectivity
from ..ops.tail import Tail

OFFSETS = torch.linspace(-1.0, 2.0, 31)
"""The offsets that are tried; the best is refined between its neighbours."""

PRIOR_IMAGES = 2.0
"""Fitted to two or three photographs, whole offsets made others worse by 3 %, shrunk ones still by up to 2 %."""

LOGIT_BYTES = 32 * 2**20


def offset_errors(
    layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, tiles: Tensor
) -> Tensor:
    """Relative squared error of the attention output for each of :data:`OFFSETS`, float64 ``[H, offsets]``.

    The error of softmax over the kept keys and the tail, against softmax over all keys, summed over the queries
    of ``tiles`` and divided by the squared dense output.

    Args:
        layer: where the tail and the connectivity come from.
        q: queries ``[1, H, N, D]``.
        k: keys ``[1, H, N, D]``.
        v: values ``[1, H, N, D]``.
        attn_bias: added to the logits, ``[1, 1 or H, N, N]``, or None.
        tiles: numbers of the tiles to look at, ``[t]``.
    """
    assert layer.config.tail is not None
    inputs = layer.inputs(q, k, v, attn_bias)
    tiling, groups = inputs.tiling, tail_groups(layer.config.tail, inputs)
    assert groups is not None
    connectivity = layer.predictor(inputs, groups)
    q, k, v = q.float(), k.float(), v.float()
    tail = groups.tail(connectivity)
    tail = Tail(tail.k.float(), tail.v.float(), tail.bias)
    attn_bias = None if attn_bias is None else attn_bias.float()
    errors = torch.zeros(q.shape[1], len(OFFSETS), dtype=torch.float64)
    size = torch.zeros(q.shape[1], dtype=torch.float64)
    per_tile = 2 * 4 * q.shape[1] * q.shape[2] * tiling.tile_size
    for part in tiles.split(max(1, LOGIT_BYTES // per_tile)):
        kept, pooled, weights = _parts(layer, q, k, connectivity, tail, attn_bias, tiling, part)
        dense = weights @ v / weights.sum(-1, keepdim=True)
        above, below = kept @ v, kept.sum(-1, keepdim=True)
        tail_above, tail_below = pooled @ tail.v, pooled.sum(-1, keepdim=True)
        for number, factor in enumerate(OFFSETS.exp().tolist()):
            output = (above + factor * tail_above) / (below + factor * tail_below)
            errors[:, number] += (output - dense).double().square().sum((-1, -2))[0].cpu()
        size += dense.double().square().sum((-1, -2))[0].cpu()
    return errors / size.clamp(min=torch.finfo(torch.float32).tiny)[:, None]


def _parts(
    layer: SparseAttention,
    q: Tensor,
    k: Tensor,
    connectivity: Connectivity,
    tail: Tail,
    attn_bias: Tensor | None,
    tiling: Tiling,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised weights of kept keys, pooled keys and all keys, for the queries of ``tiles``."""
    tokens = tiling.tokens(q.device)[tiles].long()  # [t, S]
    inside = tokens >= 0
    rows = tokens[inside]
    tile_of_row = torch.arange(len(tiles), device=q.device)[:, None].expand_as(tokens)[inside]
    logits = q[:, :, rows] @ k.mT * layer.scale
    pooled_logits = q[:, :, rows] @ tail.k.mT * layer.scale
    if attn_bias is not None:
        bias = attn_bias[:, :, rows]
        assert layer.config.tail is not None
        blocks = tiling.regions(layer.config.tail.block)
        logits = logits + bias
        pooled_logits = pooled_logits + blocks.mean_patches(bias[..., tiling.num_prefix_tokens :, None])[..., 0]
    pooled_logits = pooled_logits + tail.bias[:, :, tiles][:, :, tile_of_row]
    top = torch.maximum(logits.amax(-1, keepdim=True), pooled_logits.amax(-1, keepdim=True))
    weights = (logits - top).exp()
    indices = connectivity.indices[:, :, tiles].long()
    valid = torch.ones(indices.shape, device=q.device)
    if connectivity.bias is not None:
        valid = (connectivity.bias[:, :, tiles] > float("-inf")).float()
    listed = torch.zeros(*indices.shape[:3], k.shape[2], device=q.device).scatter_reduce_(-1, indices, valid, "amax")
    return weights * listed[:, :, tile_of_row], (pooled_logits - top).exp(), weights


def best_offsets(errors: Tensor, num_images: int) -> Tensor:
    """The offset of least error per head, float32 ``[H]``: the best one tried, refined and shrunk towards zero.

    Args:
        errors: as from :func:`offset_errors`, summed over images, ``[H, offsets]``.
        num_images: how many; an offset of zero weighs as much as :data:`PRIOR_IMAGES` of them.
    """
    best = errors.argmin(-1)
    middle = best.clamp(1, errors.shape[-1] - 2)
    left, centre, right = (errors.gather(-1, (middle + step)[:, None])[:, 0] for step in (-1, 0, 1))
    curvature = left - 2 * centre + right
    shift = torch.where(curvature > 0, (left - right) / (2 * curvature.clamp(min=1e-30)), 0.0).clamp(-1, 1)
    refined = OFFSETS[middle].double() + shift * (OFFSETS[1] - OFFSETS[0]).double()
    flat = errors.amax(-1) - errors.amin(-1) <= 1e-12 * errors.amax(-1)  # nothing was left to the tail
    return torch.where(flat, 0.0, refined * (num_images / (num_images + PRIOR_IMAGES))).float()


def sample_tiles(tiling: Tiling, count: int, generator: torch.Generator) -> Tensor:
    """``count`` tiles drawn without repetition, in rising order, int64 ``[t]``."""
    return torch.randperm(tiling.num_tiles, generator=generator)[:count].sort().values


def output_errors(
    layers: list[SparseAttention],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
) -> list[float]:
    """Relative L2 error of each layer's attention output on the same dense input, patches and prefix tokens."""
    dense = dense_attention(layers[0].inputs(q, k, v, attn_bias)).float()
    size = dense.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return [((layer.attend(q, k, v, attn_bias).float() - dense).norm() / size).item() for layer in layers]
