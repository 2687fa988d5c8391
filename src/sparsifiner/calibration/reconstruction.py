"""The paper's reconstruction loss for the low-rank predictor, per query or per tile, with or without a tail."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.inputs import AttentionInputs
from ..ops.tail import KeyGroups
from ..predictors import LowRankPredictor

WEIGHT = 0.01
"""Factor of the loss in Wei et al., section 3.4, and in the authors' configuration."""


def reconstruction_loss(
    predictor: LowRankPredictor, inputs: AttentionInputs, groups: KeyGroups | None, tiles: Tensor
) -> Tensor:
    """``0.01 * sum((score - target)^2)`` per head, for the queries of ``tiles``; a scalar with gradients.

    Without a tail the target is the dense attention. With a tail it is what the tail would get wrong of each key,
    as :func:`tail_misses` has it, and the score is the one that selects: estimated attention times the distance of the
    key's value. Both are in units of the head's mean distance, so that the loss has its size without a tail.
    The queries of a tile (one in the paper) are merged on both sides as ``reduction`` says: by their maximum, or
    by their mean where scores are sums.

    Args:
        predictor: float32; in training mode with ``attn_recon`` its scores use the signed basis and all
            coefficients, as the authors' first phase does.
        inputs: of the attention call, float32.
        groups: of the tail, or None without one.
        tiles: numbers of the tiles to look at, ``[t]``.
    """
    q, k, v, tiling, scale = inputs.q, inputs.k, inputs.v, inputs.tiling, inputs.scale
    attn_bias = inputs.attn_bias
    tokens = tiling.tokens(q.device)[tiles].long()  # [t, S]
    inside = (tokens >= 0).to(q.dtype)[..., None]  # [t, S, 1]
    rows = tokens.clamp(min=0).flatten()

    def merged(values: Tensor) -> Tensor:
        """``[B, H, t * S, n]`` of single queries, not negative, to ``[B, H, t, n]`` of tiles."""
        of_tiles = values.unflatten(2, tokens.shape) * inside
        return of_tiles.amax(3) if predictor.settings.reduction == "max" else of_tiles.sum(3) / inside.sum(1)

    first = predictor.first_candidate(tiling)
    coef = predictor.coefficients_of(predictor.q_proj(q[:, :, rows]), predictor.k_proj(k), tiling)
    score = merged(coef) @ predictor.basis(tiling)[..., first:, :].mT
    bias = None if attn_bias is None else attn_bias[:, :, rows].to(q.dtype)
    distance = predictor.value_distances(groups, tiling)
    with torch.no_grad():
        if distance is None or groups is None:
            target = dense_attention_weights(q[:, :, rows], k, scale, bias)[..., first:]
        else:
            unit = distance.mean(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
            misses = tail_misses(q[:, :, rows], k, v, groups, scale, bias)[..., first:]
            target, distance = misses / unit[:, :, None], distance / unit
        target = merged(target)
    if distance is not None:
        score = score * distance[:, :, None]
    return WEIGHT * (score - target).square().sum() / (q.shape[0] * q.shape[1])


def dense_attention_weights(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Dense attention of some queries ``[B, H, Q, D]`` to all keys ``[B, H, N, D]``: ``[B, H, Q, N]``."""
    logits = q @ k.mT * scale
    return (logits if bias is None else logits + bias).softmax(-1)


def tail_misses(q: Tensor, k: Tensor, v: Tensor, groups: KeyGroups, scale: float, bias: Tensor | None = None) -> Tensor:
    """Error of the output where the tail stands in for a key, ``[B, H, Q, N]``.

    ``|a - a_pooled| * |v_pooled| + a * |v - v_pooled|`` with ``a`` the dense attention and ``a_pooled`` what the
    group's mean key draws instead. Prefix tokens are in no group: losing one costs ``a * |v|``.

    Args:
        q: some queries ``[B, H, Q, D]``.
        k: all keys ``[B, H, N, D]``.
        v: all values ``[B, H, N, D]``.
        groups: of the tail.
        scale: factor on the logits.
        bias: added to the logits, ``[1 or B, 1 or H, Q, N]``, or None.
    """
    logits = q @ k.mT * scale
    pooled = q @ groups.k.mT * scale
    prefix = groups.blocks.num_prefix_tokens
    if bias is not None:
        logits = logits + bias
        pooled = pooled + groups.blocks.mean_patches(bias[..., prefix:, None])[..., 0]
    total = logits.logsumexp(-1, keepdim=True)
    attention = (logits - total).exp()
    drawn = groups.of_patches((pooled - total).exp().mT).mT
    stand_in = torch.nn.functional.pad(drawn, (prefix, 0))
    mean_value = torch.nn.functional.pad(groups.of_patches(groups.v), (0, 0, prefix, 0))
    distance = (v - mean_value).norm(dim=-1)[:, :, None]
    return (attention - stand_in).abs() * mean_value.norm(dim=-1)[:, :, None] + attention * distance
