"""The table of the page: milliseconds and GMACs of one image, dense beside sparse."""

from __future__ import annotations

from dataclasses import dataclass

from ..report.contents import seconds
from .look import Cost, Look


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        label: what was counted or measured.
        dense: of the dense model, with its unit.
        sparse: of the sparse one.
        gain: dense over sparse.
    """

    label: str
    dense: str
    sparse: str
    gain: str


def cost_rows(cost: Cost) -> list[Row]:
    """Time of a forward pass, all MACs, and those of attention (scores, values, tail and predictor)."""
    if cost.timings is None:
        time = Row("time", "…", "…", "")
    else:
        timings = cost.timings
        time = Row("time", seconds(timings.dense_median), seconds(timings.sparse_median), f"{timings.speedup:.2f}x")
    return [
        time,
        _macs_row("GMACs, all", cost.dense.total_macs, cost.sparse.total_macs),
        _macs_row("GMACs, attention", cost.dense.mhsa_full_macs, cost.sparse.mhsa_full_macs),
    ]


def cost_note(look: Look, cost: Cost, rounds: int) -> str:
    """One sentence below the table: how often the time was taken, and what the model would do by itself."""
    done = 0 if cost.timings is None else len(cost.timings.dense)
    note = f"median of {done} runs in turn" if done == rounds else f"measuring, {done} of {rounds} runs"
    note += f"; cosine of final features {look.fidelity.patch_cosine:.4f}."
    if look.dense_by_itself:
        layers = f"{look.dense_by_itself} of {len(look.layers)} layers"
        note += f" By itself the model would run {layers} dense at this size: sparse does not pay here."
    return note


def _macs_row(label: str, dense: int, sparse: int) -> Row:
    return Row(label, f"{dense / 1e9:.2f}", f"{sparse / 1e9:.2f}", f"{dense / sparse:.2f}x")
