"""What ``sparsifiner.tune`` finds on this CPU for the built-in model, judged on photographs that it never saw.

    python benchmarks/tune.py --images PHOTOS --judge OTHERS --output benchmarks/results/tune.json

``--images`` are tuned on, half of them, as the command does; ``--judge`` are photographs for the final figures alone
(every picture of a folder that holds both: from the ``--skip``-th on). Timings run in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsifiner
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.photos import load_photos, preprocess
from sparsifiner.measure.fidelity import compare_features, final_features
from sparsifiner.measure.latency import interleave_all
from sparsifiner.models import load_model
from sparsifiner.report.machine import this_machine


def tensors(folder: Path, model: Any, size: int, count: int, skip: int) -> Tensor:
    """Photographs of ``folder`` as the model takes them."""
    prepare = preprocess(model, (size, size))
    return torch.stack([prepare(photo.image) for photo in load_photos(folder, skip + count).photos[skip:]])


def fidelity(dense: Any, tuned: Any, images: Tensor) -> dict[str, float]:
    """Mean and worst figures of final patch features."""
    found = []
    for number, x in enumerate(images.split(1)):
        found.append(compare_features(str(number), final_features(dense, x), final_features(tuned, x)))
    return {
        "images": len(found),
        "cosine": statistics.mean(item.patch_cosine for item in found),
        "worst_cosine": min(item.patch_cosine for item in found),
        "relative_l2": statistics.mean(item.patch_l2 for item in found),
        "worst_relative_l2": max(item.patch_l2 for item in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many pictures of --judge")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--min-cosine", type=float, default=0.99)
    parser.add_argument("--max-seconds", type=float, default=600)
    parser.add_argument("--storage", type=Path, default=None)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    size = arguments.size
    dense: Any = load_model("builtin", img_size=(size, size))
    images = tensors(arguments.images, dense, size, arguments.count, 0)
    tuned = sparsifiner.tune(
        dense, images, min_cosine=arguments.min_cosine, max_seconds=arguments.max_seconds, storage=arguments.storage,
        resume=arguments.resume, name="builtin", say=lambda line: print(line, flush=True),
    )  # fmt: skip
    print("\n".join(tuned.report.verdict), flush=True)
    judge = tensors(arguments.judge, dense, size, 8, arguments.skip)
    x = judge[:1]
    with torch.inference_mode():
        times = interleave_all({"dense": lambda: dense(x), "tuned": lambda: tuned.model(x)}, repeats=5, warmup=1)
    facts = {
        "machine": asdict(this_machine(torch.device("cpu"))),
        "level": sparsifiner.ops.cpu.level(),
        "held_out": {
            "speedup": statistics.median(times["dense"]) / statistics.median(times["tuned"]),
            "median_s": {name: statistics.median(values) for name, values in times.items()},
            **fidelity(dense, tuned.model, judge),
        },
        "report": tuned.report.to_dict(),
    }
    print(json.dumps(facts["held_out"], indent=1))
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    write_atomically(arguments.output, json.dumps({**known, str(size): facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
