"""Masked dense attention: the oracle every other backend is tested against. Slow and O(N^2) by intent."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_indices
from .connectivity import Connectivity
from .tail import Tail


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    tail: Tail | None,
    attn_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Softmax over the kept keys by masking a dense score matrix; arguments as in ``sparse_attention``.

    Computes in float32, or in float64 where the inputs are float64. Differentiable by autograd.
    """
    check_indices(connectivity.indices, k.shape[2])
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = k, v
    if tail is not None:
        keys, values = torch.cat([k, tail.k], dim=2), torch.cat([v, tail.v], dim=2)
    logits = q.to(dtype) @ keys.to(dtype).transpose(-1, -2) * scale + _additive_mask(connectivity, tail, dtype)
    if attn_bias is not None:
        logits = logits + attn_bias.to(dtype)
    unmasked = logits > float("-inf")
    # A row without any key attends to nothing: its output and its gradients are zero, not NaN.
    logits = torch.where(unmasked.any(-1, keepdim=True), logits, 0.0)
    weights = torch.where(unmasked, logits.softmax(-1), 0.0)
    return (weights @ values.to(dtype)).to(q.dtype)


def _additive_mask(connectivity: Connectivity, tail: Tail | None, dtype: torch.dtype) -> Tensor:
    """What is added to the logits: bias at kept keys and pooled tokens, ``-inf`` elsewhere, ``[B, H, N, N + P]``."""
    tiling, indices = connectivity.tiling, connectivity.indices
    batch, heads, tiles, _ = indices.shape
    bias = torch.zeros(indices.shape, dtype=dtype, device=indices.device)
    if connectivity.bias is not None:
        bias = connectivity.bias.to(dtype)
    rows = bias.new_full((batch, heads, tiles, tiling.num_tokens), float("-inf"))
    # Padding entries repeat a key with bias -inf; the maximum keeps the entry that counts.
    rows = rows.scatter_reduce(-1, indices.long(), bias, "amax")
    prefix_rows = rows.new_zeros(batch, heads, tiling.num_prefix_tokens, tiling.num_tokens)
    if tail is not None:
        rows = torch.cat([rows, tail.bias.to(dtype)], dim=-1)
        prefix_rows = torch.nn.functional.pad(prefix_rows, (0, tail.k.shape[2]), value=float("-inf"))
    return torch.cat([prefix_rows, rows[:, :, tiling.tile_of_patch(rows.device)]], dim=2)
