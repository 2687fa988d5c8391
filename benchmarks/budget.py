"""Who shares the keys: fixed counts, a budget of each layer, rates by layer, and both, at one average keep rate.

    python benchmarks/budget.py PHOTOS_FOLDER benchmarks/results/budget.json

Relative L2 of the built-in model's final patch features, mean and worst photograph. Rates by layer are fitted by
``calibrate`` to every fourteenth photograph; the others judge. Finished settings are kept in the output file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from sparsifiner import SparsifinerConfig, calibrate, sparse_layers, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.photos import load_photos, preprocess
from sparsifiner.convert import always_sparse
from sparsifiner.measure.fidelity import measure_fidelity
from sparsifiner.models import load_model
from sparsifiner.predictors import PooledConfig
from sparsifiner.report.machine import this_machine

TILES = {
    "4x4 tiles": SparsifinerConfig(),
    "8x8 tiles, 8 groups": SparsifinerConfig(query_tile=(8, 8), predictor=PooledConfig(query_pool=(2, 4))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--keep-rate", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=1, help="of the photographs that judge, take each N-th only")
    arguments = parser.parse_args()
    size = (arguments.size, arguments.size)
    model = load_model("builtin", img_size=size)
    transform = preprocess(model, size)
    photos = load_photos(arguments.photos).photos
    to_fit = torch.stack([transform(photo.image) for photo in photos[::14]])
    judges = [photo for number, photo in enumerate(photos) if number % 14][:: arguments.every]
    images = [transform(photo.image) for photo in judges]
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for tiles, config in TILES.items():
        for budget in ("tile", "layer"):
            for fitted in (False, True):
                name = f"{arguments.size} px, keep {arguments.keep_rate}, {tiles}, budget of the {budget}"
                name += ", rates and tail offsets by layer" if fitted else ""
                if name in results:
                    continue
                predictor = config.predictor.replace(budget=budget)
                settings = config.replace(keep_rate=arguments.keep_rate, predictor=predictor)
                sparse = sparsify(model, settings)
                with always_sparse(sparse):
                    if fitted:
                        calibrate(sparse, to_fit, keep_rates="per_layer")
                    fidelity = measure_fidelity(model, sparse, images, [photo.name for photo in judges])
                results[name] = {
                    "machine": asdict(this_machine(torch.device("cpu"))),
                    "photos": len(images),
                    "patch_l2": {"mean": fidelity.mean("patch_l2"), "worst": fidelity.worst("patch_l2")},
                    "patch_cosine": {"mean": fidelity.mean("patch_cosine"), "worst": fidelity.worst("patch_cosine")},
                    "density": sum(fidelity.density.values()) / len(fidelity.density),
                    "keep_rates": [layer.config.keep_rate for layer in sparse_layers(sparse).values()],
                }
                write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
                print(f"{name}: {results[name]['patch_l2']}", flush=True)


if __name__ == "__main__":
    main()
