"""Sparse attention and its gradients in plain PyTorch: any device, bounded memory.

The tiles are worked off in chunks (``chunks.py``); the backward pass computes each chunk's weights again. Nothing that
grows with N x N or N x K x D is ever held.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attend import empty_output
from .chunks import Gradients, Inputs, make_chunks


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_tokens: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    tail_bias: Tensor | None,
    attn_bias: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
    precision: str,
) -> Tensor:
    """``sparsifiner::attend``; nothing is rounded."""
    num_tokens = q.shape[2]
    out = empty_output(q)
    if num_prefix_tokens:
        mask = None if attn_bias is None else attn_bias[:, :, :num_prefix_tokens, :num_tokens]
        prefix = _attend(q[:, :, :num_prefix_tokens], k, v, mask, scale)
        out[:, :, :num_prefix_tokens] = prefix
    inputs = Inputs(q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, attn_bias, num_prefix_tokens)
    for chunk in make_chunks(inputs):
        values = _attend(chunk.q[:, None], chunk.k[:, None], chunk.v[:, None], chunk.mask[:, None], scale)
        chunk.write(out, values[:, 0])
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention of 4-D tensors with an additive mask; a row without any key gives zeros."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    mask = mask.to(torch.float64 if q.dtype == torch.float64 else q.dtype if q.is_cuda else torch.float32)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1), scale=scale)
    empty = (mask == float("-inf")).all(-1, keepdim=True)
    return out.masked_fill(empty, 0.0)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_tokens: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    tail_bias: Tensor | None,
    attn_bias: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
    precision: str,
) -> list[Tensor]:
    """``sparsifiner::attend_backward``."""
    num_tokens = q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = (q, k, v, bias, tail_k, tail_v, tail_bias, attn_bias)
    shapes = ((0,) if x is None else x.shape for x in inputs)
    grads = Gradients(*(torch.zeros(shape, dtype=dtype, device=q.device) for shape in shapes))
    grad = grad.contiguous()
    if num_prefix_tokens:
        prefix = slice(0, num_prefix_tokens)
        mask = None if attn_bias is None else attn_bias[:, :, prefix, :num_tokens]
        dq, dk, dv, dlogits = _attend_backward(grad[:, :, prefix], q[:, :, prefix], k, v, mask, scale, dtype)
        grads.q[:, :, prefix] += dq
        grads.k.add_(dk)
        grads.v.add_(dv)
        if mask is not None:
            grads.attn_bias[:, :, prefix, :num_tokens] += _reduce_to(dlogits, mask.shape)
    arguments = Inputs(q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, attn_bias, num_prefix_tokens)
    for chunk in make_chunks(arguments):
        grad_rows = chunk.take(grad) * chunk.inside[..., None]
        parts = _attend_backward(grad_rows, chunk.q, chunk.k, chunk.v, chunk.mask, scale, dtype)
        chunk.add_gradients(grads, *parts)
    return [g.to(x.dtype) for g, x in zip(grads, inputs, strict=True) if x is not None]


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the logits, all in ``dtype``; the weights are computed again."""
    grad, q, k, v = grad.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)
    logits = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        logits = logits + mask.to(dtype)
    weights = logits.softmax(-1)
    if mask is not None:  # a row without any key has no weights
        weights = weights.masked_fill((logits == float("-inf")).all(-1, keepdim=True), 0.0)
    dv = weights.transpose(-1, -2) @ grad
    dweights = grad @ v.transpose(-1, -2)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    return dlogits @ k * scale, dlogits.transpose(-1, -2) @ q * scale, dv, dlogits


def _reduce_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum ``[B, H, S, M]`` over the batch or head dimension where ``shape`` has 1 there."""
    for dim in (0, 1):
        if shape[dim] == 1 and x.shape[dim] != 1:
            x = x.sum(dim, keepdim=True)
    return x
