"""The backend ``native``: kernels in C++ (``csrc/``) for CPU inference in float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register_backend
from . import binding, kernels
from .binding import force_level, level, levels, missing_levels, why_missing

__all__ = ["binding", "force_level", "level", "levels", "missing_levels", "why_missing", "why_not"]

DTYPES = (torch.float32, torch.bfloat16)
MOST_POOLED_QUERIES = 256  # of a tile


def why_not(operation: str, *, needs_gradients: bool, **arguments: object) -> str | None:
    """Why the kernel of an operation cannot serve a call, in words, or None if it can."""
    reason = why_missing()
    if reason is not None:
        return reason
    if operation == "count_unkept":
        return None
    x = next((x for x in arguments.values() if isinstance(x, Tensor)), None)
    if x is not None:
        if x.dtype not in DTYPES:
            return f"it computes in float32 and bfloat16, not in {str(x.dtype).removeprefix('torch.')}"
        if operation == "pool_blocks":
            if x.shape[-1] > 128:
                return f"it takes head widths up to 128, not {x.shape[-1]}"
        elif operation != "topk" and (x.shape[-1] % 16 or not 16 <= x.shape[-1] <= 128):
            return f"it takes head widths that are multiples of 16 from 16 to 128, not {x.shape[-1]}"
    groups = arguments.get("num_groups")
    if operation == "tile_keys" or operation == "screened_keys":
        groups = x.shape[3] if x is not None and x.ndim == 5 else None
    if isinstance(groups, int) and groups > MOST_POOLED_QUERIES:
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
        "screened_keys": kernels.screened_keys,
        "topk": kernels.topk,
    },
    why_not=why_not,
    automatic=True,
)
