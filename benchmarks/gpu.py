"""Sparse beside dense attention on a GPU, in rows that are written one by one; run again, it goes on where it stopped.

    python benchmarks/gpu.py benchmarks/results/gpu-triton.json             # a CUDA GPU, at most 8 minutes
    TRITON_INTERPRET=1 python benchmarks/gpu.py /tmp/dry.json --dry         # anywhere: tiny sizes, to see that it runs

Milliseconds are medians of interleaved runs, the choice of keys and the tail included. A failed row holds its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsifiner import SparsifinerConfig, Tiling, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner.attention import AttentionInputs, attend, build_predictor

SECONDS = 480
Row = tuple[str, Callable[[], dict[str, Any]]]


class Machine:
    """Where and how long things run: a GPU, or this CPU for a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16

    def milliseconds(self, work: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median of each, run in turn; by CUDA events on a GPU, many runs to a measurement."""
        for run in work.values():
            run()
        rounds, repeats = (1, 1) if self.dry else (7, 5)
        found: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, run in work.items():
                found[name].append(self._one(run, repeats))
        return {name: round(statistics.median(times), 4) for name, times in found.items()}

    def _one(self, run: Callable[[], Any], repeats: int) -> float:
        if self.dry:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats


def packed(machine: Machine, side: int, batch: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, H, N, D]`` as views of a packed projection, for a square grid and a class token."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, side * side + 1, 3, heads, width, generator=generator)
    q, k, v = qkv.to(machine.device, machine.dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def sparse_layer(
    machine: Machine, side: int, tensors: tuple[Tensor, Tensor, Tensor], backend: str
) -> Callable[[], Tensor]:
    """One sparse layer: 8x8 tiles with eight groups of queries, keep 0.1, tail of 4x4 blocks."""
    config = SparsifinerConfig.from_dict(
        {"keep_rate": 0.1, "query_tile": (8, 8), "query_pool": (2, 4), "mode": "sparse", "screen_from": None}
    )
    tiling, (_, heads, _, width) = Tiling((side, side), (8, 8), 1), tensors[0].shape
    predictor = build_predictor(config, num_heads=heads, head_dim=width, grid=(side, side), num_prefix_tokens=1)
    inputs = AttentionInputs(*tensors, tiling, width**-0.5, backend=backend)
    return lambda: attend(inputs, predictor, config)


def layer_row(machine: Machine, side: int, batch: int, heads: int = 12, width: int = 64) -> dict[str, Any]:
    """One layer beside each dense backend of PyTorch, and what it computes beside the plain PyTorch one."""
    tensors = packed(machine, side, batch, heads, width)
    layer = sparse_layer(machine, side, tensors, "triton")
    work: dict[str, Callable[[], Any]] = {"sparse": layer}
    failed: dict[str, str] = {}

    def dense(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors)

        return run

    backends = (SDPBackend.MATH,) if machine.dry else (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    )  # fmt: skip
    for backend in backends:
        try:
            dense(backend)()
            work[backend.name.lower()] = dense(backend)
        except Exception as error:
            failed[backend.name.lower()] = str(error).splitlines()[0]
    found = machine.milliseconds(work)
    result: dict[str, Any] = {"milliseconds": found, "failed": failed}
    rivals = [value for name, value in found.items() if name != "sparse"]
    if rivals:
        result["speedup"] = round(min(rivals) / found["sparse"], 3)
    if not machine.dry:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer()
        result["cuda_graph_milliseconds"] = machine.milliseconds({"sparse": graph.replay})["sparse"]
    return result


def check_row(machine: Machine, side: int, width: int) -> dict[str, Any]:
    """Largest difference of a layer's output from the plain PyTorch layer's, relative to its size, in float32."""
    tensors = tuple(x.float() for x in packed(machine, side, 1, 2, width))
    got, want = (sparse_layer(machine, side, tensors, name)() for name in ("triton", "reference"))  # type: ignore[arg-type]
    return {"relative_l2": ((got - want).norm() / want.norm()).item()}


def gather_row(machine: Machine) -> dict[str, Any]:
    """Bandwidth of gathering rows of 128 bytes that fit the second-level cache."""
    rows = 512 if machine.dry else 2**17
    table = torch.randn(rows, 64, device=machine.device).to(torch.bfloat16)
    index = torch.randint(rows, (8 * rows,), device=machine.device)
    out = torch.empty(8 * rows, 64, dtype=table.dtype, device=machine.device)
    found = machine.milliseconds({"gather": lambda: torch.index_select(table, 0, index, out=out)})["gather"]
    return {"milliseconds": found, "gigabytes_per_second": round(2 * out.numel() * 2 / found / 1e6, 1)}


def training_row(machine: Machine, side: int, batch: int) -> dict[str, Any]:
    """Forward and backward of one layer."""
    tensors = tuple(x.detach().requires_grad_() for x in packed(machine, side, batch, 6, 64))
    layer = sparse_layer(machine, side, tensors, "triton")  # type: ignore[arg-type]

    def step(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run().float().square().mean(), tensors)

    with torch.enable_grad():
        dense = step(lambda: F.scaled_dot_product_attention(*tensors))
        return {"milliseconds": machine.milliseconds({"sparse": step(layer), "dense": dense})}


def model_row(machine: Machine, name: str, size: int, batch: int, compiled: bool) -> dict[str, Any]:
    """A whole model, dense and sparse, with random weights."""
    import timm

    dense = timm.create_model(name, img_size=size, num_classes=0).eval()
    config = SparsifinerConfig.from_dict(
        {
            "keep_rate": 0.1,
            "query_tile": (4, 4) if machine.dry else (8, 8),
            "mode": "sparse",
            "screen_from": None,
            "backend": "auto" if machine.dry else "triton",
        }
    )
    models: dict[str, Any] = {"dense": dense, "sparse": sparsify(dense, config)}
    models = {key: model.to(machine.device, machine.dtype) for key, model in models.items()}
    if compiled:
        models = {key: torch.compile(model) for key, model in models.items()}
    x = torch.randn(batch, 3, size, size, device=machine.device, dtype=machine.dtype)
    return {"milliseconds": machine.milliseconds({key: lambda m=m: m(x) for key, m in models.items()})}  # type: ignore[misc]


def rows(machine: Machine) -> Iterator[Row]:
    """What is measured, the most telling first."""
    if machine.dry:
        yield "gather", lambda: gather_row(machine)
        yield "check, 64 patches, head width 16", lambda: check_row(machine, 8, 16)
        yield "layer, 64 patches", lambda: layer_row(machine, 8, 1, heads=1, width=16)
        yield "model, 64 px", lambda: model_row(machine, "vit_tiny_patch16_224", 64, 1, False)
        return
    for width in (64, 80, 128):
        yield f"check, 1024 patches, head width {width}", lambda w=width: check_row(machine, 32, w)  # type: ignore[misc]
    for side, batch in ((64, 8), (128, 8), (74, 8), (37, 8), (64, 1), (128, 1), (74, 1), (37, 1)):
        yield f"layer, {side * side} patches, batch {batch}", lambda s=side, b=batch: layer_row(machine, s, b)  # type: ignore[misc]
    yield "gather", lambda: gather_row(machine)
    names = ("vit_small_patch14_dinov2", "vit_large_patch14_dinov2")
    for name in names:
        for size in (1036, 2072, 518):
            title, batch = f"{name}, {size} px", 8 if size < 2000 else 1
            yield title, lambda n=name, s=size, b=batch: model_row(machine, n, s, b, False)  # type: ignore[misc]
    for side in (32, 64):
        yield f"training, {side * side} patches", lambda s=side: training_row(machine, s, 4)  # type: ignore[misc]
    yield f"{names[0]}, 1036 px, compiled", lambda: model_row(machine, names[0], 1036, 8, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on this CPU, interpreted")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    machine, start = Machine(arguments.dry), time.perf_counter()
    name = "none: a dry run on a CPU" if machine.dry else torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": {}}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if all(before.get(key) == found[key] for key in ("device", "torch")):
            found["rows"] = {title: row for title, row in before["rows"].items() if "error" not in row}
    for title, measure in rows(machine):
        if title in found["rows"]:
            continue
        if time.perf_counter() - start > arguments.seconds:
            break
        try:
            with torch.no_grad():
                found["rows"][title] = measure()
        except Exception as error:
            found["rows"][title] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(title, json.dumps(found["rows"][title]), flush=True)
        write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
