"""FLOP formulas of ``scaled_dot_product_attention`` on a CPU, which PyTorch itself counts as nothing.

Two FLOPs per multiply-add, as everywhere in ``torch.utils.flop_counter``. The library's own operations bring theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

_Shape = torch.Size


def cpu_flash_attention_flops(q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    """Products of every query with every key, and of every weight with its value."""
    batch, heads, num_queries, width = q
    return 2 * batch * heads * num_queries * k[2] * (width + v[3])


def cpu_flash_attention_backward_flops(grad: _Shape, q: _Shape, k: _Shape, v: _Shape, *args: Any, **kwargs: Any) -> int:
    """Five products, as in PyTorch's own formula for the GPU kernels."""
    return cpu_flash_attention_flops(q, k, v) * 5 // 2


def register() -> None:
    """Enter the formulas where PyTorch has none yet. Safe to call again."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_flash_attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_flash_attention_backward_flops,
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


register()
