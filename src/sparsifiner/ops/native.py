"""Sparse attention in C++ (``csrc/``): CPU inference in float32 and bfloat16, straight from the packed qkv."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from .arguments import empty_output, tensor_arguments
from .connectivity import Connectivity
from .tail import Tail


def why_not(q: Tensor, *others: Tensor | None, attn_bias: Tensor | None = None) -> str | None:
    """Why the kernels cannot serve a call with query ``q`` and the tensors ``others``, or None if they can."""
    reason = cpu.why_not(q) or cpu.why_not_width(q.shape[-1])
    if reason is not None:
        return reason
    if attn_bias is not None:
        return "it takes no attn_bias"
    if cpu.needs_gradients(q, *others):
        return "it has no backward pass and gradients are needed; call it under torch.no_grad() or inference_mode()"
    return None


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    tail: Tail | None,
    attn_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments and result as in ``sparse_attention``; ``attn_bias`` must be None."""
    arguments = tensor_arguments(q, k, v, connectivity, tail)
    return _native_attention(*arguments, connectivity.tiling.num_prefix_tokens, scale)


@torch.library.custom_op("sparsifiner::native_attention", mutates_args=(), device_types="cpu")
def _native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_tokens: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    tail_bias: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
) -> Tensor:
    batch, heads, num_tokens, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    num_pooled = 0 if tail_k is None else tail_k.shape[2]
    out = empty_output(q)
    q, k, v = cpu.readable_rows(q), cpu.readable_rows(k), cpu.readable_rows(v)
    if tail_k is not None and tail_v is not None:
        tail_k, tail_v = cpu.readable_rows(tail_k), cpu.readable_rows(tail_v)
    tile_tokens, indices = tile_tokens.contiguous(), indices.contiguous()
    bias, tail_bias = cpu.plain(bias, torch.float32), cpu.plain(tail_bias, torch.float32)
    cpu._native.attend(
        (batch, heads, num_tokens, width, num_tiles, tile_size, indices.shape[3], num_pooled, num_prefix_tokens),
        q.dtype == torch.bfloat16,
        scale,
        cpu.rows(q),
        cpu.rows(k),
        cpu.rows(v),
        tile_tokens.data_ptr(),
        indices.data_ptr(),
        cpu.address(bias),
        cpu.rows(tail_k),
        cpu.rows(tail_v),
        cpu.address(tail_bias),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@_native_attention.register_fake
def _(q, k, v, tile_tokens, indices, bias, tail_k, tail_v, tail_bias, num_prefix_tokens, scale):  # type: ignore[no-untyped-def]
    return empty_output(q)
