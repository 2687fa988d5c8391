"""Rows of a sweep on disk: JSON that a sweep goes on from, and a table as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._utils.files import make_folder, write_together
from .._utils.messages import one_line
from .._utils.reading import read_json
from ..errors import SparsifinerError
from .cell import DENSE, Cell, Row

RESULTS = "pareto.json"
TABLE = "pareto.csv"
DIGESTS = {
    "model_digest": "another model: its weights or its normalisation differ",
    "validation_digest": "other validation images",
}
"""Parts of a sweep that are kept as a digest, with the meaning of a difference."""


def load_rows(folder: Path, common: dict[str, Any] | None = None) -> dict[Cell, Row]:
    """The rows in ``folder``, none if it holds no sweep.

    Args:
        folder: where :func:`save_rows` wrote.
        common: what the sweep to go on with has in common for all rows; not compared if None.

    Raises:
        ValueError: if the file cannot be read, or holds a sweep of other settings.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        rows = [Row.from_dict(values) for values in content["rows"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise SparsifinerError(
            f"{path} is no readable sweep ({one_line(error)}); name another folder with --output"
        ) from error
    for name, wanted in (common or {}).items() if rows else ():
        if name not in content:
            found = f"a sweep of an older version, which did not record {name}, so nothing can be added to it"
        elif content[name] == wanted:
            continue
        elif name in DIGESTS:
            found = f"a sweep of {DIGESTS[name]}"
        else:
            found = f"a sweep with another {name}: {_short(content[name])} instead of {_short(wanted)}"
        raise SparsifinerError(f"{path} holds {found}; name another folder with --output")
    return {row.cell: row for row in rows}


def save_rows(folder: Path, common: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write ``pareto.json`` and ``pareto.csv``, both or none.

    Raises:
        OSError: if they cannot be written; what they held is still there.
    """
    make_folder(folder)
    rows = list(rows)
    content = {**common, "rows": [row.to_dict() for row in rows]}
    text = io.StringIO()
    table = csv.DictWriter(text, list(table_row(rows[0], rows)), lineterminator="\n")
    table.writeheader()
    table.writerows(table_row(row, rows) for row in rows)
    write_together({folder / RESULTS: json.dumps(content, indent=1) + "\n", folder / TABLE: text.getvalue()})


def table_row(row: Row, rows: Iterable[Row]) -> dict[str, Any]:
    """One line of the table; drops are against the dense model on the same images, shares in percent."""
    dense = next((other for other in rows if other.cell == DENSE and other.images), row)
    drop, (low, high) = row.drop_from(dense)
    top1_low, top1_high = row.interval
    return {
        "method": row.cell.method,
        "keep_rate": row.cell.keep_rate,
        "stage": row.cell.stage,
        "images": row.images,
        "top1": _percent(row.top1),
        "top1_low": _percent(top1_low),
        "top1_high": _percent(top1_high),
        "drop": _percent(drop),
        "drop_low": _percent(low),
        "drop_high": _percent(high),
        "mhsa_mmacs": round(row.mhsa_macs / 1e6, 2),
        "mhsa_full_mmacs": round(row.mhsa_full_macs / 1e6, 2),
        "mhsa_saved": _percent(1 - row.mhsa_macs / dense.mhsa_macs) if dense.mhsa_macs else "",
        "mhsa_full_saved": _percent(1 - row.mhsa_full_macs / dense.mhsa_full_macs) if dense.mhsa_full_macs else "",
        "total_gmacs": round(row.total_macs / 1e9, 4),
        "ms": "" if row.ms is None else round(row.ms, 3),
        "dense_ms": "" if row.dense_ms is None else round(row.dense_ms, 3),
        "fit_seconds": round(row.seconds),
        "note": row.note,
    }


def _percent(share: float) -> float:
    return round(100 * share, 3)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
