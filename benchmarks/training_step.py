"""Time of a training step, dense and sparse, in turn in one process; random weights and images, only time is measured.

    TIMM_FUSED_ATTN=0 python benchmarks/training_step.py benchmarks/results/training_step.json

ViT-S/16 at 256 px (256 patches), batch 32, bfloat16 autocast unless ``--precision float32`` says otherwise, one forward
and one backward pass without optimiser and teacher. Sparse attention in training is the gather backend. timm's fused
attention is off because the dense model trains faster without it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from sparsifiner._utils.files import write_atomically
from sparsifiner.measure.latency import interleave_all
from sparsifiner.methods import convert_with

CASES = (("dense", 1.0), ("sparsifiner", 0.25), ("sparsifiner", 0.1), ("paper", 0.25), ("paper", 0.1), ("evit", 0.7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dense = timm.create_model("vit_small_patch16_224", img_size=256)
    models = {f"{name}, keep {rate:g}": convert_with(name, dense, rate).train() for name, rate in CASES}
    x = torch.randn(arguments.batch, 3, 256, 256)
    work = {name: partial(step, model, x, arguments.precision == "bfloat16") for name, model in models.items()}
    seconds = interleave_all(work, repeats=arguments.repeats, warmup=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    results = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": arguments.batch,
        "precision": arguments.precision,
        "seconds": seconds,
        "median_s": medians,
    }
    write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
    for name, median in medians.items():
        print(f"{name}: {median:.2f} s, {median / medians['dense, keep 1']:.2f} of dense")


def step(model: nn.Module, x: torch.Tensor, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


if __name__ == "__main__":
    main()
