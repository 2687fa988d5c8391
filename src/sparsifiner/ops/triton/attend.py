"""Sparse attention in Triton: the queries of a tile against gathered single keys, then against the pooled tail.

One program per (image, head, tile) computes an online softmax over two loops. The dense rows of prefix tokens are
programs of their own, which run first because they read every key.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .._common import check_indices
from ..attend import empty_output
from .launch import block_width, choose, launch, precision_of, readable, row_strides

LOG2_E = math.log2(math.e)


@triton.jit
def in_log2(bias):
    """Biases as exponents of 2; what is finite stays finite, ``-inf`` stays ``-inf``."""
    bias = bias.to(tl.float32)
    return tl.where(bias > float("-inf"), tl.maximum(bias, -2.358e38) * 1.4426950408889634, bias)


@triton.jit
def load_rows(ptr, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``ptr + rows`` of ``D`` elements, ``[BLOCK_N, BLOCK_D]``, zeros beyond ``D``."""
    width = tl.arange(0, BLOCK_D)
    pointers = ptr + rows[:, None] + width[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(width < D)[None, :], other=0.0)


@triton.jit
def absorb(q, k, v, added, row_max, row_sum, acc, scale, PRECISION: tl.constexpr):
    """One block of keys into the online softmax; ``added`` ``[1 or M, N]`` in units of log 2."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + added
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    weights = tl.exp2(logits - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def kept_keys(
    start, num_keys, dense, indices_ptr, bias_ptr, attn_rows, attn_m, inside,
    PREFIX: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ATTN_BIAS: tl.constexpr,
):  # fmt: skip
    """Token numbers of one block of the list of keys, and what is added to their logits.

    Places beyond the list repeat its last key and are masked, so that every row that is read is one that was kept.
    The mask is part of what is added: it costs nothing.
    """
    place = start + tl.arange(0, BLOCK_N)
    listed = tl.minimum(place, num_keys - 1)
    if PREFIX:
        index = tl.where(dense, listed, tl.load(indices_ptr + listed, mask=(listed < num_keys) & ~dense, other=0))
    else:
        index = tl.load(indices_ptr + listed)
    added = tl.where(place < num_keys, 0.0, float("-inf"))[None, :]
    if HAS_BIAS:
        added += in_log2(tl.load(bias_ptr + listed, mask=(place < num_keys) & ~dense, other=0.0))[None, :]
    if HAS_ATTN_BIAS:
        added += in_log2(tl.load(attn_rows[:, None] + index[None, :] * attn_m, mask=inside[:, None], other=0.0))
    return index, added


@triton.jit
def pooled_keys(
    start, num_tail, num_tokens, tail_bias_ptr, attn_rows, attn_m, inside,
    BLOCK_N: tl.constexpr, HAS_ATTN_BIAS: tl.constexpr,
):  # fmt: skip
    """Numbers of one block of the tail's tokens, and what is added to their logits; the last again beyond the tail."""
    place = start + tl.arange(0, BLOCK_N)
    group = tl.minimum(place, num_tail - 1)
    added = in_log2(tl.load(tail_bias_ptr + place, mask=place < num_tail, other=float("-inf")))[None, :]
    if HAS_ATTN_BIAS:
        column = (num_tokens + group) * attn_m
        added += in_log2(tl.load(attn_rows[:, None] + column[None, :], mask=inside[:, None], other=0.0))
    return group, added


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, tile_tokens_ptr, indices_ptr, bias_ptr,
    tail_k_ptr, tail_v_ptr, tail_bias_ptr, attn_bias_ptr, out_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tail_k_b, tail_k_h, tail_k_n, tail_v_b, tail_v_h, tail_v_n,
    attn_b, attn_h, attn_n, attn_m, out_b, out_h, out_n,
    num_heads, num_tokens, num_tiles, num_listed, num_tail, num_dense_programs, scale,
    TILE: tl.constexpr, PREFIX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_ATTN_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` queries of one tile, or of the prefix tokens, of one head."""
    program = tl.program_id(0)
    dense = program < num_dense_programs
    parts = tl.where(dense, tl.cdiv(PREFIX, BLOCK_M), tl.cdiv(TILE, BLOCK_M))
    tiles = tl.where(dense, 1, num_tiles)
    number = tl.where(dense, program, program - num_dense_programs)
    tile = (number // parts) % tiles
    pair = number // (parts * tiles)
    image, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    list_number = pair.to(tl.int64) * num_tiles + tile
    num_keys = tl.where(dense, num_tokens, num_listed)

    rows = (number % parts) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = tl.load(tile_tokens_ptr + tile * TILE + rows, mask=(rows < TILE) & ~dense, other=-1)
    if PREFIX:
        tokens = tl.where(dense & (rows < PREFIX), rows, tokens)
    inside = tokens >= 0
    width = tl.arange(0, BLOCK_D)
    cells = inside[:, None] & (width < D)[None, :]
    q = tl.load(q_ptr + image * q_b + head * q_h + tokens[:, None] * q_n + width[None, :], mask=cells, other=0.0)
    attn_rows = attn_bias_ptr + image * attn_b + head * attn_h + tokens * attn_n
    indices_ptr += list_number * num_listed
    bias_ptr += list_number * num_listed
    k_ptr += image * k_b + head * k_h
    v_ptr += image * v_b + head * v_h

    row_max = tl.full([BLOCK_M], -3.4028234e38, tl.float32)  # finite, so that rows without any key give zeros, not NaN
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        index, added = kept_keys(
            start, num_keys, dense, indices_ptr, bias_ptr, attn_rows, attn_m, inside,
            PREFIX, BLOCK_N, HAS_BIAS, HAS_ATTN_BIAS,
        )  # fmt: skip
        k, v = load_rows(k_ptr, index * k_n, D, BLOCK_D), load_rows(v_ptr, index * v_n, D, BLOCK_D)
        row_max, row_sum, acc = absorb(q, k, v, added, row_max, row_sum, acc, scale, PRECISION)
    if HAS_TAIL:
        tail_k_ptr += image * tail_k_b + head * tail_k_h
        tail_v_ptr += image * tail_v_b + head * tail_v_h
        tail_bias_ptr += list_number * num_tail
        for start in range(0, tl.where(dense, 0, num_tail), BLOCK_N):
            group, added = pooled_keys(
                start, num_tail, num_tokens, tail_bias_ptr, attn_rows, attn_m, inside, BLOCK_N, HAS_ATTN_BIAS
            )
            k = load_rows(tail_k_ptr, group * tail_k_n, D, BLOCK_D)
            v = load_rows(tail_v_ptr, group * tail_v_n, D, BLOCK_D)
            row_max, row_sum, acc = absorb(q, k, v, added, row_max, row_sum, acc, scale, PRECISION)
    empty = row_sum == 0.0
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, row_sum)[:, None])
    out_rows = out_ptr + image * out_b + head * out_h + tokens * out_n
    tl.store(out_rows[:, None] + width[None, :], out.to(out_ptr.dtype.element_ty), mask=cells)


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
    precision: str = "same",
) -> Tensor:
    """Arguments and result as in ``sparsifiner::attend``; q, k and v are read in place, whatever their strides."""
    batch, heads, num_tokens, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    check_indices(indices, num_tokens)
    out = empty_output(q)
    settings = choose("attend", q, tile_size)
    num_dense = batch * heads * triton.cdiv(num_prefix_tokens, settings.block_m)
    num_sparse = batch * heads * num_tiles * triton.cdiv(tile_size, settings.block_m)
    q, k, v = readable(q), readable(k), readable(v)
    tail_k, tail_v = (None if x is None else readable(x) for x in (tail_k, tail_v))
    # Tensors that are not there are not read; something must stand in their place.
    launch(
        attend_kernel,
        (num_dense + num_sparse,),
        q, k, v, tile_tokens.contiguous(), indices.contiguous(), q if bias is None else bias.contiguous(),
        q if tail_k is None else tail_k, q if tail_v is None else tail_v,
        q if tail_bias is None else tail_bias.contiguous(), q if attn_bias is None else attn_bias, out,
        *row_strides(q, k, v, tail_k, tail_v), *attn_bias_strides(attn_bias), *row_strides(out),
        heads, num_tokens, num_tiles, indices.shape[3], 0 if tail_k is None else tail_k.shape[2], num_dense,
        scale * LOG2_E,
        TILE=tile_size, PREFIX=num_prefix_tokens, D=width,
        BLOCK_M=settings.block_m, BLOCK_N=settings.block_n, BLOCK_D=block_width(width),
        HAS_BIAS=bias is not None, HAS_TAIL=tail_k is not None, HAS_ATTN_BIAS=attn_bias is not None,
        PRECISION=precision_of(q),
        num_warps=settings.num_warps, num_stages=settings.num_stages,
        outputs=(out,),
    )  # fmt: skip
    return out


def attn_bias_strides(attn_bias: Tensor | None) -> list[int]:
    """Strides of ``[1 or B, 1 or H, N, M]``, zero where one entry serves all."""
    if attn_bias is None:
        return [0, 0, 0, 0]
    return [0 if size == 1 else stride for size, stride in zip(attn_bias.shape, attn_bias.stride(), strict=True)]
