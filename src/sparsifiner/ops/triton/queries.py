"""A few representative queries of each tile in Triton: Lloyd's algorithm within the registers of one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import block_width, exact_products, launch, products, readable


@triton.jit
def group_means(assigned, q, previous, EXACT: tl.constexpr):
    """Means ``[G, D]`` of the queries assigned to each group, zeros and ones ``[S, G]``; an empty one keeps its own."""
    counts = tl.sum(assigned, 0)
    sums = tl.dot(tl.trans(assigned.to(q.dtype)), q, input_precision=EXACT)
    return tl.where((counts > 0)[:, None], sums / tl.maximum(counts, 1.0)[:, None], previous)


@triton.jit
def group_queries_kernel(
    q_ptr, tile_tokens_ptr, group_of_ptr, out_ptr, q_b, q_h, q_n, num_heads, num_tiles, num_groups, steps,
    TILE: tl.constexpr, PLACES: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The groups of one tile of one head."""
    pair, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    place, width, group = tl.arange(0, PLACES), tl.arange(0, BLOCK_D), tl.arange(0, GROUPS)
    listed = place < TILE
    token = tl.load(tile_tokens_ptr + tile * TILE + place, mask=listed, other=-1)
    token = tl.where(token >= 0, token, tl.load(tile_tokens_ptr + tile * TILE))
    q_ptr += (pair // num_heads).to(tl.int64) * q_b + (pair % num_heads).to(tl.int64) * q_h
    q = tl.load(q_ptr + token[:, None] * q_n + width[None, :], mask=listed[:, None] & (width < D)[None, :], other=0.0)
    start = tl.load(group_of_ptr + place, mask=listed, other=-1)
    assigned = (start[:, None] == group[None, :]).to(tl.float32)
    centres = group_means(assigned, q, tl.zeros([GROUPS, BLOCK_D], tl.float32), EXACT)
    for _ in range(steps):
        # The nearest centre: |q - c|^2 without the part that is the same for all centres.
        nearness = products(q, centres, EXACT)
        nearness -= tl.sum(centres * centres, 1)[None, :] / 2
        nearest = tl.argmax(tl.where((group < num_groups)[None, :], nearness, float("-inf")), 1)
        assigned = ((nearest[:, None] == group[None, :]) & listed[:, None]).to(tl.float32)
        centres = group_means(assigned, q, centres, EXACT)
    out_row = (pair.to(tl.int64) * num_tiles + tile) * num_groups + group
    tl.store(
        out_ptr + out_row[:, None] * D + width[None, :], centres.to(out_ptr.dtype.element_ty),
        mask=(group < num_groups)[:, None] & (width < D)[None, :],
    )  # fmt: skip


def group_queries(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    """Arguments and result as in ``sparsifiner::group_queries``."""
    batch, heads, _, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    out = q.new_empty(batch, heads, num_tiles, num_groups, width)
    places, block_d = max(16, triton.next_power_of_2(tile_size)), block_width(width)
    q = readable(q)
    launch(
        group_queries_kernel,
        (batch * heads * num_tiles,),
        q, tile_tokens.contiguous(), group_of.contiguous(), out, *q.stride()[:3], heads, num_tiles, num_groups,
        0 if num_groups == tile_size else steps,
        TILE=tile_size, PLACES=places, GROUPS=max(16, triton.next_power_of_2(num_groups)), D=width, BLOCK_D=block_d,
        EXACT=exact_products(q),
        num_warps=min(8, max(1, places * block_d // 1024)), num_stages=1,
        outputs=(out,),
    )  # fmt: skip
    return out
