"""The backend ``native``: kernels in C++ (``csrc/``) for CPU inference in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import register_backend
from . import binding, kernels
from .binding import force_level, level, levels, missing_levels, precisions, why_missing

__all__ = ["binding", "force_level", "level", "levels", "missing_levels", "precisions", "why_missing", "why_not"]

DTYPES = (torch.float32, torch.bfloat16)
MOST_POOLED_QUERIES = 256  # of a tile
_KEYS = ("tile_keys", "budget_keys", "screened_keys")


def why_not(operation: str, *, needs_gradients: bool, **arguments: Any) -> str | None:
    """Why the kernel of an operation cannot serve a call, in words, or None if it can."""
    reason = why_missing()
    if reason is not None:
        return reason
    x = next(iter(arguments.values()), None)  # a tensor in every operation
    if operation != "count_unkept" and isinstance(x, Tensor):
        if x.dtype not in DTYPES:
            return f"it computes in float32 and bfloat16, not in {str(x.dtype).removeprefix('torch.')}"
        width = x.shape[-1]
        if operation == "pool_blocks":
            if width > 128:
                return f"it takes head widths up to 128, not {width}"
        elif operation != "topk" and (width % 16 or not 16 <= width <= 128):
            return f"it takes head widths that are multiples of 16 from 16 to 128, not {width}"
        groups = x.shape[3] if operation in _KEYS else arguments.get("num_groups", 0)
        if groups > MOST_POOLED_QUERIES:
            return f"it takes at most {MOST_POOLED_QUERIES} pooled queries per tile, not {groups}"
    if arguments.get("attn_bias") is not None:
        return "it takes no attn_bias"
    if needs_gradients:
        return "it has no backward pass and gradients are needed; call it under torch.no_grad() or inference_mode()"
    return None


register_backend(
    "native",
    device_type="cpu",
    kernels={
        "attend": kernels.attend,
        "pool_blocks": kernels.pool_blocks,
        "block_distances": kernels.block_distances,
        "group_patches": kernels.group_patches,
        "pool_groups": kernels.pool_groups,
        "count_unkept": kernels.count_unkept,
        "group_queries": kernels.group_queries,
        "tile_keys": kernels.tile_keys,
        "budget_keys": kernels.budget_keys,
        "screened_keys": kernels.screened_keys,
        "topk": kernels.topk,
    },
    why_not=why_not,
    automatic=True,
)
