"""Sparse attention in plain PyTorch: any device, differentiable, bounded memory.

The tiles are worked off in chunks (``chunks.py``); the backward pass computes each chunk's weights again. Nothing that
grows with N x N or N x K x D is ever held.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import empty_output, tensor_arguments
from .chunks import Gradients, Inputs, make_chunks
from .connectivity import Connectivity
from .tail import Tail


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    tail: Tail | None,
    attn_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments and result as in ``sparse_attention``."""
    arguments = tensor_arguments(q, k, v, connectivity, tail)
    return _gather_attention(*arguments, attn_bias, connectivity.tiling.num_prefix_tokens, scale)


@torch.library.custom_op("sparsifiner::gather_attention", mutates_args=())
def _gather_attention(
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
) -> Tensor:
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


@_gather_attention.register_fake
def _(q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, attn_bias, num_prefix_tokens, scale):  # type: ignore[no-untyped-def]
    return empty_output(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention of 4-D tensors with an additive mask; a row without any key gives zeros."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    mask = mask.to(torch.float64 if q.dtype == torch.float64 else q.dtype if q.is_cuda else torch.float32)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1), scale=scale)
    empty = (mask == float("-inf")).all(-1, keepdim=True)
    return out.masked_fill(empty, 0.0)


@torch.library.custom_op("sparsifiner::gather_attention_backward", mutates_args=())
def _gather_attention_backward(
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
) -> list[Tensor]:
    """Gradients of q, k, v, bias, tail_k, tail_v, tail_bias and attn_bias; empty where there is no such input."""
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
    return [g if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


@_gather_attention_backward.register_fake
def _(grad, q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, attn_bias, num_prefix_tokens, scale):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = (q, k, v, bias, tail_k, tail_v, tail_bias, attn_bias)
    return [q.new_empty(0, dtype=dtype) if x is None else x.new_empty(x.shape) for x in inputs]


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the logits, all in ``dtype``; the weights are computed again."""
    grad, q, k, v = grad.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)
    logits = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        logits = logits + mask.to(dtype)
    weights = logits.softmax(-1).nan_to_num(0.0)
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


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.num_prefix_tokens, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grads = _gather_attention_backward(grad, *ctx.saved_tensors, ctx.num_prefix_tokens, ctx.scale)
    q, k, v, bias, tail_k, tail_v, tail_bias, attn_bias = (g if g.numel() else None for g in grads)
    return q, k, v, None, None, bias, tail_k, tail_v, tail_bias, attn_bias, None, None


_gather_attention.register_autograd(_backward, setup_context=_setup_context)
