"""The choice of the best-scoring keys: exact top-k, in C++ where that can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu


def top_keys(scores: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` best candidates of every row, int32 ``[..., count]``. No gradient flows.

    In C++ they come in rising order, ties go to the lowest number and NaN is refused; ``torch.topk``, which
    serves elsewhere, promises none of that.

    Args:
        scores: ``[..., candidates]``.
        count: keys to keep, at most ``candidates``.
    """
    if cpu.why_not(scores) is None:
        return native_topk(scores.detach(), count)
    return scores.topk(count, dim=-1, sorted=False).indices.to(torch.int32)


@torch.library.custom_op("sparsifiner::native_topk", mutates_args=(), device_types="cpu")
def native_topk(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of each row of ``[..., C]``, int32 ``[..., count]``, rising; ties: lowest."""
    columns = scores.shape[-1]
    flat = scores.contiguous().view(-1, columns) if columns else scores.reshape(0, 0)
    out = scores.new_empty((*scores.shape[:-1], count), dtype=torch.int32)
    cpu._native.topk(
        flat.data_ptr(),
        scores.dtype == torch.bfloat16,
        flat.shape[0],
        columns,
        columns,
        count,
        out.data_ptr(),
        count,
        0,
        torch.get_num_threads(),
    )
    return out


@native_topk.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int32)


def why_not_tile_keys(q: Tensor, group_count: int) -> str | None:
    """Why :func:`native_tile_keys` cannot serve, in words, or None if it can."""
    if group_count > 256:
        return f"it takes at most 256 pooled queries per tile, not {group_count}"
    return cpu.why_not(q) or cpu.why_not_width(q.shape[-1])


@torch.library.custom_op("sparsifiner::native_group_queries", mutates_args=(), device_types="cpu")
def native_group_queries(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    """Means of groups of like queries, ``[B, H, T, G, D]``.

    Args:
        q: queries ``[B, H, N, D]``.
        tile_tokens: tokens of each tile, int32 ``[T, S]``; -1 where it sticks out, its first token counts again.
        group_of: group in which each query of a tile starts, int32 ``[S]``.
        num_groups: number of groups, ``G``.
        steps: how often queries are regrouped around the means (Lloyd's algorithm).
    """
    batch, heads, num_tokens, width = q.shape
    num_tiles, tile_size = tile_tokens.shape
    out = _empty_groups(q, tile_tokens, num_groups)
    q, tile_tokens, group_of = cpu.readable_rows(q), tile_tokens.contiguous(), group_of.contiguous()
    cpu._native.group_queries(
        (batch, heads, num_tokens, width, num_tiles, tile_size, num_groups, steps),
        q.dtype == torch.bfloat16,
        cpu.rows(q),
        tile_tokens.data_ptr(),
        group_of.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@native_group_queries.register_fake
def _(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    return _empty_groups(q, tile_tokens, num_groups)


def _empty_groups(q: Tensor, tile_tokens: Tensor, num_groups: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], tile_tokens.shape[0], num_groups, q.shape[3])


@torch.library.custom_op("sparsifiner::native_tile_keys", mutates_args=(), device_types="cpu")
def native_tile_keys(
    pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, scale: float, sum_probabilities: bool
) -> Tensor:
    """Score, merge and select in one pass, without ever holding all scores.

    Some CPU levels round queries and keys for the scores, so keys whose scores are equal to within that rounding may
    be taken for each other there: ``avx512bf16`` to integers of -127 to 127 times a factor of the row, ``amx`` to
    bfloat16. Attention over the selected keys has the precision asked for.

    Args:
        pooled: pooled queries of each tile ``[B, H, T, G, D]``.
        k: keys ``[B, H, N, D]``; the candidates are those from ``first``.
        weight: factor on each candidate's probabilities, not negative, ``[B, H, N - first]``, or None.
        first: number of leading tokens that every tile keeps.
        count: candidates to select per tile.
        scale: factor on the logits.
        sum_probabilities: merge the pooled queries' probabilities by sum instead of max.

    Returns:
        Token numbers, int32 ``[B, H, T, first + count]``, rising.
    """
    return _choose_keys(cpu._native.tile_keys, pooled, k, weight, first, count, scale, sum_probabilities)


@native_tile_keys.register_fake
def _(
    pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, scale: float, sum_probabilities: bool
) -> Tensor:
    return _empty_keys(pooled, first, count)


@torch.library.custom_op("sparsifiner::native_screened_keys", mutates_args=(), device_types="cpu")
def native_screened_keys(
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
    """What :func:`native_tile_keys` does, among the keys of each tile's best blocks only.

    Probabilities are those among these keys. How blocks are scored: see ``predictors/screening.py``.

    Args:
        pooled: pooled queries of each tile ``[B, H, T, G, D]``.
        k: keys ``[B, H, prefix + rows * columns, D]``, prefix tokens first; every tile keeps those.
        weight: factor on each patch's probabilities, not negative, ``[B, H, rows * columns]``, or None.
        rows, columns: the patch grid.
        block_rows, block_columns: patches of a block; 4 in all.
        prefix: number of prefix tokens.
        num_blocks: blocks of each tile whose keys are scored one by one.
        count: patches to select per tile, at most as many as any such blocks hold.
        scale: factor on the logits.
        sum_probabilities: merge the pooled queries' probabilities by sum instead of max.

    Returns:
        Token numbers, int32 ``[B, H, T, prefix + count]``, rising.
    """
    choose, grid = cpu._native.screened_keys, (prefix, rows, columns, block_rows, block_columns)
    return _choose_keys(choose, pooled, k, weight, prefix, count, scale, sum_probabilities, grid, num_blocks)


@native_screened_keys.register_fake
def _(
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
    return _empty_keys(pooled, prefix, count)


def _choose_keys(
    choose: Callable[..., None],
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
    *blocks: Any,
) -> Tensor:
    # ``choose`` is a function of the compiled module; ``blocks`` is what it takes besides what all of them do.
    out = _empty_keys(pooled, first, count)
    queries, k = cpu.readable_rows(pooled.flatten(2, 3)), cpu.readable_rows(k)
    # Scores are compared as logarithms; a weight of zero becomes the smallest one there is.
    log2_weight = None if weight is None else weight.float().log2().clamp(min=-126.0).contiguous()
    choose(
        (*k.shape, *pooled.shape[2:4], first, count),
        k.dtype == torch.bfloat16,
        scale,
        sum_probabilities,
        cpu.rows(queries),
        cpu.rows(k),
        cpu.address(log2_weight),
        *blocks,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _empty_keys(pooled: Tensor, first: int, count: int) -> Tensor:
    return pooled.new_empty((*pooled.shape[:3], first + count), dtype=torch.int32)
