"""Drops of a sweep as Markdown tables, one per stage: methods down, keep rates across.

    python benchmarks/drops.py benchmarks/results/cifar10

The folder is one of ``sparsifiner pareto``. A cell is points of top-1 lost against the dense model with the 95 %
interval for paired answers, the share of attention's multiply-adds that is saved, and in brackets the number of images
where it is not the usual one of the stage. The share is by the paper's count, which leaves out two products of its
predictor; where that matters the share with every product follows. What was not measured stays empty. With ``--against
fine-tuned`` drops are against the dense model after the same fine-tuning.
"""

from __future__ import annotations

import collections

from sweep_rows import points, read_arguments, saved_text

from sparsifiner.evaluation import Row
from sparsifiner.evaluation.cell import STAGES


def main() -> None:
    rows, dense = read_arguments(__doc__)
    low, high = dense.interval
    print(f"dense: {dense.top1:.2%} [{100 * low:.2f}, {100 * high:.2f}] on {dense.images} images")
    for stage in STAGES:
        found = [row for row in rows if row.cell.stage == stage and row is not dense]
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
    images = "" if row.images == usual else f" ({row.images})"
    return f"{points(*row.drop_from(dense), digits=1)}, {saved_text(row, dense)}{images}"


if __name__ == "__main__":
    main()
