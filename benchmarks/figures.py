"""Draws time against tokens, log-log, from the results of ``speed.py``.

python benchmarks/figures.py benchmarks/results/speed.json docs/images/speed.png
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sparsifiner._utils.files import write_atomically

COLOURS = {0.05: "#1b7837", 0.1: "#2166ac", 0.25: "#b2182b"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    scan = [entry for name, case in results.items() if name.startswith("tokens, ") for entry in case["measured"]]
    if not scan:
        raise SystemExit(f"{arguments.results} holds no scan over tokens; run benchmarks/speed.py first")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        rows = [entry for entry in scan if entry["settings"]["dtype"] == dtype]
        dense: dict[int, list[float]] = {}
        for entry in rows:
            dense.setdefault(entry["settings"]["num_tokens"], []).append(entry["median_s"]["dense"] * 1e3)
        tokens = sorted(dense)
        middle = [sorted(dense[count])[len(dense[count]) // 2] for count in tokens]
        axis.plot(tokens, middle, "k-o", markersize=4, label="dense (scaled_dot_product_attention)")
        for rate, colour in COLOURS.items():
            points = sorted(
                (entry["settings"]["num_tokens"], entry["median_s"]["layer"] * 1e3)
                for entry in rows
                if entry["settings"]["config"]["keep_rate"] == rate
            )
            axis.plot(*zip(*points, strict=True), "-o", color=colour, markersize=4, label=f"sparse, keep {rate:g}")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=dtype)
        axis.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds per layer, projections excluded")
    axes[0].legend(frameon=False)
    image = BytesIO()
    figure.savefig(image, dpi=130)
    write_atomically(arguments.output, image.getvalue())


if __name__ == "__main__":
    main()
