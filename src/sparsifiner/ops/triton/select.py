"""Exact selection of the largest in Triton: bisection on the bits of ordered integers, one row to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..topk import check_topk
from .launch import launch

# Longer rows are read in chunks, again for every bit.
MOST_IN_REGISTERS = 8192

ELEMENTS_PER_WARP = 512


@triton.jit
def ordered_keys(ptr, place, num_columns, BITS: tl.constexpr, INFINITY: tl.constexpr):
    """Integers in the order of the numbers whose bits are given; NaN last, whatever its sign, and -0 like 0.

    Integers themselves, with ``INFINITY`` 0, stay as they are. Beyond the row: the lowest.
    """
    lowest: tl.constexpr = -(2 ** (BITS - 1))
    bits = tl.load(ptr + place, mask=place < num_columns, other=lowest).to(tl.int32)
    if INFINITY:
        size = bits & (2 ** (BITS - 1) - 1)
        ordered = tl.where(bits < 0, -size, size)
        bits = tl.where(size > INFINITY, 2 ** (BITS - 1) - 1, ordered)
        bits = tl.where(place < num_columns, bits, lowest)
    return bits


@triton.jit
def count_from(
    keys, ptr, bound, num_columns,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ABOVE: tl.constexpr,
):  # fmt: skip
    """How many of a row are at least ``bound``, or above it; ``keys`` are the row where it is held ``WHOLE``."""
    if WHOLE:
        return tl.sum(((keys > bound) if ABOVE else (keys >= bound)).to(tl.int32), 0)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_columns, BLOCK):
        keys = ordered_keys(ptr, start + tl.arange(0, BLOCK), num_columns, BITS, INFINITY)
        found += ((keys > bound) if ABOVE else (keys >= bound)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def select_kernel(
    scores_ptr, out_ptr, num_columns, row_length, count,
    FIRST: tl.constexpr, EARLY: tl.constexpr, FLAGS: tl.constexpr, BITS: tl.constexpr, INFINITY: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Numbers of the ``count`` largest of a row, rising, after those below ``FIRST``; of equal ones the lowest.

    With ``FLAGS``, instead, ones where a number is among them and zeros elsewhere.
    """
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * row_length
    place = tl.arange(0, BLOCK)
    keys = ordered_keys(scores_ptr, place, num_columns, BITS, INFINITY)
    # The largest bound that at least ``count`` reach, bit by bit.
    lowest: tl.constexpr = -(2 ** (BITS - 1))
    reached = count_from(keys, scores_ptr, 0, num_columns, BITS, INFINITY, BLOCK, WHOLE, False)
    bound = tl.where(reached >= count, 0, lowest)
    for bit in tl.static_range(1, BITS):
        higher = bound + 2 ** (BITS - 1 - bit)
        reached = count_from(keys, scores_ptr, higher, num_columns, BITS, INFINITY, BLOCK, WHOLE, False)
        bound = tl.where(reached >= count, higher, bound)
    equal_wanted = count - count_from(keys, scores_ptr, bound, num_columns, BITS, INFINITY, BLOCK, WHOLE, True)
    if FLAGS:
        out_ptr += row * num_columns
    else:
        out_ptr += row * (FIRST + count)
        if FIRST:
            early = tl.arange(0, EARLY)
            tl.store(out_ptr + early, early, mask=early < FIRST)
    above_before, equal_before = 0, 0
    for start in range(0, num_columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        if not WHOLE:
            keys = ordered_keys(scores_ptr, place, num_columns, BITS, INFINITY)
        inside = place < num_columns
        above = (keys > bound) & inside
        equal = (keys == bound) & inside
        # One prefix sum of both counts, 16 bits each.
        packed = above.to(tl.int32) + equal.to(tl.int32) * 65536
        before = tl.cumsum(packed, 0) - packed
        num_equal = equal_before + before // 65536
        keep = above | (equal & (num_equal < equal_wanted))
        if FLAGS:
            tl.store(out_ptr + place, keep.to(tl.int8), mask=inside)
        else:
            position = FIRST + above_before + before % 65536 + tl.minimum(num_equal, equal_wanted)
            tl.store(out_ptr + position, FIRST + place, mask=keep)
        above_before += tl.sum(above.to(tl.int32), 0)
        equal_before += tl.sum(equal.to(tl.int32), 0)


def select(scores: Tensor, num_columns: int, count: int, first: int = 0, *, flags: bool = False) -> Tensor:
    """Exact top-k of the first ``num_columns`` of each row ``[R, L]`` of ordered 16-bit integers or of numbers.

    Args:
        scores: int16, or bits of floating-point numbers by their dtype.
        num_columns: candidates.
        count: how many to select.
        first: numbers below it come first in every row; candidates count from it.
        flags: whether to mark the selected instead of listing them.

    Returns:
        int32 ``[R, first + count]``, rising; with ``flags`` int8 ``[R, num_columns]``.
    """
    rows = scores.shape[0]
    out = scores.new_empty(
        (rows, num_columns) if flags else (rows, first + count), dtype=torch.int8 if flags else torch.int32
    )
    bits = 8 * scores.element_size()
    infinity = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}.get(scores.dtype, 0)
    block = min(MOST_IN_REGISTERS, max(16, triton.next_power_of_2(num_columns)))
    launch(
        select_kernel,
        (rows,),
        scores.view(torch.int16 if bits == 16 else torch.int32), out, num_columns, scores.stride(0), count,
        FIRST=first, EARLY=triton.next_power_of_2(max(1, first)), FLAGS=flags, BITS=bits, INFINITY=infinity,
        BLOCK=block, WHOLE=num_columns <= block,
        num_warps=min(16, max(1, block // ELEMENTS_PER_WARP)), num_stages=2,
        outputs=(out,),
    )  # fmt: skip
    return out


def topk(scores: Tensor, count: int) -> Tensor:
    """Arguments and result as in ``sparsifiner::topk``; of equal scores the lowest numbers."""
    columns = scores.shape[-1]
    check_topk(count, columns)
    rows = scores.reshape(-1, columns) if columns else scores.new_empty(scores.shape[:-1].numel(), 0)
    if not count:
        return scores.new_empty((*scores.shape[:-1], 0), dtype=torch.int32)
    return select(rows.contiguous(), columns, count).view(*scores.shape[:-1], count)
