"""Gradients of sparse attention in Triton.

``rows_kernel`` serves the queries of one tile: it computes their weights again, then the gradients of the queries, of
the biases and, added up in float32 by atomic operations, of the single keys and values. ``columns_kernel`` serves one
block of keys that every tile may attend to: the pooled tail, whose sums over the tiles it takes in a fixed order. Under
``torch.use_deterministic_algorithms(True)`` it serves the single keys as well, behind a mask: as many products as dense
attention, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import check_indices
from .attend import LOG2_E, attn_bias_strides, in_log2, kept_keys, load_rows, pooled_keys
from .launch import block_width, choose, launch, precision_of, readable, row_strides


@triton.jit
def meet(q, grad, k, v, added, scale, PRECISION: tl.constexpr):
    """Logits in units of log 2, and products of the gradient with the values, both ``[M, N]``."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + added
    return logits, tl.dot(grad, tl.trans(v), input_precision=PRECISION)


@triton.jit
def absorb(logits, products, row_max, row_sum, row_product):
    """One block of keys into the statistics of the softmax and the sum of the weighted products."""
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    weights, shrink = tl.exp2(logits - new_max[:, None]), tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    return new_max, row_sum, row_product * shrink + tl.sum(weights * products, 1)


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, tile_tokens_ptr, indices_ptr, bias_ptr,
    tail_k_ptr, tail_v_ptr, tail_bias_ptr, attn_bias_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbias_ptr, dtail_bias_ptr, dattn_ptr, normalizer_ptr, mean_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n,
    tail_k_b, tail_k_h, tail_k_n, tail_v_b, tail_v_h, tail_v_n, attn_b, attn_h, attn_n, attn_m,
    dattn_b, dattn_h, dattn_n,
    num_heads, num_pairs, num_tokens, num_tiles, num_listed, num_tail, num_dense_programs, scale, factor,
    TILE: tl.constexpr, PREFIX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_ATTN_BIAS: tl.constexpr, ADD_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` queries of one tile, or of the prefix tokens, of one head."""
    program = tl.program_id(0)
    dense = program < num_dense_programs
    parts = tl.where(dense, tl.cdiv(PREFIX, BLOCK_M), tl.cdiv(TILE, BLOCK_M))
    tiles = tl.where(dense, 1, num_tiles)
    number = tl.where(dense, program, program - num_dense_programs)
    tile = (number // parts) % tiles
    pair = number // (parts * tiles)
    offset = pair.to(tl.int64)
    image, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    list_number = offset * num_tiles + tile
    num_keys = tl.where(dense, num_tokens, num_listed)
    tail_length = tl.where(dense, 0, num_tail)

    rows = number % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = tl.load(tile_tokens_ptr + tile * TILE + rows, mask=(rows < TILE) & ~dense, other=-1)
    if PREFIX:
        tokens = tl.where(dense & (rows < PREFIX), rows, tokens)
    inside = tokens >= 0
    width = tl.arange(0, BLOCK_D)
    cells = inside[:, None] & (width < D)[None, :]
    columns = tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + image * q_b + head * q_h + tokens[:, None] * q_n + width[None, :], mask=cells, other=0.0)
    grad_rows = grad_ptr + image * grad_b + head * grad_h + tokens * grad_n
    grad = tl.load(grad_rows[:, None] + width[None, :], mask=cells, other=0.0)
    attn_rows = attn_bias_ptr + image * attn_b + head * attn_h + tokens * attn_n
    dattn_rows = dattn_ptr + image * dattn_b + head * dattn_h + tokens * dattn_n
    indices_ptr += list_number * num_listed
    bias_ptr += list_number * num_listed
    parts_before = (number % parts).to(tl.int64) * num_pairs * num_tiles
    dbias_ptr += (parts_before + list_number) * num_listed
    k_ptr += image * k_b + head * k_h
    v_ptr += image * v_b + head * v_h
    dk_ptr += offset * num_tokens * D
    dv_ptr += offset * num_tokens * D
    tail_k_ptr += image * tail_k_b + head * tail_k_h
    tail_v_ptr += image * tail_v_b + head * tail_v_h
    tail_bias_ptr += list_number * num_tail
    dtail_bias_ptr += (parts_before + list_number) * num_tail

    row_max = tl.full([BLOCK_M], -3.4028234e38, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_product = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        index, added = kept_keys(
            start, num_keys, dense, indices_ptr, bias_ptr, attn_rows, attn_m, inside,
            PREFIX, BLOCK_N, HAS_BIAS, HAS_ATTN_BIAS,
        )  # fmt: skip
        k, v = load_rows(k_ptr, index * k_n, D, BLOCK_D), load_rows(v_ptr, index * v_n, D, BLOCK_D)
        logits, products = meet(q, grad, k, v, added, scale, PRECISION)
        row_max, row_sum, row_product = absorb(logits, products, row_max, row_sum, row_product)
    if HAS_TAIL:
        for start in range(0, tail_length, BLOCK_N):
            group, added = pooled_keys(
                start, num_tail, num_tokens, tail_bias_ptr, attn_rows, attn_m, inside, BLOCK_N, HAS_ATTN_BIAS
            )
            k = load_rows(tail_k_ptr, group * tail_k_n, D, BLOCK_D)
            v = load_rows(tail_v_ptr, group * tail_v_n, D, BLOCK_D)
            logits, products = meet(q, grad, k, v, added, scale, PRECISION)
            row_max, row_sum, row_product = absorb(logits, products, row_max, row_sum, row_product)
    # Rows without any key have weights of zero.
    empty = row_sum == 0.0
    normalizer = tl.where(empty, float("inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
    mean = row_product / tl.where(empty, 1.0, row_sum)
    tl.store(normalizer_ptr + offset * num_tokens + tokens, normalizer, mask=inside)
    tl.store(mean_ptr + offset * num_tokens + tokens, mean, mask=inside)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        index, added = kept_keys(
            start, num_keys, dense, indices_ptr, bias_ptr, attn_rows, attn_m, inside,
            PREFIX, BLOCK_N, HAS_BIAS, HAS_ATTN_BIAS,
        )  # fmt: skip
        k, v = load_rows(k_ptr, index * k_n, D, BLOCK_D), load_rows(v_ptr, index * v_n, D, BLOCK_D)
        logits, products = meet(q, grad, k, v, added, scale, PRECISION)
        weights = tl.exp2(logits - normalizer[:, None])
        dlogits = weights * (products - mean[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
        listed = start + columns < num_keys
        if ADD_KEYS:
            dk = tl.dot(tl.trans(dlogits.to(q.dtype)), q, input_precision=PRECISION) * factor
            dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
            places = index[:, None] * D + width[None, :]
            there = listed[:, None] & (width < D)[None, :]
            tl.atomic_add(dk_ptr + places, dk, mask=there, sem="relaxed")
            tl.atomic_add(dv_ptr + places, dv, mask=there, sem="relaxed")
        if HAS_BIAS:
            tl.store(dbias_ptr + start + columns, tl.sum(dlogits, 0), mask=listed & ~dense)
        if HAS_ATTN_BIAS:
            there = inside[:, None] & listed[None, :]
            tl.atomic_add(dattn_rows[:, None] + index[None, :], dlogits, mask=there, sem="relaxed")
    if HAS_TAIL:
        for start in range(0, tail_length, BLOCK_N):
            group, added = pooled_keys(
                start, num_tail, num_tokens, tail_bias_ptr, attn_rows, attn_m, inside, BLOCK_N, HAS_ATTN_BIAS
            )
            k = load_rows(tail_k_ptr, group * tail_k_n, D, BLOCK_D)
            v = load_rows(tail_v_ptr, group * tail_v_n, D, BLOCK_D)
            logits, products = meet(q, grad, k, v, added, scale, PRECISION)
            dlogits = tl.exp2(logits - normalizer[:, None]) * (products - mean[:, None])
            dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
            listed = start + columns < num_tail
            tl.store(dtail_bias_ptr + start + columns, tl.sum(dlogits, 0), mask=listed)
            if HAS_ATTN_BIAS:
                there = inside[:, None] & listed[None, :]
                tl.atomic_add(dattn_rows[:, None] + (num_tokens + group)[None, :], dlogits, mask=there, sem="relaxed")
    dq_rows = dq_ptr + (offset * num_tokens + tokens) * D
    tl.store(dq_rows[:, None] + width[None, :], (dq * factor).to(dq_ptr.dtype.element_ty), mask=cells)


@triton.jit
def columns_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, tile_tokens_ptr, bias_ptr, attn_bias_ptr, normalizer_ptr, mean_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, attn_b, attn_h, attn_n, attn_m,
    num_heads, num_tokens, num_tiles, num_columns, num_dense, scale, factor,
    TILE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ATTN_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` keys and values of one head, summed over all queries in the order of their tiles.

    ``bias`` ``[B, H, T, num_columns]`` holds ``-inf`` where a tile does not attend to a key. ``num_dense`` prefix
    tokens' rows count, too.
    """
    blocks = tl.cdiv(num_columns, BLOCK_N)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    offset = pair.to(tl.int64)
    image, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    q_ptr += image * q_b + head * q_h
    grad_ptr += image * grad_b + head * grad_h
    attn_bias_ptr += image * attn_b + head * attn_h
    normalizer_ptr += offset * num_tokens
    mean_ptr += offset * num_tokens
    bias_ptr += offset * num_tiles * num_columns

    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < num_columns
    listed = tl.minimum(column, num_columns - 1)
    width = tl.arange(0, BLOCK_D)
    k = load_rows(k_ptr + image * k_b + head * k_h, listed * k_n, D, BLOCK_D)
    v = load_rows(v_ptr + image * v_b + head * v_h, listed * v_n, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    parts: tl.constexpr = (TILE + BLOCK_M - 1) // BLOCK_M
    dense_steps = tl.cdiv(num_dense, BLOCK_M)
    for step in range(0, dense_steps + num_tiles * parts):
        dense = step < dense_steps
        number = tl.where(dense, 0, step - dense_steps)
        tile, part = number // parts, number % parts
        place = part * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens = tl.load(tile_tokens_ptr + tile * TILE + place, mask=(place < TILE) & ~dense, other=-1)
        row = step * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens = tl.where(dense & (row < num_dense), row, tokens)
        inside = tokens >= 0
        cells = inside[:, None] & (width < D)[None, :]
        q = tl.load(q_ptr + tokens[:, None] * q_n + width[None, :], mask=cells, other=0.0)
        grad = tl.load(grad_ptr + tokens[:, None] * grad_n + width[None, :], mask=cells, other=0.0)
        normalizer = tl.load(normalizer_ptr + tokens, mask=inside, other=float("inf"))
        mean = tl.load(mean_ptr + tokens, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + tile * num_columns + column, mask=there & ~dense, other=0.0)
        added = tl.where(there, in_log2(bias), float("-inf"))[:, None]
        if HAS_ATTN_BIAS:
            attn = attn_bias_ptr + tokens[None, :] * attn_n + listed[:, None] * attn_m
            added += in_log2(tl.load(attn, mask=inside[None, :], other=0.0))
        logits, products = meet(k, v, q, grad, added, scale, PRECISION)
        weights = tl.exp2(logits - normalizer[None, :])
        dlogits = weights * (products - mean[None, :])
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)
    places = (offset * num_columns + column[:, None]) * D + width[None, :]
    cells = there[:, None] & (width < D)[None, :]
    tl.store(dk_ptr + places, (dk * factor).to(dk_ptr.dtype.element_ty), mask=cells)
    tl.store(dv_ptr + places, dv.to(dv_ptr.dtype.element_ty), mask=cells)


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
    precision: str = "same",
) -> list[Tensor]:
    """Arguments and results as in ``sparsifiner::attend_backward``."""
    batch, heads, num_tokens, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    check_indices(indices, num_tokens)
    exact = torch.are_deterministic_algorithms_enabled()
    settings = choose("attend_backward", q, tile_size)
    block_m, parts = settings.block_m, triton.cdiv(tile_size, settings.block_m)
    num_tail = 0 if tail_k is None else tail_k.shape[2]
    q, k, v, grad = readable(q), readable(k), readable(v), readable(grad)
    tail_k, tail_v = (None if x is None else readable(x) for x in (tail_k, tail_v))
    tile_tokens, indices = tile_tokens.contiguous(), indices.contiguous()
    bias, tail_bias = (None if x is None else x.contiguous() for x in (bias, tail_bias))

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=q.device)

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = numbers(*k.shape), numbers(*v.shape)
    dbias = None if bias is None else numbers(parts, *bias.shape)
    dtail_bias = None if tail_bias is None else numbers(parts, *tail_bias.shape)
    dattn = None
    if attn_bias is not None:
        dattn = numbers(*((batch, heads) if exact else attn_bias.shape[:2]), *attn_bias.shape[2:])
    normalizer, mean = numbers(batch, heads, num_tokens), numbers(batch, heads, num_tokens)
    num_dense = batch * heads * triton.cdiv(num_prefix_tokens, block_m)
    given = [q if x is None else x for x in (bias, tail_k, tail_v, tail_bias, attn_bias)]
    written = [dq if x is None else x for x in (dbias, dtail_bias, dattn)]
    shared = dict(TILE=tile_size, D=width, BLOCK_M=block_m, BLOCK_N=settings.block_n, BLOCK_D=block_width(width),
                  HAS_ATTN_BIAS=attn_bias is not None, PRECISION=precision_of(q),
                  num_warps=settings.num_warps, num_stages=settings.num_stages)  # fmt: skip
    launch(
        rows_kernel,
        (num_dense + batch * heads * num_tiles * parts,),
        q, k, v, grad, tile_tokens, indices, *given, dq, dk, dv, *written, normalizer, mean,
        *row_strides(q, k, v, grad, tail_k, tail_v), *attn_bias_strides(attn_bias), *attn_bias_strides(dattn)[:3],
        heads, batch * heads, num_tokens, num_tiles, indices.shape[3], num_tail, num_dense, scale * LOG2_E, scale,
        PREFIX=num_prefix_tokens, HAS_BIAS=bias is not None, HAS_TAIL=num_tail > 0, ADD_KEYS=not exact, **shared,
        outputs=(dq, dk, dv, *written, normalizer, mean),
    )  # fmt: skip

    def columns(k: Tensor, v: Tensor, bias: Tensor, num_dense: int, attn_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        launch(
            columns_kernel,
            (batch * heads * triton.cdiv(k.shape[2], settings.block_n),),
            q, k, v, grad, tile_tokens, bias, q if attn_bias is None else attn_bias, normalizer, mean, dk, dv,
            *row_strides(q, k, v, grad), *attn_bias_strides(attn_bias), heads, num_tokens, num_tiles, k.shape[2],
            num_dense, scale * LOG2_E, scale, **shared, outputs=(dk, dv),
        )  # fmt: skip
        return dk, dv

    if exact:
        dk, dv = columns(k, v, mask_of(indices, bias, num_tokens), num_prefix_tokens, attn_bias)
    found = [dq, dk.to(k.dtype), dv.to(v.dtype)]
    if bias is not None and dbias is not None:
        found.append(dbias.sum(0).to(bias.dtype))
    if tail_k is not None and tail_v is not None and tail_bias is not None and dtail_bias is not None:
        pooled_bias = None if attn_bias is None else attn_bias[..., num_tokens:]
        found += [*columns(tail_k, tail_v, tail_bias, 0, pooled_bias), dtail_bias.sum(0).to(tail_bias.dtype)]
    if attn_bias is not None and dattn is not None:
        found.append(dattn.sum_to_size(attn_bias.shape).to(attn_bias.dtype))
    return found


def mask_of(indices: Tensor, bias: Tensor | None, num_tokens: int) -> Tensor:
    """What is added to the logits of every key, float32 ``[B, H, T, N]``: ``-inf`` where a tile does not keep it."""
    added = torch.zeros(indices.shape, dtype=torch.float32, device=indices.device) if bias is None else bias.float()
    mask = torch.full((*indices.shape[:3], num_tokens), float("-inf"), device=indices.device)
    # Padding entries repeat a key with bias -inf; the maximum keeps the entry that counts.
    return mask.scatter_reduce_(-1, indices.long(), added, "amax")
