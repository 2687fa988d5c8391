"""FLOP formulas that ``torch.utils.flop_counter.FlopCounterMode`` needs to see this library's operators.

Two FLOPs per multiply-add, as everywhere in that module. They count what attention asks for: every query row
times every key listed for it (padding included, a border tile's empty places not). Additions, softmax and
selection count nothing, as in the formulas PyTorch ships.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import gather as _gather  # noqa: F401
from . import native as _native  # noqa: F401
from . import selection as _selection  # noqa: F401  (operators must exist before they get a formula)

_Shape = torch.Size


def attention_pairs(num_tokens: int, num_prefix_tokens: int, num_keys: int, num_pooled: int) -> int:
    """Query-key pairs of one head of one image: dense prefix rows, ``num_keys + num_pooled`` for each patch row."""
    return num_prefix_tokens * num_tokens + (num_tokens - num_prefix_tokens) * (num_keys + num_pooled)


def gather_attention_flops(
    q: _Shape,
    k: _Shape,
    v: _Shape,
    tile_tokens: _Shape,
    indices: _Shape,
    bias: _Shape | None,
    tail_k: _Shape | None,
    tail_v: _Shape | None,
    tail_bias: _Shape | None,
    attn_bias: _Shape | None,
    num_prefix_tokens: int,
    scale: float,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of ``sparsifiner::gather_attention`` from the shapes of its arguments."""
    batch, heads, num_tokens, width = q
    num_pooled = 0 if tail_k is None else tail_k[2]
    pairs = attention_pairs(num_tokens, num_prefix_tokens, indices[3], num_pooled)
    return 2 * 2 * batch * heads * width * pairs


def native_attention_flops(*shapes: Any, **kwargs: Any) -> int:
    """FLOPs of ``sparsifiner::native_attention``, which takes no ``attn_bias``."""
    return gather_attention_flops(*shapes[:9], None, *shapes[9:], **kwargs)


def native_group_queries_flops(
    q: _Shape, tile_tokens: _Shape, group_of: _Shape, num_groups: int, steps: int, *args: Any, **kwargs: Any
) -> int:
    """FLOPs of ``sparsifiner::native_group_queries``: a mean, then distances and a mean per step."""
    batch, heads, _, width = q
    num_tiles, tile_size = tile_tokens
    return 2 * batch * heads * num_tiles * tile_size * width * (steps * (num_groups + 1) + 1)


def native_tile_keys_flops(
    pooled: _Shape, k: _Shape, weight: _Shape | None, first: int, *args: Any, **kwargs: Any
) -> int:
    """FLOPs of ``sparsifiner::native_tile_keys``: every pooled query times every candidate key."""
    return 2 * pooled.numel() * (k[2] - first)


def native_screened_keys_flops(
    pooled: _Shape,
    k: _Shape,
    weight: _Shape | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
    num_blocks: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of ``sparsifiner::native_screened_keys``: pooled queries times all means and some blocks' keys."""
    all_blocks = -(-rows // block_rows) * -(-columns // block_columns)
    return 2 * pooled.numel() * (all_blocks + block_rows * block_columns * num_blocks)


def gather_attention_backward_flops(grad: _Shape, *shapes: Any, **kwargs: Any) -> int:
    """FLOPs of the backward pass: five products of the forward's size (the weights are computed again)."""
    return gather_attention_flops(*shapes, **kwargs) * 5 // 2


def cpu_flash_attention_flops(q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    """FLOPs of ``scaled_dot_product_attention`` on a CPU, which PyTorch itself counts as nothing."""
    batch, heads, num_queries, width = q
    return 2 * batch * heads * num_queries * k[2] * (width + v[3])


def cpu_flash_attention_backward_flops(grad: _Shape, q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    """FLOPs of its backward pass, five products as in PyTorch's own formula for the GPU kernels."""
    return cpu_flash_attention_flops(q, k, v) * 5 // 2


def register() -> None:
    """Enter the formulas where PyTorch has none yet. Safe to call again."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.sparsifiner.gather_attention: gather_attention_flops,
        torch.ops.sparsifiner.gather_attention_backward: gather_attention_backward_flops,
        torch.ops.sparsifiner.native_attention: native_attention_flops,
        torch.ops.sparsifiner.native_group_queries: native_group_queries_flops,
        torch.ops.sparsifiner.native_tile_keys: native_tile_keys_flops,
        torch.ops.sparsifiner.native_screened_keys: native_screened_keys_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_flash_attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_flash_attention_backward_flops,
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


register()
