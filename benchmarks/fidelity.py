"""Fidelity of the built-in model on a folder of photographs, for the settings that the README quotes.

    python benchmarks/fidelity.py PHOTOS_FOLDER benchmarks/results/fidelity.json

Final patch features after the last norm, sparse against dense, all layers sparse, float32. Finished settings are
kept in the output file and not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner.analysis.fidelity import measure_fidelity
from sparsifiner.analysis.images import load_photos, preprocess
from sparsifiner.models import load_model

SETTINGS = {
    "default, keep 0.05": SparsifinerConfig(keep_rate=0.05),
    "default, keep 0.1": SparsifinerConfig(keep_rate=0.1),
    "default, keep 0.25": SparsifinerConfig(keep_rate=0.25),
    "4x8 tiles with 4 queries, keep 0.1": SparsifinerConfig(keep_rate=0.1, query_tile=(4, 8), query_pool=(2, 4)),
    "4x8 tiles with 2 queries, 4x8 tail, keep 0.1": SparsifinerConfig(
        keep_rate=0.1, query_tile=(4, 8), query_pool=(4, 4), tail=(4, 8)
    ),
    "3x3 tail, keep 0.1": SparsifinerConfig(keep_rate=0.1, tail=(3, 3)),
    "no tail, keep 0.1": SparsifinerConfig(keep_rate=0.1, tail=None),
    "oracle (attention mass), keep 0.1": SparsifinerConfig(keep_rate=0.1, predictor="oracle"),
    "local window, keep 0.1": SparsifinerConfig(keep_rate=0.1, predictor="local"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=504, help="pixels, shorter side resized and centre cropped")
    arguments = parser.parse_args()
    size = (arguments.size, arguments.size)
    model = load_model("builtin", img_size=size)
    transform = preprocess(model, size)
    photos = load_photos(arguments.photos).photos
    images = [transform(photo.image) for photo in photos]
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name, config in SETTINGS.items():
        if name in results:
            continue
        sparse = sparsify(model, config)
        fidelity = measure_fidelity(model, sparse, track(images, name), [photo.name for photo in photos])
        terms = ("patch_l2", "patch_cosine", "class_l2", "class_cosine")
        results[name] = {
            "photos": len(images),
            "size": arguments.size,
            "torch": torch.__version__,
            "mean": {term: fidelity.mean(term) for term in terms},
            "worst": {term: fidelity.worst(term) for term in terms},
        }
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    for name, result in results.items():
        mean = result["mean"]
        print(f"{name:36} relative L2 {mean['patch_l2']:.4f}  cosine {mean['patch_cosine']:.4f}")


if __name__ == "__main__":
    main()
