"""Groups of patches in Triton: means of blocks, Lloyd's regrouping among the 3x3 blocks around, and distances.

A program serves one block, or the group that started as it, of one head. Sums are taken in float32 and always in the
same order: nothing here depends on how programs are scheduled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import check_tokens, num_blocks
from ..pool_groups import check_member
from .launch import block_width, exact_products, launch, products, readable


@triton.jit
def patches_of(row, column, grid_rows, grid_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr):
    """Numbers of the patches of a rectangle that starts at ``row`` and ``column``, -1 where it sticks out."""
    place = tl.arange(0, PLACES)
    row += place // COLUMNS
    column += place % COLUMNS
    inside = (place < ROWS * COLUMNS) & (row >= 0) & (row < grid_rows) & (column >= 0) & (column < grid_columns)
    return tl.where(inside, row * grid_columns + column, -1)


@triton.jit
def rows_of(ptr, number, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``number`` as float32 ``[S, BLOCK_D]``, zeros where the number is negative."""
    width = tl.arange(0, BLOCK_D)
    mask = (number >= 0)[:, None] & (width < D)[None, :]
    return tl.load(ptr + number[:, None] * stride + width[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def block_kernel(
    x_ptr, mean_ptr, distance_ptr, spread_ptr, weight_ptr, highest_ptr, x_b, x_h, x_n,
    num_heads, grid_rows, grid_columns, prefix,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr,
    MEANS: tl.constexpr, DISTANCES: tl.constexpr, SPREAD: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Of one block: its mean, its patches' distances from it, their mean square per element, its highest weight."""
    blocks_across = tl.cdiv(grid_columns, COLUMNS)
    num_blocks = tl.cdiv(grid_rows, ROWS) * blocks_across
    pair, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    offset = pair.to(tl.int64)
    row, column = block // blocks_across * ROWS, block % blocks_across * COLUMNS
    patch = patches_of(row, column, grid_rows, grid_columns, ROWS, COLUMNS, PLACES)
    x_ptr += (pair // num_heads).to(tl.int64) * x_b + (pair % num_heads).to(tl.int64) * x_h + prefix * x_n
    x = rows_of(x_ptr, patch, x_n, D, BLOCK_D)
    inside = patch >= 0
    size = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(x, 0) / size
    width = tl.arange(0, BLOCK_D)
    if MEANS:
        tl.store(
            mean_ptr + (offset * num_blocks + block) * D + width, mean.to(mean_ptr.dtype.element_ty), mask=width < D
        )
    if DISTANCES or SPREAD:
        apart = tl.where(inside[:, None] & (width < D)[None, :], x - mean[None, :], 0.0)
        square = tl.sum(apart * apart, 1)
    if DISTANCES:
        num_tokens = prefix + grid_rows * grid_columns
        tl.store(distance_ptr + offset * num_tokens + prefix + patch, tl.sqrt(square), mask=inside)
    if SPREAD:
        tl.store(spread_ptr + offset * num_blocks + block, tl.sum(square, 0) / (size * D))
    if WEIGHTS:
        num_patches = grid_rows * grid_columns
        weight = tl.load(weight_ptr + offset * num_patches + patch, mask=inside, other=0.0).to(tl.float32)
        tl.store(highest_ptr + offset * num_blocks + block, tl.max(weight, 0))


@triton.jit
def join_kernel(
    x_ptr, centre_ptr, member_ptr, x_b, x_h, x_n, num_heads, grid_rows, grid_columns, prefix,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The patches of one block join the nearest of the means of it and the blocks around it."""
    blocks_down, blocks_across = tl.cdiv(grid_rows, ROWS), tl.cdiv(grid_columns, COLUMNS)
    num_blocks = blocks_down * blocks_across
    pair, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    offset = pair.to(tl.int64)
    block_row, block_column = block // blocks_across, block % blocks_across
    patch = patches_of(block_row * ROWS, block_column * COLUMNS, grid_rows, grid_columns, ROWS, COLUMNS, PLACES)
    x_ptr += (pair // num_heads).to(tl.int64) * x_b + (pair % num_heads).to(tl.int64) * x_h + prefix * x_n
    x = rows_of(x_ptr, patch, x_n, D, BLOCK_D)
    around = tl.arange(0, 16)
    row, column = block_row + around // 3 - 1, block_column + around % 3 - 1
    exists = (around < 9) & (row >= 0) & (row < blocks_down) & (column >= 0) & (column < blocks_across)
    number = tl.where(exists, row * blocks_across + column, -1)
    centres = rows_of(centre_ptr + offset * num_blocks * D, number, D, D, BLOCK_D)
    # |x - c|^2 without the part that is the same for all groups, negated and halved.
    nearness = products(x.to(x_ptr.dtype.element_ty), centres, EXACT) - tl.sum(centres * centres, 1)[None, :] / 2
    nearest = tl.argmax(tl.where(exists[None, :], nearness, float("-inf")), 1)
    member = (block_row + nearest // 3 - 1) * blocks_across + block_column + nearest % 3 - 1
    tl.store(member_ptr + offset * grid_rows * grid_columns + patch, member, mask=patch >= 0)


@triton.jit
def mean_kernel(
    x_ptr, member_ptr, empty_ptr, mean_ptr, exact_ptr, x_b, x_h, x_n, num_heads, grid_rows, grid_columns, prefix,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr,
    KEEP: tl.constexpr, MEANS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Mean of one group, whose patches lie in the block it started as or around; ``KEEP`` what an empty one had."""
    blocks_down, blocks_across = tl.cdiv(grid_rows, ROWS), tl.cdiv(grid_columns, COLUMNS)
    num_blocks = blocks_down * blocks_across
    pair, group = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    offset = pair.to(tl.int64)
    x_ptr += (pair // num_heads).to(tl.int64) * x_b + (pair % num_heads).to(tl.int64) * x_h + prefix * x_n
    member_ptr += offset * grid_rows * grid_columns
    total = tl.zeros([BLOCK_D], tl.float32)
    count = 0.0
    for strip in tl.static_range(3):
        row, column = (group // blocks_across + strip - 1) * ROWS, (group % blocks_across - 1) * COLUMNS
        patch = patches_of(row, column, grid_rows, grid_columns, ROWS, 3 * COLUMNS, PLACES)
        member = tl.load(member_ptr + patch, mask=patch >= 0, other=-1)
        patch = tl.where(member == group, patch, -1)
        total += tl.sum(rows_of(x_ptr, patch, x_n, D, BLOCK_D), 0)  # only members are read
        count += tl.sum((patch >= 0).to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    width = tl.arange(0, BLOCK_D)
    place = (offset * num_blocks + group) * D + width
    if KEEP:
        mean = tl.where(count > 0, mean, tl.load(empty_ptr + place, mask=width < D, other=0.0))
    if MEANS:
        tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=width < D)
    if EXACT:
        tl.store(exact_ptr + place, mean, mask=width < D)


@triton.jit
def distance_kernel(
    x_ptr, member_ptr, mean_ptr, distance_ptr, x_b, x_h, x_n, num_heads, num_tokens, num_groups, last, prefix,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Distances of the tokens below ``last`` from the mean of their group, of prefix tokens from zero."""
    parts = tl.cdiv(last, BLOCK_N)
    pair, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    offset = pair.to(tl.int64)
    token = part * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.where(token < last, token, -1)
    x_ptr += (pair // num_heads).to(tl.int64) * x_b + (pair % num_heads).to(tl.int64) * x_h
    x = rows_of(x_ptr, token, x_n, D, BLOCK_D)
    if GROUPED:
        group = tl.load(member_ptr + offset * (num_tokens - prefix) + token - prefix, mask=token >= prefix, other=-1)
        x -= rows_of(mean_ptr + offset * num_groups * D, group, D, D, BLOCK_D)
    tl.store(distance_ptr + offset * num_tokens + token, tl.sqrt(tl.sum(x * x, 1)), mask=token >= 0)


def pool_blocks(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """Arguments and result as in ``sparsifiner::pool_blocks``."""
    check_tokens(x, rows, columns, prefix)
    means = x.new_empty(*x.shape[:2], num_blocks(rows, columns, block_rows, block_columns), x.shape[3])
    describe_blocks(x, (rows, columns), (block_rows, block_columns), prefix, means=means)
    return means


def block_distances(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """Arguments and result as in ``sparsifiner::block_distances``."""
    check_tokens(x, rows, columns, prefix)
    distances = x.new_empty(x.shape[:3], dtype=torch.float32)
    describe_blocks(x, (rows, columns), (block_rows, block_columns), prefix, distances=distances)
    measure(x, None, None, distances, prefix, last=prefix)
    return distances


def group_patches(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as in ``sparsifiner::group_patches``."""
    check_tokens(x, rows, columns, prefix)
    grid, block = (rows, columns), (block_rows, block_columns)
    batch, heads, num_tokens, width = x.shape
    centres = x.new_empty((batch, heads, num_blocks(*grid, *block), width), dtype=torch.float32)
    member = x.new_empty((batch, heads, rows * columns), dtype=torch.int32)
    means = x.new_empty(centres.shape)
    distances = x.new_empty((batch, heads, num_tokens), dtype=torch.float32)
    x = readable(x)
    describe_blocks(x, grid, block, prefix, means=centres)
    for step in range(steps):
        launch(
            join_kernel, (centres.shape[:3].numel(),),
            x, centres, member, *x.stride()[:3], heads, *grid, prefix, EXACT=exact_products(x),
            **sizes(width, block, max(16, block[0] * block[1])), outputs=(member,),
        )  # fmt: skip
        last = step == steps - 1
        average(x, member, grid, block, prefix, empty=centres, means=means if last else None, exact=centres)
    measure(x, member, means, distances, prefix, last=num_tokens)
    return member, means, distances


def pool_groups(
    x: Tensor, member: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int
) -> Tensor:
    """Arguments and result as in ``sparsifiner::pool_groups``."""
    check_tokens(x, rows, columns, prefix)
    check_member(x, member, rows, columns)
    means = x.new_empty(*x.shape[:2], num_blocks(rows, columns, block_rows, block_columns), x.shape[3])
    average(readable(x), member.contiguous(), (rows, columns), (block_rows, block_columns), prefix, means=means)
    return means


def sizes(width: int, block: tuple[int, int], patches: int) -> dict[str, int]:
    """Sizes that kernels of ``patches`` at once are compiled for, and their warps: 32 numbers to a thread."""
    places, block_d = triton.next_power_of_2(patches), block_width(width)
    return {
        "D": width, "BLOCK_D": block_d, "ROWS": block[0], "COLUMNS": block[1], "PLACES": places,
        "num_warps": min(8, max(1, places * block_d // (1024 if block_d < 256 else 512))), "num_stages": 1,
    }  # fmt: skip


def describe_blocks(
    x: Tensor,
    grid: tuple[int, int],
    block: tuple[int, int],
    prefix: int,
    *,
    means: Tensor | None = None,
    distances: Tensor | None = None,
    spread: Tensor | None = None,
    weight: Tensor | None = None,
    highest: Tensor | None = None,
) -> None:
    """Write what is asked for of each block of patches of ``x`` ``[B, H, N, D]``.

    Args:
        x: tokens, prefix tokens first.
        grid: rows and columns of the patch grid.
        block: rows and columns of a block.
        prefix: number of prefix tokens.
        means: mean of each block ``[B, H, P, D]``.
        distances: of each patch from the mean of its block, float32 ``[B, H, N]``; prefix tokens' are left alone.
        spread: mean square of those distances per element, float32 ``[B, H, P]``.
        weight: a number of each patch ``[B, H, num_patches]``.
        highest: the highest of those of a block, but not below 0, float32 ``[B, H, P]``.
    """
    x = readable(x)
    given = (means, distances, spread, weight, highest)
    launch(
        block_kernel,
        (x.shape[0] * x.shape[1] * num_blocks(*grid, *block),),
        x, *(x if other is None else other for other in given), *x.stride()[:3], x.shape[1], *grid, prefix,
        MEANS=means is not None, DISTANCES=distances is not None, SPREAD=spread is not None,
        WEIGHTS=weight is not None, **sizes(x.shape[3], block, block[0] * block[1]),
        outputs=[out for out in (means, distances, spread, highest) if out is not None],
    )  # fmt: skip


def average(
    x: Tensor,
    member: Tensor,
    grid: tuple[int, int],
    block: tuple[int, int],
    prefix: int,
    *,
    empty: Tensor | None = None,
    means: Tensor | None = None,
    exact: Tensor | None = None,
) -> None:
    """Write the mean of each group, in the dtype of ``means`` and in float32 to ``exact``, both ``[B, H, P, D]``.

    Groups without patches get ``empty``, which may be ``exact``, or zeros.
    """
    outputs = [out for out in (means, exact) if out is not None]
    launch(
        mean_kernel,
        (outputs[0].shape[:3].numel(),),
        x, member, *(x if other is None else other for other in (empty, means, exact)), *x.stride()[:3], x.shape[1],
        *grid, prefix, KEEP=empty is not None, MEANS=means is not None, EXACT=exact is not None,
        **sizes(x.shape[3], block, 3 * block[0] * block[1]), outputs=outputs,
    )  # fmt: skip


def measure(
    x: Tensor, member: Tensor | None, means: Tensor | None, distances: Tensor, prefix: int, *, last: int
) -> None:
    """Write the distances of the tokens below ``last`` from the mean of their group, of prefix tokens from zero."""
    batch, heads, num_tokens, width = x.shape
    x, block_d = readable(x), block_width(width)
    block = max(1, 2048 // block_d)
    launch(
        distance_kernel,
        (batch * heads * -(-last // block),),
        x, x if member is None else member, x if means is None else means, distances, *x.stride()[:3],
        heads, num_tokens, 0 if means is None else means.shape[2], last, prefix,
        D=width, BLOCK_D=block_d, BLOCK_N=block, GROUPED=means is not None,
        num_warps=2, num_stages=1, outputs=(distances,),
    )  # fmt: skip
