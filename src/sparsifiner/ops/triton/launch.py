"""Launches of Triton kernels: settings by architecture, tensors as kernels take them, and the interpreter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TABLE = Path(__file__).with_name("launch.json")


@dataclass(frozen=True)
class Settings:
    """Sizes of a kernel's blocks and of its programs.

    Args:
        block_m: rows (queries) of a block.
        block_n: columns (keys) of a block.
        num_warps: warps of a program.
        num_stages: blocks in flight. From 3 on Triton pipelines loads behind an index; with 2 it silently does not.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU (``TRITON_INTERPRET=1``), which is slow and needs no GPU."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """The column of the table of settings that serves ``device``: ``sm_80``, ``sm_90``, ``sm_100`` or ``gfx942``.

    Consumer cards (8.6, 8.9, 12.0) have the shared memory and the products of ``sm_80``.
    """
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, list[dict[str, int]]]]:
    """Settings by kernel and architecture, rows of rising sizes."""
    return json.loads(TABLE.read_text())


def choose(kernel: str, x: Tensor, rows: int) -> Settings:
    """Settings of ``kernel`` for tensors like ``x`` ``[..., D]`` and ``rows`` queries at once.

    The table's first row counts whose ``rows``, ``head_dim`` and ``bytes`` are at least what is asked for; the last
    one has no upper bound of rows: more of them take several programs.
    """
    return choose_for(kernel, architecture(x.device), x.shape[-1], x.element_size(), rows)


def choose_for(kernel: str, arch: str, head_dim: int, element_size: int, rows: int) -> Settings:
    """:func:`choose` for an architecture by name."""
    found = [row for row in table()[kernel][arch] if row["head_dim"] >= head_dim and row["bytes"] >= element_size]
    row = next((row for row in found if row["block_m"] >= rows), found[-1])
    return Settings(row["block_m"], row["block_n"], row["num_warps"], row["num_stages"])


def precision_of(x: Tensor) -> str:
    """How products of float32 are taken: as ``torch.set_float32_matmul_precision`` says."""
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return exact_products(x)
    return "ieee" if x.device.type != "cuda" or torch.version.hip is not None else "tf32"


def exact_products(x: Tensor) -> str:
    """Products as exact as float32: by three of TensorFloat-32 on NVIDIA GPUs, as PyTorch's own attention does."""
    return "ieee" if x.device.type != "cuda" or torch.version.hip is not None else "tf32x3"


@triton.jit
def products(x, centres, EXACT: tl.constexpr):
    """Products ``[M, N]`` of rows ``[M, D]`` and float32 centres ``[N, D]``, in float32.

    For rows of 16 bits a centre is the sum of two numbers of 16 bits: tensor cores take those as they are, where
    float32 would need twice the shared memory and three times the registers.
    """
    high = centres.to(x.dtype)
    found = tl.dot(x, tl.trans(high), input_precision=EXACT)
    if x.dtype != tl.float32:
        found += tl.dot(x, tl.trans((centres - high.to(tl.float32)).to(x.dtype)))
    return found


def block_width(width: int) -> int:
    """Columns of a block that holds rows of ``width`` elements: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(width))


def readable(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_strides(*tensors: Tensor | None) -> list[int]:
    """Strides in elements of batch, head and row of each ``[B, H, N, D]``; zeros for None."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def launch(kernel: Any, grid: Sequence[int], *args: Any, outputs: Sequence[Tensor], **options: Any) -> None:
    """Run ``kernel`` on the device of ``outputs``, some of ``args`` that it writes.

    The interpreter does not know bfloat16: there such tensors are widened to float32, and the outputs rounded.
    """
    if not all(grid):
        return
    if not interpreting():
        start(kernel, tuple(grid), outputs[0].device, args, options)
        return
    wide = [widened(x) if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args]
    kernel[tuple(grid)](*wide, **options)
    for narrow, result in zip(args, wide, strict=True):
        if result is not narrow and any(narrow is out for out in outputs):
            narrow.copy_(result)


def start(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: Sequence[Any], options: dict[str, Any]
) -> None:
    """Run ``kernel`` on a GPU."""
    with torch.cuda.device(device):
        # Fusion is said explicitly, as its default differs between versions of Triton.
        kernel[grid](*args, **{"enable_fp_fusion": True, **options})


def widened(x: Tensor) -> Tensor:
    """A float32 copy of ``x`` with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.float32, device=x.device).copy_(x)
