"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU and no driver is needed.

    python benchmarks/triton_resources.py benchmarks/results/triton-resources.json
    python benchmarks/triton_resources.py --quick          # fewer kernels; prints what is wrong with them

Fails where a kernel spills registers, needs more shared memory than its GPUs have, or does not copy the keys and values
it gathers asynchronously, 16 bytes at a time (``cp.async`` in PTX).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsifiner._utils.files import write_atomically
from sparsifiner.geometry.tiling import Tiling
from sparsifiner.ops.triton import attend, attend_backward, counts, groups, launch, queries, score, select

# Architecture: its compiler's target; capability; registers, shared bytes and threads of a multiprocessor; most shared
# bytes of a program. sm_80 serves 8.6 and 8.9, too, whose programs have 99 KiB.
TARGETS: dict[str, tuple[GPUTarget, tuple[int, int], int, int, int, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), (8, 0), 65536, 164 * 1024, 2048, 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), (9, 0), 65536, 228 * 1024, 2048, 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), (10, 0), 65536, 228 * 1024, 2048, 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), (9, 4), 4 * 512 * 64, 64 * 1024, 2048, 64 * 1024),
}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int16: "i16",
         torch.int8: "i8"}  # fmt: skip
Row = dict[str, Any]


def source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """``kernel`` as it would be compiled for these arguments, whose addresses are multiples of 16 bytes."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(place,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(compiled: Any, arch: str) -> Row:
    """What one program of a compiled kernel needs, and how many fit a multiprocessor."""
    target, _, registers, shared, threads, _ = TARGETS[arch]
    warps = compiled.metadata.num_warps
    found: Row = {"num_warps": warps, "shared_bytes": compiled.metadata.shared}
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.check_output(command, text=True)
        found["registers"], found["spilled_bytes"] = (
            int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
            for name in ("REG", "STACK")
        )
        ptx = compiled.asm["ptx"]
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], (\w+)", ptx)
        found["copies_of_16_bytes"] = sum(int(size, 0) == 16 for size in copies)
        found["products"] = sorted(set(re.findall(r"(wgmma|mma\.sync|tcgen05\.mma)", ptx)))
        used = math.ceil(found["registers"] / 8) * 8
    else:
        asm = compiled.asm["amdgcn"]
        vector, accumulator, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", asm)[1])  # type: ignore[index]
            for name in ("vgpr_count", "agpr_count", "vgpr_spill_count")
        )
        found["registers"], found["spilled_bytes"] = vector, 4 * spills
        found["products"] = sorted(set(re.findall(r"(v_mfma_f32)", asm)))
        used = math.ceil(max(1, vector + accumulator) / 8) * 8
    per_program = warps * target.warp_size
    reserved = 1024 if target.backend == "cuda" else 0  # of each program, by the driver
    found["programs_at_once"] = min(
        registers // (used * per_program), threads // per_program, shared // max(1, found["shared_bytes"] + reserved)
    )
    return found


@contextmanager
def compiling(arch: str, rows: list[Row], case: Row, only: str | None = None) -> Iterator[None]:
    """Launches are compiled for ``arch`` instead of run, and what they need is appended to ``rows``."""
    target, capability, *_ = TARGETS[arch]
    seen: set[str] = set()

    def record(kernel: Any, grid: Any, device: Any, args: Any, options: Any) -> None:
        name = kernel.__name__
        if name in seen or (only is not None and name != only):
            return
        seen.add(name)
        settings = {key: options[key] for key in ("num_warps", "num_stages")}
        compiled = triton.compile(
            source(kernel, args, options), target=target, options={**settings, "enable_fp_fusion": True}
        )
        blocks = {key.lower(): options[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK") if key in options}
        rows.append({"kernel": name, "arch": arch, **case, **blocks, **settings, **resources(compiled, arch)})

    hip = "6.0" if target.backend == "hip" else None
    with (
        patch.object(launch, "start", record),
        patch("torch.cuda.get_device_capability", lambda *_: capability),
        patch("torch.version.hip", hip),
        FakeTensorMode(),
    ):
        yield


def attention_arguments(dtype: torch.dtype, width: int, tile: int, bias: bool) -> tuple[Any, ...]:
    """Arguments of attention on 4,096 patches, keep 0.1, of a packed projection; with ``bias`` all that is optional."""
    tiling = Tiling((64, 64), (tile, tile), 1)
    batch, heads, tokens, tiles, tail, kept = 8, 12, tiling.num_tokens, tiling.num_tiles, 256, 411

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    q, k, v = tensor(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    listed = (batch, heads, tiles, kept)
    return (
        q, k, v, tensor(tiles, tile * tile, dtype=torch.int32), tensor(*listed, dtype=torch.int32),
        tensor(*listed, dtype=torch.float32) if bias else None, tensor(batch, heads, tail, width),
        tensor(batch, heads, tail, width), tensor(batch, heads, tiles, tail, dtype=torch.float32),
        tensor(1, heads, tokens, tokens + tail) if bias else None, 1, width**-0.5,
    )  # fmt: skip


def compile_all(arch: str, quick: bool) -> list[Row]:
    """Every kernel for an architecture: the sizes of ViTs, and what is unusual."""
    rows: list[Row] = []
    half = [(torch.bfloat16, width, 8, False) for width in ((64,) if quick else (16, 32, 64, 80, 128, 256))]
    more = [(torch.bfloat16, 64, 4, False), (torch.bfloat16, 64, 8, True), (torch.float32, 64, 8, False)]
    for dtype, width, tile, bias in half if quick else [*half, *more]:
        case = {"dtype": str(dtype).removeprefix("torch."), "head_dim": width, "query_tile": tile, "biases": bias}
        with compiling(arch, rows, case):
            arguments = attention_arguments(dtype, width, tile, bias)
            attend.attend(*arguments)
            if not quick or arch == "sm_90":
                attend_backward.attend_backward(torch.empty_like(arguments[0]), *arguments)
            q, k, tokens = arguments[0], arguments[1], arguments[3]
            group_of = torch.empty(tile * tile, dtype=torch.int32, device="cuda")
            pooled = queries.group_queries(q, tokens, group_of, tile * tile // 4, 2)
            weight = torch.empty(*k.shape[:2], 4096, device="cuda")
            indices = score.tile_keys(pooled, k, weight, 1, 410, width**-0.5, False)
            member, _, _ = groups.group_patches(k, 64, 64, 4, 4, 1, 2)
            counts.count_unkept(indices, None, member, 64, 64, 4, 4, 1)
    if not quick:
        with compiling(arch, rows, {"columns": 16384}):
            select.topk(torch.empty(64, 16384, dtype=torch.bfloat16, device="cuda"), 1639)
    return rows


def faults(rows: list[Row]) -> list[str]:
    """What must not be: spills, too much shared memory, gathers that are not asynchronous copies of 16 bytes."""
    found = []
    for row in rows:
        name = ", ".join(str(row[key]) for key in ("kernel", "arch", "dtype", "head_dim", "query_tile") if key in row)
        limit = TARGETS[row["arch"]][5]
        if row["spilled_bytes"]:
            found.append(f"{name}: {row['spilled_bytes']} bytes of registers are spilled")
        if row["shared_bytes"] > limit:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of at most {limit}")
        if not row["programs_at_once"]:
            found.append(f"{name}: no program fits a multiprocessor")
        if row["kernel"] == "attend_kernel" and row["arch"].startswith("sm"):
            size = {"float32": 4}.get(row["dtype"], 2)
            copies = row["block_n"] * row["head_dim"] * size // 16 // (32 * row["num_warps"])
            # Keys and values of two loops, once in each and once before it at least.
            if row["copies_of_16_bytes"] < 8 * copies:
                found.append(f"{name}: {row['copies_of_16_bytes']} asynchronous copies of 16 bytes, not {8 * copies}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arch", choices=TARGETS, action="append")
    arguments = parser.parse_args()
    rows = [row for arch in arguments.arch or TARGETS for row in compile_all(arch, arguments.quick)]
    if arguments.output is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text = f'{{\n "versions": {json.dumps(versions)},\n "kernels": [\n  {lines}\n ]\n}}\n'
        write_atomically(arguments.output, text)
    else:
        print("\n".join(json.dumps(row) for row in rows))
    wrong = faults(rows)
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
