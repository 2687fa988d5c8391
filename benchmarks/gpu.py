"""What sparse attention costs on a CUDA GPU, where it runs in plain PyTorch: milliseconds beside dense.

    python benchmarks/gpu.py benchmarks/results/gpu.json

The built-in model: 100 images of 224 px at keep 0.25 by several methods, inference in bfloat16; a forward and backward
pass of 16 under autocast; and 8 images of 518 and 1036 px at keep 0.1. Mean of five runs after one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sparsifiner._utils.files import write_atomically
from sparsifiner.convert import always_sparse
from sparsifiner.methods import convert_with
from sparsifiner.models import load_model

METHODS = ("dense", "sparsifiner", "paper", "linformer", "sparsifiner-evit", "tome", "local", "paper-evit")
TRAINED = ("dense", "sparsifiner", "paper", "linformer", "paper-evit")
RUNS = 5


def milliseconds(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(RUNS):
        run()
    torch.cuda.synchronize()
    return round(1e3 * (time.perf_counter() - start) / RUNS, 1)


def inference(model: nn.Module, images: int, size: int) -> float:
    x = torch.randn(images, 3, size, size, device="cuda", dtype=torch.bfloat16)
    model = model.to("cuda", torch.bfloat16).eval()
    with torch.inference_mode(), always_sparse(model):
        return milliseconds(lambda: model(x))


def step(model: nn.Module, images: int, size: int) -> float:
    x = torch.randn(images, 3, size, size, device="cuda")
    model = model.to("cuda").train()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        out.float().square().mean().backward()

    return milliseconds(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    small = load_model("builtin", img_size=(224, 224))
    found: dict[str, dict[str, float]] = {"inference, 100 images of 224 px, keep 0.25":
             {name: inference(convert_with(name, small, 0.25), 100, 224) for name in METHODS}}  # fmt: skip
    found["forward and backward, 16 images of 224 px, keep 0.25"] = {
        name: step(convert_with(name, small, 0.25), 16, 224) for name in TRAINED
    }
    for size in (518, 1036):
        large = load_model("builtin", img_size=(size, size))
        found[f"inference, 8 images of {size} px, keep 0.1"] = {
            name: inference(convert_with(name, large, 0.1), 8, size) for name in ("dense", "sparsifiner")
        }
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    write_atomically(output, json.dumps({"machine": machine, "milliseconds": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
