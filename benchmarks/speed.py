"""The speed table: operator, layer and whole models, dense beside sparse, interleaved in one process.

    python benchmarks/speed.py benchmarks/results/speed.json

Models have random weights, since only time is measured. Finished cases are kept in the output file and not measured
again; ``--only TEXT`` runs the cases whose name contains it. ``pip install openvino`` adds OpenVINO's dense model.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner.config import TailConfig
from sparsifiner.measure.benchmark import Measured, measure_model, measure_operator
from sparsifiner.measure.latency import interleave_all
from sparsifiner.measure.memory import measure_memory
from sparsifiner.ops import cpu
from sparsifiner.predictors import PooledConfig
from sparsifiner.report.machine import this_machine
from sparsifiner.runtime import compile_ahead

ALWAYS = SparsifinerConfig(keep_rate=0.1, mode="sparse")
SMALL = "vit_small_patch16_224"
WIDE = dict(query_tile=(4, 8), predictor=PooledConfig(query_pool=(2, 4)))
SIDES = (14, 20, 24, 32, 48, 64, 96)
KEEP_RATES = (0.05, 0.1, 0.25)


def model(name: str, size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, num_classes=0).eval()


def whole(
    name: str, size: int, keep_rate: float, dtype: torch.dtype, *, batch: int = 1, compiled: bool, repeats: int
) -> list[Measured]:
    """Dense, the default, and wider tiles; eager and, where it is measured, under ``torch.compile``."""
    default = SparsifinerConfig(keep_rate=keep_rate)
    configs = {"sparse": default, "sparse, 4x8 tiles": default.replace(**WIDE)}
    dense = model(name, size)
    return [
        measure_model(
            dense, configs, (size, size), title=name, batch=batch, dtype=dtype, compiled=compiled, repeats=repeats
        )
    ]


def openvino_dense(size: int) -> list[Measured]:
    """OpenVINO's dense bfloat16 model beside torch's dense and the sparse bfloat16 models."""
    import numpy
    import openvino

    dense = model("vit_small_patch16_224", size)
    x = torch.randn(1, 3, size, size)
    converted = openvino.convert_model(dense, example_input=x)
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    array: Any = numpy.ascontiguousarray(x.numpy())
    dense, x = dense.bfloat16(), x.bfloat16()
    sparse = sparsify(dense, SparsifinerConfig(keep_rate=0.1))
    wide = sparsify(dense, SparsifinerConfig(keep_rate=0.1, **WIDE))
    work: dict[str, Callable[[], object]] = {
        "OpenVINO dense": lambda: compiled(array),
        "dense": lambda: dense(x),
        "sparse": lambda: sparse(x),
        "sparse, 4x8 tiles": lambda: wide(x),
        "sparse, ahead of time": partial(compile_ahead(sparse, x), x),
        "sparse, 4x8 tiles, ahead of time": partial(compile_ahead(wide, x), x),
    }
    with torch.inference_mode():
        seconds = interleave_all(work, repeats=5, warmup=1)
    title = f"vit_small_patch16_224, {size} px, batch 1, bfloat16, keep 0.1"
    return [Measured(title, {"image_size": [size, size], "openvino": openvino.__version__}, seconds, "OpenVINO dense")]


def memory(size: int) -> dict[str, Any]:
    dense = model("vit_small_patch16_224", size).bfloat16()
    x = torch.randn(1, 3, size, size).bfloat16()
    sparse = sparsify(dense, SparsifinerConfig(keep_rate=0.05))
    peaks = {"dense": measure_memory(dense, x), "sparse": measure_memory(sparse, x)}
    return {
        "title": f"vit_small_patch16_224, {size} px, batch 1, bfloat16, keep 0.05: peak memory",
        "bytes": {name: asdict(found) for name, found in peaks.items()},
        "sparse_over_dense": peaks["sparse"].total_bytes / peaks["dense"].total_bytes,
    }


CASES: dict[str, Callable[[], Any]] = {
    "operator, 4x8 tiles, 410 + 128 keys": lambda: measure_operator(
        (64, 64), ALWAYS.replace(**WIDE, tail=(4, 8)), num_prefix_tokens=0
    ),
    "layer, default": lambda: measure_operator((64, 64), ALWAYS),
    "layer, tail of whole blocks": lambda: measure_operator((64, 64), ALWAYS.replace(tail=TailConfig(refine=0))),
    "layer, 4x8 tiles, 2 queries each, 410 + 128 keys": lambda: measure_operator(
        (64, 64),
        ALWAYS.replace(query_tile=(4, 8), predictor=PooledConfig(query_pool=(4, 4)), tail=(4, 8)),
        num_prefix_tokens=0,
    ),
    "layer, 4x8 tiles": lambda: measure_operator((64, 64), ALWAYS.replace(**WIDE)),
    **{
        f"tokens, {side * side} patches, keep {rate}": partial(
            measure_operator, (side, side), ALWAYS.replace(keep_rate=rate), repeats=5, max_seconds=20
        )
        for side in SIDES
        for rate in KEEP_RATES
    },
    "1024 px, bfloat16": partial(whole, SMALL, 1024, 0.1, torch.bfloat16, compiled=True, repeats=5),
    "1024 px, float32": partial(whole, SMALL, 1024, 0.1, torch.float32, compiled=True, repeats=9),
    "1024 px, OpenVINO": lambda: openvino_dense(1024),
    "1036 px, ViT-S/14, bfloat16": partial(
        whole, "vit_small_patch14_dinov2", 1036, 0.1, torch.bfloat16, compiled=True, repeats=3
    ),
    "1536 px, bfloat16": partial(whole, SMALL, 1536, 0.1, torch.bfloat16, compiled=False, repeats=3),
    "2048 px, bfloat16": partial(whole, SMALL, 2048, 0.05, torch.bfloat16, compiled=False, repeats=2),
    **{
        f"224 px, batch 8, {name}, {str(dtype).removeprefix('torch.')}": partial(
            whole, name, 224, 0.1, dtype, batch=8, compiled=False, repeats=41
        )
        for name in (SMALL, "deit_small_patch16_224")
        for dtype in (torch.float32, torch.bfloat16)
    },
    "2048 px, memory": lambda: memory(2048),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name, measure in CASES.items():
        if arguments.only not in name or name in results:
            continue
        found = measure()
        entries = [found] if isinstance(found, dict) else [item.to_dict() for item in found]
        results[name] = {
            "machine": asdict(this_machine(torch.device("cpu"))),
            "level": cpu.level(),
            "load": os.getloadavg()[0],
            "measured": entries,
        }
        write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
        for entry in entries:
            ratios = {key: round(value, 2) for key, value in entry.get("speedup", {}).items()}
            print(f"{name}: {entry['title']}: {ratios or entry['sparse_over_dense']}", flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
