"""Drops of a sweep as Markdown tables, one per stage: methods down, keep rates across.

    python benchmarks/drops.py benchmarks/results/cifar10

The folder is one of ``sparsifiner pareto``. A cell is points of top-1 lost against the dense model with the 95 %
interval for paired answers, the share of attention's multiply-adds that is saved, and in brackets the number of images
where it is not the usual one of the stage. What was not measured stays empty.
"""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

from sparsifiner.evaluation import Cell, Row
from sparsifiner.evaluation.cell import STAGES
from sparsifiner.evaluation.results import load_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    rows = load_rows(parser.parse_args().folder)
    dense = rows.get(Cell("dense", 1.0))
    if dense is None:
        raise SystemExit("the sweep holds no dense row")
    low, high = dense.interval
    print(f"dense: {dense.top1:.2%} [{100 * low:.2f}, {100 * high:.2f}] on {dense.images} images")
    for stage in STAGES:
        found = [row for row in rows.values() if row.cell.stage == stage and row is not dense]
        if found:
            print("\n".join(["", f"**{stage}**", "", *table(found, dense)]))


def table(rows: list[Row], dense: Row) -> list[str]:
    rates = sorted({row.cell.keep_rate for row in rows}, reverse=True)
    usual = collections.Counter(row.images for row in rows).most_common(1)[0][0]
    lines = [
        f"| {usual} images | " + " | ".join(f"keep {rate:g}" for rate in rates) + " |",
        "|---" * (1 + len(rates)) + "|",
    ]
    for method in dict.fromkeys(row.cell.method for row in rows):
        cells = {row.cell.keep_rate: entry(row, dense, usual) for row in rows if row.cell.method == method}
        lines.append(f"| {method} | " + " | ".join(cells.get(rate, "") for rate in rates) + " |")
    return lines


def entry(row: Row, dense: Row, usual: int) -> str:
    drop, (low, high) = row.drop_from(dense)
    saved = 1 - row.mhsa_macs / dense.mhsa_macs
    images = "" if row.images == usual else f" ({row.images})"
    return f"{100 * drop:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {saved:.0%}{images}"


if __name__ == "__main__":
    main()
