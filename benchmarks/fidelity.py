"""Fidelity of the built-in model on a folder of photographs, for the settings that docs/results.md quotes.

    python benchmarks/fidelity.py PHOTOS_FOLDER benchmarks/results/fidelity.json
    python benchmarks/fidelity.py PHOTOS_FOLDER benchmarks/results/fidelity-1456.json --size 1456 --every 10 \\
        --only "default, keep 0.1" "default, keep 0.05" "every key scored, keep 0.1" "every key scored, keep 0.05"

Final patch features after the last norm, sparse against dense, all layers sparse, float32. Finished settings are
kept in the output file and not measured again. The second command shows what screening changes, which begins at 8,192
patches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.photos import load_photos, preprocess
from sparsifiner.config import TailConfig
from sparsifiner.convert import always_sparse
from sparsifiner.measure.fidelity import measure_fidelity
from sparsifiner.models import load_model
from sparsifiner.predictors import PooledConfig

SETTINGS = {
    "default, keep 0.05": SparsifinerConfig(keep_rate=0.05),
    "default, keep 0.1": SparsifinerConfig(keep_rate=0.1),
    "default, keep 0.25": SparsifinerConfig(keep_rate=0.25),
    "4x8 tiles with 4 queries, keep 0.1": SparsifinerConfig(
        keep_rate=0.1, query_tile=(4, 8), predictor=PooledConfig(query_pool=(2, 4))
    ),
    "4x8 tiles with 2 queries, 4x8 tail, keep 0.1": SparsifinerConfig(
        keep_rate=0.1, query_tile=(4, 8), predictor=PooledConfig(query_pool=(4, 4)), tail=(4, 8)
    ),
    "3x3 tail, keep 0.1": SparsifinerConfig(keep_rate=0.1, tail=(3, 3)),
    "no tail, keep 0.1": SparsifinerConfig(keep_rate=0.1, tail=None),
    "oracle (attention mass), keep 0.1": SparsifinerConfig(keep_rate=0.1, predictor="oracle"),
    "local window, keep 0.1": SparsifinerConfig(keep_rate=0.1, predictor="local"),
}
WHOLE_BLOCKS = {
    **{
        f"tail of whole blocks, keep {rate}": SparsifinerConfig(keep_rate=rate, tail=TailConfig(refine=0))
        for rate in (0.05, 0.1, 0.25)
    },
    "local window, tail of whole blocks, keep 0.1": SparsifinerConfig(
        keep_rate=0.1, predictor="local", tail=TailConfig(refine=0)
    ),
}
SCREENING = {
    f"every key scored, keep {rate}": SparsifinerConfig(keep_rate=rate, predictor=PooledConfig(screen_from=None))
    for rate in (0.05, 0.1)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=504, help="pixels, shorter side resized and centre cropped")
    parser.add_argument("--every", type=int, default=1, help="take each N-th photograph only")
    parser.add_argument(
        "--only", nargs="+", choices=[*SETTINGS, *WHOLE_BLOCKS, *SCREENING], default=[*SETTINGS, *WHOLE_BLOCKS]
    )
    arguments = parser.parse_args()
    size = (arguments.size, arguments.size)
    model = load_model("builtin", img_size=size)
    transform = preprocess(model, size)
    photos = load_photos(arguments.photos).photos[:: arguments.every]
    images = [transform(photo.image) for photo in photos]
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.only:
        if name in results:
            continue
        sparse = sparsify(model, {**SETTINGS, **WHOLE_BLOCKS, **SCREENING}[name])
        with always_sparse(sparse):  # at small sizes and without native kernels, too
            fidelity = measure_fidelity(model, sparse, track(images, name), [photo.name for photo in photos])
        terms = ("patch_l2", "patch_cosine", "class_l2", "class_cosine")
        results[name] = {
            "photos": len(images),
            "size": arguments.size,
            "torch": torch.__version__,
            "mean": {term: fidelity.mean(term) for term in terms},
            "worst": {term: fidelity.worst(term) for term in terms},
        }
        write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
    for name, result in results.items():
        mean = result["mean"]
        print(f"{name:36} relative L2 {mean['patch_l2']:.4f}  cosine {mean['patch_cosine']:.4f}")


if __name__ == "__main__":
    main()
