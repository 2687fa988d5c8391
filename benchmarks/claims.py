"""The claims of Wei et al. (CVPR 2023) against a sweep: confirmed, refuted or undecided, each with its interval.

    python benchmarks/claims.py benchmarks/results/cifar10

The folder is one of ``sparsifiner pareto``. Prints Markdown. Nothing is interpolated: two methods are compared where
both were measured, image by image, and at equal cost means that the other method spends at least 99 % as many
multiply-adds on attention (the cheapest such row of the same stage): with every product of the predictor counted, and
where that differs once more as the paper counts, which leaves out two products of its predictor. What is saved is said
by both counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from sweep_rows import points, read_arguments, saved, saved_text

from sparsifiner.evaluation import Row
from sparsifiner.evaluation.cell import STAGES

OURS = ("paper", "sparsifiner")
FIXED = ("local", "strided", "random", "local-no-tail", "strided-no-tail", "random-no-tail", "linformer")
COMBINED = ("paper-evit", "sparsifiner-evit")
ALLOWED = 0.4  # points of top-1
COMBINED_SAVED = 0.6
SAME_COST = 0.99
SAVED = (0.48, 0.69)  # share of the multiply-adds of attention


def main() -> None:
    rows, dense = read_arguments(__doc__)
    lines = [
        f"**Drop within {ALLOWED} points where {SAVED[0]:.0%} to {SAVED[1]:.0%} of MHSA is saved.**",
        "",
        *small_drop(rows, dense, OURS, *SAVED),
        "",
        "**Better than fixed patterns and Linformer at equal cost.** Gain of the first over the second, same stage.",
        "",
        *better_than_fixed(rows, (row for row in rows if row.cell.method in OURS), in_full=True),
        "",
        "The same by the paper's count, where that is another.",
        "",
        *better_than_fixed(rows, (row for row in rows if row.cell.method in OURS and _differs(row)), in_full=False),
        "",
        f"**Attention and token sparsity together save over {COMBINED_SAVED:.0%}**, drop within {ALLOWED} points.",
        "",
        *small_drop(rows, dense, COMBINED, COMBINED_SAVED),
    ]
    print("\n".join(lines))


def small_drop(rows: Iterable[Row], dense: Row, methods: Iterable[str], least: float, most: float = 1.0) -> list[str]:
    """Rows of ``methods`` that save at least the share ``least`` of attention; the claim ends at ``most``."""
    lines = [
        "| method | stage | keep | saved | images | drop, points | claim |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _ordered(row for row in rows if row.cell.method in methods):
        share = saved(row, dense)
        if share < least:
            continue
        drop, (low, high) = row.drop_from(dense)
        verdict = _verdict(100 * high <= ALLOWED, 100 * low > ALLOWED)
        beyond = "" if share <= most else " (saves more than the claim)"
        lines.append(
            f"| {row.cell.method} | {row.cell.stage} | {row.cell.keep_rate:g} | {saved_text(row, dense, digits=1)} "
            f"| {row.images} | {points(drop, (low, high), digits=2)} | {verdict}{beyond} |"
        )
    return lines


def better_than_fixed(rows: Iterable[Row], ours: Iterable[Row], *, in_full: bool) -> list[str]:
    """Each of ``ours`` against every fixed pattern and Linformer among ``rows``."""

    def cost(row: Row) -> int:
        return row.mhsa_full_macs if in_full else row.mhsa_macs

    rows = list(rows)
    lines = [
        "| method | stage | keep | MMACs | against | keep | MMACs | gain, points | claim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _ordered(ours):
        for name in FIXED:
            found = [
                other
                for other in rows
                if other.cell.method == name
                and other.cell.stage == row.cell.stage
                and cost(other) >= SAME_COST * cost(row)
            ]
            if not found:
                continue
            other = min(found, key=cost)
            gain, (low, high) = other.drop_from(row)
            lines.append(
                f"| {row.cell.method} | {row.cell.stage} | {row.cell.keep_rate:g} | {cost(row) / 1e6:.1f} "
                f"| {name} | {other.cell.keep_rate:g} | {cost(other) / 1e6:.1f} "
                f"| {points(gain, (low, high), digits=2)} | {_verdict(low > 0, high < 0)} |"
            )
    return lines


def _differs(row: Row) -> bool:
    """Whether the paper leaves out a hundredth or more of what ``row`` spends on attention."""
    return row.mhsa_macs < SAME_COST * row.mhsa_full_macs


def _ordered(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.cell.method, STAGES.index(row.cell.stage), -row.cell.keep_rate))


def _verdict(confirmed: bool, refuted: bool) -> str:
    return "confirmed" if confirmed else "refuted" if refuted else "undecided"


if __name__ == "__main__":
    main()
