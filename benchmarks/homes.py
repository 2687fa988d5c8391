"""Fills the table of model families: converts, equal at keep rate 1, layers swapped, compiles, saved and reloaded.

    python benchmarks/homes.py benchmarks/results/homes.json        # the table, over small random models
    python benchmarks/homes.py --speed benchmarks/results/homes-speed.json

``--speed`` measures DINOv2-S of transformers with random weights, and attention of eight frames, dense against sparse,
interleaved in one process. Needs transformers and open_clip_torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.processor import processor_name
from sparsifiner.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import lively
from homes import TRANSFORMERS, first_tensor, pixels
from test_decomposed import MODELS as SAM
from test_homes import MODELS
from test_repositories import MODELS as REPOSITORIES

SETTINGS = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(2, 2), tail=(2, 2))


def families() -> dict[str, tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]:
    """A model of each family and what runs it."""
    found: dict[str, tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]] = {}
    for name, home in TRANSFORMERS.items():
        found[f"transformers {name}"] = home.build(), lambda model, home=home: first_tensor(model(**home.inputs()))
    for name, (build, run) in {**MODELS, **SAM}.items():
        found[name] = build(), lambda model, run=run: run(model, pixels(2, 3, 64, 64))
    for name, (build, size, _) in REPOSITORIES.items():
        found[f"one qkv, {name}"] = build(), lambda model, size=size: model(pixels(*size))
    return found


@torch.no_grad()
def row(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> dict[str, Any]:
    """The cells of a family; a cell that failed says why."""
    dense = run(lively(model))
    sparse = sparsifiner.sparsify(model, SETTINGS)
    changed = ((run(sparse) - dense).norm() / dense.norm()).item()
    sparsifiner.set_keep_rate(sparse, 1.0)
    error = ((run(sparse) - dense).norm() / dense.norm()).item()
    sparsifiner.set_keep_rate(sparse, 0.2)
    cells: dict[str, Any] = {
        "layers": len(sparsifiner.conversion(sparse).swapped),
        "relative error at keep 1": error,
        "change at keep 0.2": changed,
    }
    for name, check in {"compiles": _compiles, "saved and reloaded": _reloads}.items():
        try:
            cells[name] = check(sparse, run)
        except Exception as failure:
            cells[name] = f"no: {str(failure).splitlines()[0][:200]}"
    return cells


def _compiles(sparse: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> bool:
    torch._dynamo.reset()
    want = run(sparse)
    compiled = run(torch.compile(sparse, backend="aot_eager"))
    return bool((compiled - want).norm() < 1e-3 * want.norm())


def _reloads(sparse: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        sparsifiner.save_pretrained(sparse, folder)
        return torch.equal(run(sparsifiner.from_pretrained(folder)), run(sparse))


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of both, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (first, second):
        function()
    for _ in range(repeats):
        for function, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


@torch.inference_mode()
def speed() -> list[dict[str, Any]]:
    """Dense and sparse times of DINOv2-S, keep rate 0.1, and of one attention over eight frames of 37x37 patches."""
    import transformers

    rows = []
    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    model = transformers.Dinov2Model(config).eval()
    sparse = sparsifiner.sparsify(model, keep_rate=0.1)
    for height, width in ((518, 518), (518, 770), (1036, 1036)):
        x = torch.randn(1, 3, height, width)
        dense_s, sparse_s = interleaved(lambda x=x: model(x), lambda x=x: sparse(x), 3 if height > 600 else 7)
        rows.append({"model": "DINOv2-S", "image": [height, width], "dense_s": dense_s, "sparse_s": sparse_s})
    frames, tokens = 8, 8 * (37 * 37 + 5)
    q, k, v = torch.randn(3, 1, 8, tokens, 64).unbind(0)
    q, k = (x + 2 * x[:, :, :1] for x in (q, k))
    arguments: dict[str, Any] = dict(grid=(frames, 37, 37), prefix_per_frame=5, keep_rate=0.1)
    for tile in ((4, 4), (8, 8)):
        settings = SparsifinerConfig(query_tile=tile)
        dense_s, sparse_s = interleaved(
            lambda: nn.functional.scaled_dot_product_attention(q, k, v),
            lambda settings=settings: scaled_dot_product_attention(q, k, v, config=settings, **arguments),
            2,
        )
        rows.append({"model": "8 frames of 37x37", "tile": list(tile), "dense_s": dense_s, "sparse_s": sparse_s})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--speed", action="store_true", help="measure instead of filling the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.speed:
        results: Any = {"cpu": processor_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        results["rows"] = speed()
    else:
        results = {}
        for name, (model, run) in families().items():
            results[name] = row(model, run)
            print(name, results[name], flush=True)
    write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
