"""Latency of token pruning against the dense model, interleaved in one process; random weights, only time is measured.

    python benchmarks/token_pruning.py benchmarks/results/token_pruning.json

DeiT-S at 224 px, batch 32. Finished cases are kept in the output file and not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from sparsifiner import SparsifinerConfig, count_flops, prune_tokens, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner.measure.latency import compare_latency
from sparsifiner.methods import METHODS

Convert = Callable[[nn.Module], nn.Module]
CASES: dict[str, tuple[torch.dtype, Convert]] = {
    "keep 0.7, float32": (torch.float32, lambda model: prune_tokens(model, keep_rate=0.7)),
    "keep 0.7, fused, float32": (torch.float32, lambda model: prune_tokens(model, keep_rate=0.7, fuse=True)),
    "keep 0.5, float32": (torch.float32, lambda model: prune_tokens(model, keep_rate=0.5)),
    "keep 0.7, bfloat16": (torch.bfloat16, lambda model: prune_tokens(model, keep_rate=0.7)),
    "keep 0.7, tiles and tail at attention keep 0.25, float32": (
        torch.float32,
        lambda model: sparsify(prune_tokens(model, keep_rate=0.7), SparsifinerConfig(keep_rate=0.25, mode="sparse")),
    ),
    "merging to a fifth in the end, float32": (torch.float32, lambda model: METHODS["tome"].convert(model, 0.2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name, (dtype, convert) in CASES.items():
        if name not in results:
            torch.manual_seed(0)
            dense = timm.create_model("deit_small_patch16_224").eval().to(dtype)
            x = torch.randn(arguments.batch, 3, 224, 224, dtype=dtype)
            faster = convert(dense)
            timings = compare_latency(dense, faster, x, repeats=arguments.repeats, warmup=1)
            results[name] = {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "batch": arguments.batch,
                "dense_gmacs": count_flops(dense, x[:1]).total_macs / 1e9,
                "converted_gmacs": count_flops(faster, x[:1]).total_macs / 1e9,
                **timings.to_dict(),
            }
            write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
        result = results[name]
        print(
            f"{name}: {result['dense_median_s']:.2f} s dense, {result['sparse_median_s']:.2f} s converted, "
            f"{result['paired_speedup']:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
