"""What the scripts that read a finished sweep of ``sparsifiner pareto`` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsifiner.evaluation import Cell, Row
from sparsifiner.evaluation.cell import DENSE
from sparsifiner.evaluation.results import load_rows


def read_arguments(description: str | None) -> tuple[list[Row], Row]:
    """The rows of the folder named on the command line, and the dense row that ``--against`` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of sparsifiner pareto")
    parser.add_argument(
        "--against", choices=("training-free", "fine-tuned"), default=DENSE.stage,
        help="the dense model as it is, or fine-tuned by the same steps where the sweep has it",
    )  # fmt: skip
    arguments = parser.parse_args()
    rows = load_rows(arguments.folder)
    dense = rows.get(Cell(DENSE.method, DENSE.keep_rate, arguments.against))
    if dense is None:
        raise SystemExit(f"the sweep holds no {arguments.against} dense row")
    return list(rows.values()), dense


def points(value: float, interval: tuple[float, float], digits: int) -> str:
    """A difference of shares in percentage points, with its interval."""
    low, high = interval
    return f"{100 * value:+.{digits}f} [{100 * low:+.{digits}f}, {100 * high:+.{digits}f}]"


def saved(row: Row, dense: Row) -> float:
    """Share of attention's multiply-adds that ``row`` does not spend, as the paper counts its predictor."""
    return 1 - row.mhsa_macs / dense.mhsa_macs


def saved_text(row: Row, dense: Row, digits: int = 0) -> str:
    """:func:`saved`, and behind it the share with every product of the predictor where that is another."""
    as_published = f"{saved(row, dense):.{digits}%}"
    in_full = f"{1 - row.mhsa_full_macs / dense.mhsa_full_macs:.{digits}%}"
    return as_published if in_full == as_published else f"{as_published} ({in_full} in full)"
