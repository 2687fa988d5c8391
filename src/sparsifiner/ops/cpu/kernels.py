"""The compiled kernels as functions of the operations' arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import SparsifinerError
from .._common import check_tokens
from .._common import num_blocks as blocks_in
from ..attend import empty_output
from ..budget_keys import BUDGET_KEYS, check_budget
from ..pool_groups import check_member
from ..screened_keys import SCREENED_KEYS
from ..tile_keys import TILE_KEYS
from .binding import address, call, is_not_a_number, plain, readable_rows, rows


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
    attn_bias: None,
    num_prefix_tokens: int,
    scale: float,
    precision: str,
) -> Tensor:
    """``sparsifiner::attend``, straight from the packed projection."""
    batch, heads, num_tokens, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    num_pooled = 0 if tail_k is None else tail_k.shape[2]
    out = empty_output(q)
    q, k, v = readable_rows(q), readable_rows(k), readable_rows(v)
    if tail_k is not None and tail_v is not None:
        tail_k, tail_v = readable_rows(tail_k), readable_rows(tail_v)
    tile_tokens, indices = tile_tokens.contiguous(), indices.contiguous()
    bias, tail_bias = plain(bias, torch.float32), plain(tail_bias, torch.float32)
    call(
        "attend",
        (batch, heads, num_tokens, width, num_tiles, tile_size, indices.shape[3], num_pooled, num_prefix_tokens),
        q.dtype == torch.bfloat16,
        scale,
        rows(q),
        rows(k),
        rows(v),
        address(tile_tokens),
        address(indices),
        address(bias),
        rows(tail_k),
        rows(tail_v),
        address(tail_bias),
        address(out),
        precision=precision,
    )
    return out


def pool_blocks(x: Tensor, height: int, breadth: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """``sparsifiner::pool_blocks``."""
    batch, heads, _, width = x.shape
    check_tokens(x, height, breadth, prefix)
    out = x.new_empty(batch, heads, blocks_in(height, breadth, block_rows, block_columns), width)
    x = x if x.stride(3) == 1 else x.contiguous()
    grid = (prefix, height, breadth, block_rows, block_columns)
    call("pool_blocks", rows(x), x.dtype == torch.bfloat16, batch, heads, width, grid, address(out))
    return out


def block_distances(x: Tensor, height: int, breadth: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """``sparsifiner::block_distances``."""
    batch, heads, num_tokens, width = x.shape
    check_tokens(x, height, breadth, prefix)
    out = x.new_empty((batch, heads, num_tokens), dtype=torch.float32)
    x = readable_rows(x)
    grid = (prefix, height, breadth, block_rows, block_columns)
    call("block_distances", rows(x), x.dtype == torch.bfloat16, batch, heads, width, grid, address(out))
    return out


def group_patches(
    x: Tensor, height: int, breadth: int, block_rows: int, block_columns: int, prefix: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``sparsifiner::group_patches``."""
    batch, heads, num_tokens, width = x.shape
    check_tokens(x, height, breadth, prefix)
    member = x.new_empty((batch, heads, height * breadth), dtype=torch.int32)
    means = x.new_empty((batch, heads, blocks_in(height, breadth, block_rows, block_columns), width))
    distances = x.new_empty((batch, heads, num_tokens), dtype=torch.float32)
    x = readable_rows(x)
    call(
        "group_patches",
        (batch, heads, width, steps),
        x.dtype == torch.bfloat16,
        rows(x),
        (prefix, height, breadth, block_rows, block_columns),
        address(member),
        address(means),
        address(distances),
    )
    return member, means, distances


def pool_groups(
    x: Tensor, member: Tensor, height: int, breadth: int, block_rows: int, block_columns: int, prefix: int
) -> Tensor:
    """``sparsifiner::pool_groups``."""
    batch, heads, _, width = x.shape
    check_tokens(x, height, breadth, prefix)
    check_member(x, member, height, breadth)
    means = x.new_empty((batch, heads, blocks_in(height, breadth, block_rows, block_columns), width))
    x, member = readable_rows(x), member.contiguous()
    grid = (prefix, height, breadth, block_rows, block_columns)
    call("pool_groups", rows(x), x.dtype == torch.bfloat16, batch, heads, width, grid, address(member), address(means))
    return means


def count_unkept(
    indices: Tensor,
    bias: Tensor | None,
    member: Tensor | None,
    height: int,
    breadth: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
) -> Tensor:
    """``sparsifiner::count_unkept``."""
    if member is not None and member.shape != (*indices.shape[:2], height * breadth):
        raise SparsifinerError(f"member must have shape [B, H, {height * breadth}], got {list(member.shape)}")
    blocks = blocks_in(height, breadth, block_rows, block_columns)
    out = indices.new_empty((*indices.shape[:3], blocks), dtype=torch.float32)
    indices, bias, member = indices.contiguous(), plain(bias, torch.float32), plain(member, torch.int32)
    kept = indices.shape[-1]
    call(
        "log_counts",
        address(indices),
        address(bias),
        indices.numel() // max(1, kept),
        kept,
        (prefix, height, breadth, block_rows, block_columns),
        address(member),
        max(1, indices.shape[2]),
        address(out),
    )
    return out


def group_queries(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    """``sparsifiner::group_queries``."""
    batch, heads, num_tokens, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    out = q.new_empty(batch, heads, num_tiles, num_groups, width)
    q, tile_tokens, group_of = readable_rows(q), tile_tokens.contiguous(), group_of.contiguous()
    call(
        "group_queries",
        (batch, heads, num_tokens, width, num_tiles, tile_size, num_groups, steps),
        q.dtype == torch.bfloat16,
        rows(q),
        address(tile_tokens),
        address(group_of),
        address(out),
    )
    return out


def topk(scores: Tensor, count: int) -> Tensor:
    """``sparsifiner::topk``; ties go to the lowest number."""
    columns = scores.shape[-1]
    flat = scores.contiguous().view(-1, columns) if columns else scores.reshape(0, 0)
    out = scores.new_empty((*scores.shape[:-1], count), dtype=torch.int32)
    shape = (flat.shape[0], columns, columns, count)
    try:
        call("topk", address(flat), scores.dtype == torch.bfloat16, *shape, address(out), count, 0)
    except ValueError as error:
        if not is_not_a_number(error):
            raise
        return topk(torch.where(scores.isnan(), float("inf"), scores), count)
    return out


def tile_keys(
    pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, scale: float, sum_probabilities: bool
) -> Tensor:
    """``sparsifiner::tile_keys``."""

    def run(pooled: Tensor, k: Tensor, weight: Tensor | None) -> Tensor:
        return _choose_keys("tile_keys", pooled, k, weight, first, count, scale, sum_probabilities)

    def reference(pooled: Tensor, k: Tensor, weight: Tensor | None) -> Tensor:
        return TILE_KEYS.reference(pooled, k, weight, first, count, scale, sum_probabilities)

    return _image_by_image_on_nan(run, reference, pooled, k, weight)


def screened_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    height: int,
    breadth: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
    num_blocks: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
) -> Tensor:
    """``sparsifiner::screened_keys``."""
    grid = (prefix, height, breadth, block_rows, block_columns)

    def run(pooled: Tensor, k: Tensor, weight: Tensor | None) -> Tensor:
        return _choose_keys(
            "screened_keys", pooled, k, weight, prefix, count, scale, sum_probabilities, grid, num_blocks
        )

    def reference(pooled: Tensor, k: Tensor, weight: Tensor | None) -> Tensor:
        numbers = (height, breadth, block_rows, block_columns, prefix, num_blocks, count, scale, sum_probabilities)
        return SCREENED_KEYS.reference(pooled, k, weight, *numbers)

    return _image_by_image_on_nan(run, reference, pooled, k, weight)


def budget_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    most: int,
    least: int,
    total: int,
    scale: float,
    sum_probabilities: bool,
) -> tuple[Tensor, Tensor]:
    """``sparsifiner::budget_keys``."""
    check_budget(pooled.shape[1] * pooled.shape[2], most, least, total)

    def run(pooled: Tensor, k: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = pooled.new_empty((*pooled.shape[:3], first + most), dtype=torch.float32)
        budget = (least, total, address(bias))
        return _choose_keys("budget_keys", pooled, k, weight, first, most, scale, sum_probabilities, *budget), bias

    def reference(pooled: Tensor, k: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return BUDGET_KEYS.reference(pooled, k, weight, first, most, least, total, scale, sum_probabilities)

    return _image_by_image_on_nan(run, reference, pooled, k, weight)


def _image_by_image_on_nan(
    run: Callable[..., Any], reference: Callable[..., Any], pooled: Tensor, k: Tensor, weight: Tensor | None
) -> Any:
    # The kernels refuse a whole batch for one NaN. Images without any must get what they get alone.
    try:
        return run(pooled, k, weight)
    except ValueError as error:
        if not is_not_a_number(error):
            raise
    if len(k) == 1:
        return reference(pooled, k, weight)
    images = ((pooled[i : i + 1], k[i : i + 1], None if weight is None else weight[i : i + 1]) for i in range(len(k)))
    found = [_image_by_image_on_nan(run, reference, *image) for image in images]
    return torch.cat(found) if isinstance(found[0], Tensor) else tuple(map(torch.cat, zip(*found, strict=True)))


def _choose_keys(
    function: str,
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
    *blocks: Any,
) -> Tensor:
    # ``blocks`` is what the compiled function takes besides what both of them do.
    out = pooled.new_empty((*pooled.shape[:3], first + count), dtype=torch.int32)
    queries, k = readable_rows(pooled.flatten(2, 3)), readable_rows(k)
    # Scores are compared as logarithms; a weight of zero becomes the smallest one there is.
    log2_weight = None if weight is None else weight.float().log2().clamp(min=-126.0).contiguous()
    call(
        function,
        (*k.shape, *pooled.shape[2:4], first, count),
        k.dtype == torch.bfloat16,
        scale,
        sum_probabilities,
        rows(queries),
        rows(k),
        address(log2_weight),
        *blocks,
        address(out),
    )
    return out
