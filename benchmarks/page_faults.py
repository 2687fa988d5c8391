"""What fresh memory costs an eager model, and what it costs where the allocator keeps what was freed (glibc).

    python benchmarks/page_faults.py benchmarks/results/page-faults.json

ViT-S/16 at 1024 px with random weights, float32, two threads, dense and sparse, in processes that take turns: as they
are, and with ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647``. Medians over all turns, and page faults of one
forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner.measure.latency import interleave_all
from sparsifiner.report.machine import this_machine

ENVIRONMENTS = {
    "as it is": {},
    "freed memory is kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"},
}
MODEL, SIZE, TURNS = "vit_small_patch16_224", 1024, 2


def measure() -> dict[str, Any]:
    """Seconds of each pass and page faults of one, by model, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    dense = timm.create_model(MODEL, img_size=SIZE, num_classes=0).eval()
    models = {
        "dense": dense,
        "sparse": sparsify(dense, SparsifinerConfig()),
        "sparse, attention in bfloat16": sparsify(dense, SparsifinerConfig(attention_dtype="bfloat16")),
    }
    x = torch.randn(1, 3, SIZE, SIZE)
    found: dict[str, Any] = {"page_faults": {}}
    with torch.inference_mode():
        found["seconds"] = interleave_all({name: lambda m=m: m(x) for name, m in models.items()}, repeats=2, warmup=1)
        for name, model in models.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            model(x)
            found["page_faults"][name] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    arguments = parser.parse_args()
    if arguments.output is None:  # one turn, for the process that counts
        print(json.dumps(measure()))
        return
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ENVIRONMENTS}
    for _ in range(TURNS):
        for name, changes in ENVIRONMENTS.items():
            command = [sys.executable, __file__]
            done = subprocess.run(command, env={**os.environ, **changes}, check=True, capture_output=True, text=True)
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    measured = {
        name: {
            model: {
                "milliseconds": round(1e3 * statistics.median(s for turn in found for s in turn["seconds"][model])),
                "page_faults": statistics.median(turn["page_faults"][model] for turn in found),
            }
            for model in found[0]["seconds"]
        }
        for name, found in turns.items()
    }
    results = {"machine": asdict(this_machine(torch.device("cpu"))), "model": f"{MODEL}, {SIZE} px", **measured}
    write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
