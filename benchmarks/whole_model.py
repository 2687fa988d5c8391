"""Latency of whole models, dense and sparse, interleaved in one process; random weights, since only time is measured.

    python benchmarks/whole_model.py benchmarks/results/whole_model.json

Finished cases are kept in the output file and not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner.analysis.latency import compare_latency

DEFAULT = SparsifinerConfig(keep_rate=0.1)
CASES = {
    "ViT-S/16, 1024 px, bfloat16, default, keep 0.1": (1024, torch.bfloat16, DEFAULT),
    "ViT-S/16, 1024 px, float32, default, keep 0.1": (1024, torch.float32, DEFAULT),
    "ViT-S/16, 1024 px, bfloat16, 4x8 tiles, 4 queries each, keep 0.1": (
        1024,
        torch.bfloat16,
        SparsifinerConfig(keep_rate=0.1, query_tile=(4, 8), query_pool=(2, 4)),
    ),
    "ViT-S/16, 2048 px, bfloat16, default, keep 0.05": (2048, torch.bfloat16, SparsifinerConfig(keep_rate=0.05)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name, (size, dtype, config) in CASES.items():
        if name not in results:
            torch.manual_seed(0)
            dense = timm.create_model("vit_small_patch16_224", img_size=size, num_classes=0).eval().to(dtype)
            x = torch.randn(1, 3, size, size, dtype=dtype)
            timings = compare_latency(dense, sparsify(dense, config), x, repeats=arguments.repeats, warmup=1)
            results[name] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **timings.to_dict()}
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        result = results[name]
        print(f"{name}: {result['dense_median_s']:.2f} s dense, {result['sparse_median_s']:.2f} s sparse")


if __name__ == "__main__":
    main()
