"""Measures where sparse attention pays and fits the constants of ``sparsifiner/cost.py`` to it.

    python benchmarks/cost.py benchmarks/results/cost.json

One attention layer without its projections against ``scaled_dot_product_attention``, interleaved, over sizes, heads,
batches, keep rates and tiles; float32 and bfloat16. The tail pools whole blocks: ``regroup`` was measured by itself.
Finished cases are kept in the output file. Needs SciPy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy
from scipy.optimize import nnls

from sparsifiner import SparsifinerConfig, Tiling
from sparsifiner._utils.files import write_atomically
from sparsifiner.attention import build_predictor
from sparsifiner.attention.cost import MARGIN
from sparsifiner.config import TailConfig
from sparsifiner.geometry.counting import num_kept
from sparsifiner.measure.benchmark import measure_operator

HEAD_DIM = 64
SHAPES = [(1, 6), (8, 6), (1, 12), (1, 3)]  # images, heads
SIDES = (14, 18, 24, 32, 48, 64)
PATTERNS: dict[str, dict[str, Any]] = {
    "4x4 tiles": {},
    "4x8 tiles": {"query_tile": (4, 8), "query_pool": (2, 4)},
    "2x2 tiles": {"query_tile": (2, 2), "query_pool": (1, 1)},
    "local window": {"predictor": "local"},
}


def cases() -> list[tuple[int, int, int, float, str]]:
    """Everything at one image and 6 heads; of the other shapes the default pattern."""
    found = []
    for (batch, heads), side, rate, pattern in itertools.product(SHAPES, SIDES, (0.05, 0.1, 0.25, 0.5), PATTERNS):
        usual = (batch, heads) == (1, 6)
        if batch * heads * side**4 <= 1.3e8 and (usual or (pattern == "4x4 tiles" and rate > 0.05)):
            found.append((batch, heads, side, rate, pattern))
    return found


def work(case: dict[str, Any]) -> tuple[list[float], float]:
    """What the constants multiply (attend, score, elements, calls), and the dense multiply-adds."""
    config = SparsifinerConfig(
        keep_rate=case["keep_rate"], mode="sparse", **PATTERNS[case["pattern"]], tail=TailConfig(refine=0)
    )
    tiling = Tiling((case["side"], case["side"]), config.query_tile, 1)
    predictor = build_predictor(
        config, num_heads=case["heads"], head_dim=HEAD_DIM, grid=tiling.grid, num_prefix_tokens=1
    )
    keys = (
        num_kept(config.keep_rate, tiling.num_patches)
        + 1
        + Tiling(tiling.grid, config.tail.block if config.tail else (4, 4)).num_tiles
    )
    lanes = math.ceil(tiling.tile_size / 16) * 16
    batch, heads = case["batch"], case["heads"]
    attend = 2 * batch * heads * HEAD_DIM * tiling.num_tiles * lanes * keys
    score = batch * predictor.score_macs(heads, HEAD_DIM, tiling)
    elements = batch * heads * HEAD_DIM * tiling.num_tokens
    return [attend, score, elements, 1.0], 2.0 * batch * heads * HEAD_DIM * tiling.num_tokens**2


def fit(measured: list[dict[str, Any]]) -> None:
    """Non-negative least squares on the ratio of sparse to dense; prints the constants and how far off they are."""
    rows, ratios, dense_macs = [], [], []
    for case in measured:
        row, macs = work(case)
        dense_macs.append(case["dense_s"] / macs)
        rows.append([value / case["dense_s"] for value in row])
        ratios.append(case["sparse_s"] / case["dense_s"])
    scale = numpy.abs(rows).max(0)
    solution = nnls(numpy.array(rows) / scale, numpy.array(ratios))[0] / scale
    unit = float(numpy.median(dense_macs))
    predicted = numpy.array(rows) @ solution
    error = float(numpy.sqrt(numpy.mean(numpy.log(predicted / ratios) ** 2)))
    lost = [max(ratio, 1.0) for ratio, share in zip(ratios, predicted, strict=True) if share < MARGIN]
    print(dict(zip(("attend", "score", "element", "call"), solution / unit, strict=True)))
    print(f"typical error {error:.0%}; slowest case chosen to run sparse: {max(lost):.2f} of dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    measured = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    done = {tuple(case[name] for name in ("batch", "heads", "side", "keep_rate", "pattern")) for case in measured}
    for case in cases():
        if case in done:
            continue
        batch, heads, side, rate, pattern = case
        config = SparsifinerConfig(keep_rate=rate, mode="sparse", **PATTERNS[pattern], tail=TailConfig(refine=0))
        for found in measure_operator((side, side), config, heads=heads, batch=batch, repeats=5):
            measured.append(
                {
                    **dict(batch=batch, heads=heads, side=side, keep_rate=rate, pattern=pattern),
                    "dtype": found.settings["dtype"],
                    "dense_s": found.median("dense"),
                    "sparse_s": found.median("layer"),
                }
            )
        write_atomically(arguments.output, json.dumps(measured, indent=1) + "\n")
    for dtype in ("float32", "bfloat16"):
        print(dtype)
        fit([case for case in measured if case["dtype"] == dtype])


if __name__ == "__main__":
    main()
