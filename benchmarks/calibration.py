"""What calibration gains on the built-in model: fitted to every other photograph of a folder, measured on the rest.

    python benchmarks/calibration.py PHOTOS_FOLDER benchmarks/results/calibration.json

Final patch features after the last norm, sparse against dense, all layers sparse, float32. Finished settings are
kept in the output file and not run again; one that was interrupted continues from its state file beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sparsifiner import SparsifinerConfig, calibrate, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.photos import SUFFIXES
from sparsifiner.models import load_model

LOWRANK = dict(predictor="lowrank")
SETTINGS: dict[str, tuple[SparsifinerConfig, dict[str, Any]]] = {
    "pooled, keep rates per layer, keep 0.1": (SparsifinerConfig(keep_rate=0.1), dict(keep_rates="per_layer")),
    "pooled, keep 0.1": (SparsifinerConfig(keep_rate=0.1), {}),
    "lowrank, spectral start, keep 0.1": (SparsifinerConfig(keep_rate=0.1, **LOWRANK), dict(steps=0)),
    "lowrank, keep rates per layer, keep 0.1": (
        SparsifinerConfig(keep_rate=0.1, **LOWRANK),
        dict(steps=0, keep_rates="per_layer"),
    ),
    "lowrank, 200 steps, keep 0.1": (SparsifinerConfig(keep_rate=0.1, **LOWRANK), dict(steps=200)),
    "paper, spectral start, keep 0.1": (SparsifinerConfig.paper(keep_rate=0.1), dict(steps=0)),
    "paper, 200 steps, keep 0.1": (SparsifinerConfig.paper(keep_rate=0.1), dict(steps=200)),
    "pooled, keep 0.25": (SparsifinerConfig(keep_rate=0.25), {}),
    "pooled, keep 0.05": (SparsifinerConfig(keep_rate=0.05), {}),
    "pooled, keep rates per layer, keep 0.05": (SparsifinerConfig(keep_rate=0.05), dict(keep_rates="per_layer")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=504, help="pixels, shorter side resized and centre cropped")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    arguments = parser.parse_args()
    size = (arguments.size, arguments.size)
    model = load_model("builtin", img_size=size)
    photos = sorted(path for path in arguments.photos.iterdir() if path.suffix.lower() in SUFFIXES)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.only:
        if name in results:
            continue
        config, settings = SETTINGS[name]
        state = arguments.output.with_name(f"{name}.state").absolute()
        started = time.time()
        resumed = state.exists()
        sparse = sparsify(model, config)
        result = calibrate(sparse, photos[0::2], validation=photos[1::2], img_size=size, state=state, **settings)
        print(name, result, sep="\n")
        rates = [layer.keep_rate for layer in result.layers]
        results[name] = {
            "size": arguments.size,
            "torch": torch.__version__,
            "seconds": None if resumed else round(time.time() - started),
            "mean_keep_rate": sum(rates) / len(rates),
            **result.to_dict(),
        }
        for which in ("before", "after"):
            del results[name][which]["density_per_layer"], results[name][which]["images"]
        write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")
        state.unlink()
    for name, result in results.items():
        for which in ("before", "after"):
            mean = result[which]["mean"]
            print(f"{name:40} {which:6}  relative L2 {mean['patch_l2']:.4f}  cosine {mean['patch_cosine']:.4f}")


if __name__ == "__main__":
    main()
