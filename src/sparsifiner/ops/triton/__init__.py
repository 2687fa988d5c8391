"""The backend ``triton``: kernels for GPUs, in inference and training.

``TRITON_INTERPRET=1`` lets Triton interpret them on the CPU, for tests: slow, and only where the backend is asked for
by name. Triton itself is imported when a kernel runs.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..profile import find_profile
from ..registry import Kernel, register_backend

__all__ = ["why_missing", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 5)  # of Triton
WIDEST_HEAD = 256
MOST_POOLED_QUERIES = 128  # of a tile
LARGEST_TILE = 256  # queries that are grouped
LARGEST_BLOCK = 128  # patches

_MODULES = {
    "attend": "attend",
    "attend_backward": "attend_backward",
    "pool_blocks": "groups",
    "block_distances": "groups",
    "group_patches": "groups",
    "pool_groups": "groups",
    "count_unkept": "counts",
    "group_queries": "queries",
    "tile_keys": "score",
    "screened_keys": "score",
    "topk": "select",
}


def interpreted() -> bool:
    """Triton interprets kernels on the CPU in this process, because ``TRITON_INTERPRET`` asks for it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_missing() -> str | None:
    """Why there can be no Triton kernels in this installation, in words, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; PyTorch for GPUs brings it along, or `pip install triton`"
    version = str(import_module("triton").__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"it needs Triton {'.'.join(map(str, OLDEST))} or newer, not {version}"
    return None


# As torch.compiler.assume_constant_result does: a compiler that traces takes the answer as it is.
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(operation: str, *, needs_gradients: bool, **arguments: object) -> str | None:
    """Why the kernel of an operation cannot serve a call, in words, or None if it can."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    device = next(iter(tensors.values())).device if tensors else None
    reason = why_missing()
    if reason is None and device is not None and device.type == "cuda":
        reason = _why_not_device(device)
    return reason or _why_not_sizes(operation, tensors, arguments)


def _why_not_device(device: torch.device) -> str | None:
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, not {found[0]}.{found[1]}"
    return None


def _why_not_sizes(operation: str, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> str | None:
    x = next(iter(tensors.values()), None)
    if x is not None and x.is_floating_point() and x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {str(x.dtype).removeprefix('torch.')}"
    for name, x in tensors.items():
        if x.ndim == 4 and x.shape[2] * abs(x.stride(2)) >= 2**31:
            return f"an image and head of {name} spans more than 2^31 elements"
    x = next(iter(tensors.values()), None)
    if x is not None and operation not in ("topk", "count_unkept") and x.shape[-1] > WIDEST_HEAD:
        return f"it takes head widths up to {WIDEST_HEAD}, not {x.shape[-1]}"
    pooled, groups = tensors.get("pooled"), arguments.get("num_groups")
    groups = pooled.shape[3] if pooled is not None else groups
    if groups is not None and groups > MOST_POOLED_QUERIES:
        return f"it takes at most {MOST_POOLED_QUERIES} pooled queries per tile, not {groups}"
    tokens = tensors.get("tile_tokens")
    if operation == "group_queries" and tokens is not None and tokens.shape[1] > LARGEST_TILE:
        return f"it groups at most {LARGEST_TILE} queries of a tile, not {tokens.shape[1]}"
    rows, columns = arguments.get("block_rows"), arguments.get("block_columns")
    if rows is not None and columns is not None and rows * columns > LARGEST_BLOCK and operation != "count_unkept":
        return f"it takes blocks of at most {LARGEST_BLOCK} patches, not {rows} x {columns}"
    return None


def why_not_automatic(device: torch.device) -> str | None:
    """Why ``auto`` does not take these kernels on a device: until they have run on it, nobody knows what they take."""
    if device.type == "cuda" and any(find_profile("cuda", device.index, dtype) for dtype in DTYPES):
        return None
    return "it has not been measured on this device; `sparsifiner benchmark --save-profile` does"


def _kernel(operation: str) -> Kernel:
    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{_MODULES[operation]}"), operation)(*arguments)

    return run


register_backend(
    "triton",
    device_type=("cuda", "cpu") if interpreted() else "cuda",
    kernels={operation: _kernel(operation) for operation in _MODULES},
    why_not=why_not,
    automatic=why_not_automatic,
)
