"""Sparse attention by gathering each tile's keys: any device, differentiable, bounded memory.

The kept keys and values of a bounded number of tiles are copied together, attended to by the tile's
queries, and dropped again; the backward pass recomputes them the same way. Nothing of size N x N and
nothing of size N x K x D is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..connectivity import Connectivity, Tail
from .arguments import empty_output, tensor_arguments

# Gathered keys and values held at once. On a 2-core CPU with 32 MiB of last-level cache, at 4,096 tokens: 2 to 32 MiB
# are equally fast, 1 MiB is 40 % slower for its many steps, 64 MiB 35 % because the copies leave the cache.
CHUNK_BYTES = 8 * 2**20


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
    num_tokens, width = q.shape[2:]
    out = empty_output(q)
    if num_prefix_tokens:
        mask = None if attn_bias is None else attn_bias[:, :, :num_prefix_tokens, :num_tokens]
        prefix = _attend(q[:, :, :num_prefix_tokens], k, v, mask, scale)
        out[:, :, :num_prefix_tokens] = prefix
    # The output is laid out [B, N, H, D], so that merging the heads afterwards needs no copy.
    rows = out.transpose(1, 2).reshape(-1, width)
    for chunk in _chunks(q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, attn_bias):
        tiles = _attend(chunk.q[:, None], chunk.k[:, None], chunk.v[:, None], chunk.mask[:, None], scale)[:, 0]
        rows.index_copy_(0, chunk.output_rows(num_tokens), tiles[chunk.inside])
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


class _Chunk:
    """The tiles ``start`` to ``stop``, counted over batch, heads and tiles, with all they need gathered.

    Shapes: ``q`` ``[C, S, D]``, ``k`` and ``v`` ``[C, M, D]`` (kept keys, then pooled ones), ``mask``
    ``[C, 1 or S, M]``, ``inside`` ``[C, S]`` (False where a border tile has no query).
    """

    def __init__(
        self,
        start: int,
        stop: int,
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
    ) -> None:
        self.heads, num_tokens = q.shape[1:3]
        num_tiles = tile_tokens.shape[0]
        flat = torch.arange(start, stop, device=q.device)
        self.row = flat // num_tiles  # which (batch, head)
        tokens = tile_tokens[flat % num_tiles].long()  # [C, S]
        self.inside = tokens >= 0
        self.tokens = tokens.clamp(min=0)
        self.keys = indices.flatten(0, 2)[start:stop].long()  # [C, K]
        self.q = _rows(q, self.row, self.tokens)
        self.k, self.v = _rows(k, self.row, self.keys), _rows(v, self.row, self.keys)
        dtype = torch.promote_types(q.dtype, torch.float32)
        mask = self.k.new_zeros(self.keys.shape, dtype=dtype)
        if bias is not None:
            mask = bias.flatten(0, 2)[start:stop].to(dtype)
        columns = self.keys
        if tail_k is not None and tail_v is not None and tail_bias is not None:
            self.k = torch.cat([self.k, tail_k.flatten(0, 1)[self.row]], dim=1)
            self.v = torch.cat([self.v, tail_v.flatten(0, 1)[self.row]], dim=1)
            mask = torch.cat([mask, tail_bias.flatten(0, 2)[start:stop].to(dtype)], dim=1)
            pooled = num_tokens + torch.arange(tail_k.shape[2], device=q.device)
            columns = torch.cat([columns, pooled.expand(len(columns), -1)], dim=1)
        self.mask = mask[:, None]
        if attn_bias is not None:
            self.bias_index = (
                (self.row // self.heads).clamp(max=attn_bias.shape[0] - 1)[:, None, None],
                (self.row % self.heads).clamp(max=attn_bias.shape[1] - 1)[:, None, None],
                self.tokens[:, :, None],
                columns[:, None, :],
            )
            self.mask = self.mask + attn_bias[self.bias_index].to(dtype)

    def output_rows(self, num_tokens: int) -> Tensor:
        """Rows of ``[B, N, H, D]`` flattened to ``[B * N * H, D]`` that the tile's real queries fill."""
        image, head = self.row // self.heads, self.row % self.heads
        return ((image[:, None] * num_tokens + self.tokens) * self.heads + head[:, None])[self.inside]

    def input_rows(self, tokens: Tensor, num_tokens: int) -> Tensor:
        """Rows of ``[B, H, N, D]`` flattened to ``[B * H * N, D]``."""
        return self.row[:, None] * num_tokens + tokens


def _rows(x: Tensor, row: Tensor, tokens: Tensor) -> Tensor:
    """Tokens ``[C, M]`` of the (batch, head) pairs ``row`` ``[C]`` out of ``[B, H, N, D]``: ``[C, M, D]``."""
    num_tokens = x.shape[2]
    flat = x.reshape(-1, x.shape[-1])
    index = (row[:, None] * num_tokens + tokens).flatten()
    return flat.index_select(0, index).view(*tokens.shape, x.shape[-1])


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, tile_tokens: Tensor, indices: Tensor, *rest: Tensor | None
) -> Iterator[_Chunk]:
    bad = (indices < 0) | (indices >= k.shape[2])
    if not q.is_cuda and bad.any():
        raise IndexError(
            f"connectivity.indices must lie in [0, {k.shape[2]}), the number of keys, "
            f"got values from {indices.min().item()} to {indices.max().item()}"
        )
    tail_k = rest[1]
    keys_per_tile = indices.shape[-1] + (tail_k.shape[2] if tail_k is not None else 0)
    step = max(1, CHUNK_BYTES // max(1, 2 * keys_per_tile * k.shape[-1] * k.element_size()))
    total = indices.shape[0] * indices.shape[1] * indices.shape[2]
    k, v = k.contiguous(), v.contiguous()  # once, so that each chunk's row view is free
    for start in range(0, total, step):
        yield _Chunk(start, min(start + step, total), q, k, v, tile_tokens, indices, *rest)


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
    num_tokens, num_kept = q.shape[2], indices.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = (q, k, v, bias, tail_k, tail_v, tail_bias, attn_bias)
    grads = [
        q.new_empty(0, dtype=dtype) if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs
    ]
    grad_q, grad_k, grad_v, grad_bias, grad_tail_k, grad_tail_v, grad_tail_bias, grad_attn_bias = grads
    if num_prefix_tokens:
        prefix = slice(0, num_prefix_tokens)
        mask = None if attn_bias is None else attn_bias[:, :, prefix, :num_tokens]
        dq, dk, dv, dlogits = _attend_backward(grad[:, :, prefix], q[:, :, prefix], k, v, mask, scale, dtype)
        grad_q[:, :, prefix] += dq
        grad_k += dk
        grad_v += dv
        if attn_bias is not None:
            grad_attn_bias[:, :, prefix, :num_tokens] += _reduce_to(dlogits, mask.shape)  # type: ignore[union-attr]
    start = 0
    for chunk in _chunks(q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, attn_bias):
        stop = start + len(chunk.row)
        grad_tiles = _rows(grad, chunk.row, chunk.tokens) * chunk.inside[..., None]
        dq, dk, dv, dlogits = _attend_backward(grad_tiles, chunk.q, chunk.k, chunk.v, chunk.mask, scale, dtype)
        _add_rows(grad_q, chunk.input_rows(chunk.tokens, num_tokens), dq)
        key_rows = chunk.input_rows(chunk.keys, num_tokens)
        _add_rows(grad_k, key_rows, dk[:, :num_kept])
        _add_rows(grad_v, key_rows, dv[:, :num_kept])
        per_key = dlogits.sum(1)
        if bias is not None:
            grad_bias.flatten(0, 2)[start:stop] = per_key[:, :num_kept]
        if tail_k is not None:
            grad_tail_k.flatten(0, 1).index_add_(0, chunk.row, dk[:, num_kept:])
            grad_tail_v.flatten(0, 1).index_add_(0, chunk.row, dv[:, num_kept:])
            grad_tail_bias.flatten(0, 2)[start:stop] = per_key[:, num_kept:]
        if attn_bias is not None:
            grad_attn_bias.index_put_(chunk.bias_index, dlogits, accumulate=True)
        start = stop
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


def _add_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    target.view(-1, target.shape[-1]).index_add_(0, rows.flatten(), values.flatten(0, 1))


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
