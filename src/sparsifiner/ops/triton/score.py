"""Scores of keys in Triton: what each tile's pooled queries need, as ordered 16-bit integers.

One program per (image, head, few tiles) reads every key twice: once for the softmax statistics of each pooled query,
once for the scores, whose merging over the tile's pooled queries is the epilogue of the product. Logits never leave the
registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks_of, check_count
from .._common import num_blocks as blocks_in
from ..screened_keys import check_screening
from .groups import describe_blocks
from .launch import block_width, choose, launch, precision_of, readable
from .select import select

LOG2_E = math.log2(math.e)
TINY: tl.constexpr = tl.constexpr(2.0**-126)  # the smallest normal float32; NaN counts as it, too


@triton.jit
def log_weights(weight_ptr, key, num_candidates, HAS_WEIGHT: tl.constexpr):
    """Logarithms to the base 2 of the weights of some keys, at least -126."""
    weight = tl.full(key.shape, 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + key, mask=key < num_candidates, other=0.0).to(tl.float32)
    return tl.log2(tl.maximum(weight, TINY))


@triton.jit
def load_keys(k_ptr, key, num_candidates, k_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys ``[BLOCK_N, BLOCK_D]``; beyond the candidates the last one again."""
    width = tl.arange(0, BLOCK_D)
    pointers = k_ptr + tl.minimum(key, num_candidates - 1)[:, None] * k_n + width[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(width < D)[None, :], other=0.0)


@triton.jit
def block_of(key, grid_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Number of the block that a patch lies in."""
    row, column = key // grid_columns, key % grid_columns
    return row // BLOCK_ROWS * tl.cdiv(grid_columns, BLOCK_COLUMNS) + column // BLOCK_COLUMNS


@triton.jit
def score_kernel(
    pooled_ptr, k_ptr, weight_ptr, spread_ptr, chosen_ptr, scores_ptr,
    k_b, k_h, k_n, num_heads, num_tiles, num_candidates, num_blocks, row_length, grid_columns, scale, square_scale,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SPREAD: tl.constexpr, SCREENED: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of every candidate for ``TILES`` tiles of one head."""
    parts = tl.cdiv(num_tiles, TILES)
    pair, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    pair_offset = pair.to(tl.int64)
    k_ptr += (pair // num_heads).to(tl.int64) * k_b + (pair % num_heads).to(tl.int64) * k_h
    weight_ptr += pair_offset * num_candidates
    spread_ptr += pair_offset * num_candidates
    chosen_ptr += pair_offset * num_tiles * num_blocks
    # A thread holds neighbouring columns of a product: two groups of a tile stand side by side, then the tiles follow,
    # then the other pairs of groups, so that merging the groups needs hardly any exchange between threads.
    SIDE: tl.constexpr = min(2, GROUPS)
    row = tl.arange(0, TILES * GROUPS)
    group = row // (SIDE * TILES) * SIDE + row % SIDE
    tile_of_row = part * TILES + row // SIDE % TILES
    there = (group < NUM_GROUPS) & (tile_of_row < num_tiles)
    width = tl.arange(0, BLOCK_D)
    pooled_row = (pair_offset * num_tiles + tile_of_row) * NUM_GROUPS + group
    q = tl.load(
        pooled_ptr + pooled_row[:, None] * D + width[None, :], mask=there[:, None] & (width < D)[None, :], other=0.0
    )
    square = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) * square_scale

    row_max = tl.full([TILES * GROUPS], -3.4028234e38, tl.float32)
    row_sum = tl.zeros([TILES * GROUPS], tl.float32)
    poison = tl.zeros([TILES * GROUPS], tl.float32)  # NaN once a logit was not finite
    top = -126.0
    for start in range(0, num_candidates, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inside = key < num_candidates
        weight = log_weights(weight_ptr, key, num_candidates, HAS_WEIGHT)
        top = tl.maximum(top, tl.max(tl.where(inside & (weight < float("inf")), weight, -126.0), 0))
        k = load_keys(k_ptr, key, num_candidates, k_n, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SPREAD:
            logits += square[:, None] * tl.load(spread_ptr + key, mask=inside, other=0.0)[None, :]
        poison += tl.sum(logits * 0.0, 1)
        if SCREENED:
            flags = chosen_ptr + tile_of_row[:, None] * num_blocks
            flags += block_of(key, grid_columns, BLOCK_ROWS, BLOCK_COLUMNS)[None, :]
            inside = inside[None, :] & (tl.load(flags, mask=inside[None, :] & there[:, None], other=0) != 0)
            logits = tl.where(inside, logits, float("-inf"))
        else:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), 1)
        row_max = new_max
    normalizer = tl.where(there, row_max + tl.log2(tl.maximum(row_sum, TINY)), float("inf"))
    poisoned = tl.max((poison != 0.0).to(tl.int32), 0) != 0
    if SUM:
        top += tl.log2(NUM_GROUPS * 1.0)

    tile = part * TILES + tl.arange(0, TILES)
    scores_row = scores_ptr + (pair_offset * num_tiles + tile) * row_length
    for start in range(0, num_candidates, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inside = key < num_candidates
        k = load_keys(k_ptr, key, num_candidates, k_n, D, BLOCK_D)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if HAS_SPREAD:
            logits += tl.load(spread_ptr + key, mask=inside, other=0.0)[:, None] * square[None, :]
        logits -= normalizer[None, :]
        if SUM:
            shares = tl.reshape(tl.exp2(logits), [BLOCK_N, GROUPS // SIDE, TILES, SIDE])
            score = tl.log2(tl.maximum(tl.sum(tl.sum(shares, 3), 1), TINY))
        else:
            score = tl.max(tl.max(tl.reshape(logits, [BLOCK_N, GROUPS // SIDE, TILES, SIDE]), 3), 1)
        score += log_weights(weight_ptr, key, num_candidates, HAS_WEIGHT)[:, None] - top
        # 1,024 steps to an octave: 0.07 % of a probability each. What is 64 octaves below the top is equal.
        score = tl.minimum(tl.maximum(score * 1024.0 + 65534.0, 1.0), 65534.0)
        ordered = tl.where(score == score, score, 0.0).to(tl.int32)
        if SCREENED:
            flags = chosen_ptr + tile[None, :] * num_blocks
            flags += block_of(key, grid_columns, BLOCK_ROWS, BLOCK_COLUMNS)[:, None]
            ordered *= tl.load(flags, mask=inside[:, None] & (tile < num_tiles)[None, :], other=0).to(tl.int32)
        if poisoned:
            # Keys that are not finite come first: attention to them is NaN, as when it is dense.
            finite = tl.sum(k.to(tl.float32) * 0.0, 1) == 0.0
            ordered = tl.where(finite[:, None], ordered, 65535)
        tl.store(
            scores_row[None, :] + key[:, None], (ordered - 32768).to(tl.int16),
            mask=inside[:, None] & (tile < num_tiles)[None, :],
        )  # fmt: skip


def score(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    scale: float,
    sum_probabilities: bool,
    *,
    spread: Tensor | None = None,
    chosen: Tensor | None = None,
    grid_columns: int = 1,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """Scores of keys as ordered integers, int16 ``[B, H, T, L]``, whose rows may be longer than the keys.

    Args:
        pooled: pooled queries of each tile ``[B, H, T, G, D]``.
        k: candidate keys ``[B, H, C, D]``.
        weight: factor on each candidate's probabilities ``[B, H, C]``, or None.
        scale: factor on the logits.
        sum_probabilities: merge the pooled queries' probabilities by sum instead of max.
        spread: added to the logits, times the squared length of the scaled query, float32 ``[B, H, C]``, or None.
        chosen: 1 for blocks whose keys are candidates of a tile, int8 ``[B, H, T, blocks]``, or None for all.
        grid_columns: of the patch grid, with ``chosen``.
        block: rows and columns of a block, with ``chosen``.
    """
    batch, heads, num_tiles, num_groups, width = pooled.shape
    candidates = k.shape[2]
    # Rows of whole 32 bytes, so that they are written and read in vectors.
    scores = torch.empty((batch, heads, num_tiles, -(-candidates // 16) * 16), dtype=torch.int16, device=k.device)
    groups = triton.next_power_of_2(num_groups)
    settings = choose("score", k, groups)
    tiles = max(1, settings.block_m // groups)
    k = readable(k)
    launch(
        score_kernel,
        (batch * heads * triton.cdiv(num_tiles, tiles),),
        pooled.contiguous(), k, k if weight is None else weight.contiguous(),
        k if spread is None else spread.contiguous(), scores if chosen is None else chosen, scores,
        *k.stride()[:3], heads, num_tiles, candidates, 1 if chosen is None else chosen.shape[3], scores.shape[3],
        grid_columns, scale * LOG2_E, scale * scale * LOG2_E,
        NUM_GROUPS=num_groups, GROUPS=groups, TILES=tiles, D=width,
        BLOCK_N=settings.block_n, BLOCK_D=block_width(width), BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1],
        HAS_WEIGHT=weight is not None, HAS_SPREAD=spread is not None, SCREENED=chosen is not None,
        SUM=sum_probabilities, PRECISION=precision_of(k),
        num_warps=settings.num_warps, num_stages=settings.num_stages,
        outputs=(scores,),
    )  # fmt: skip
    return scores


def tile_keys(
    pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, scale: float, sum_probabilities: bool
) -> Tensor:
    """Arguments and result as in ``sparsifiner::tile_keys``; scores are equal where they differ by less than 0.1 %."""
    candidates = k.shape[2] - first
    check_count(count, candidates)
    scores = score(pooled, k[:, :, first:], weight, scale, sum_probabilities)
    indices = select(scores.flatten(0, 2), candidates, count, first)
    return indices.view(*pooled.shape[:3], first + count)


def screened_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
    num_blocks: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
) -> Tensor:
    """Arguments and result as in ``sparsifiner::screened_keys``.

    Reading all keys and masking is faster on a GPU than gathering some of them for the few pooled queries of a tile.
    """
    grid, block = (rows, columns), (block_rows, block_columns)
    check_screening(k, blocks_of(*grid, *block, prefix), num_blocks, count)
    batch, heads, _, width = k.shape
    all_blocks = blocks_in(*grid, *block)
    means = k.new_empty(batch, heads, all_blocks, width)
    spread = k.new_empty((batch, heads, all_blocks), dtype=torch.float32)
    highest = None if weight is None else torch.empty_like(spread)
    weight = None if weight is None else weight.contiguous()
    describe_blocks(k, grid, block, prefix, means=means, spread=spread, weight=weight, highest=highest)
    scores = score(pooled, means, highest, scale, sum_probabilities, spread=spread)
    chosen = select(scores.flatten(0, 2), all_blocks, num_blocks, flags=True).view(*pooled.shape[:3], all_blocks)
    patches = k[:, :, prefix:]
    scores = score(pooled, patches, weight, scale, sum_probabilities, chosen=chosen, grid_columns=columns, block=block)
    indices = select(scores.flatten(0, 2), rows * columns, count, prefix)
    return indices.view(*pooled.shape[:3], prefix + count)
