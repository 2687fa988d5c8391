"""The report's main table as plain text cells; the printed table and the page show the same."""

from __future__ import annotations

from dataclasses import dataclass

from ..measure.flops import FlopReport
from .contents import Case, Fast, seconds


@dataclass(frozen=True)
class Row:
    """One line: its group, its name, the dense cell, a cell per case, whose second part is its ratio, and the cell of
    the only case's fast form."""

    group: str
    name: str
    dense: str
    sparse: list[tuple[str, str]]
    fast: str = ""


def table_rows(cases: list[Case]) -> list[Row]:
    """The lines for the cases of one image size."""
    rows: list[Row] = []
    fast = fast_of(cases)

    def add(group: str, name: str, dense: str, sparse: list[tuple[str, str]], quick: str = "") -> None:
        rows.append(Row(group, name, dense, sparse, quick))

    for term, name in (("patch", "patches"), ("class", "class token")):
        if cases[0].fidelity.mean(f"{term}_cosine") is None:
            add("Final features, sparse to dense", name, "", [("no class token", "") for _ in cases])
            continue
        for kind, words in (("l2", "relative L2"), ("cosine", "cosine")):
            cells = [
                (f"{case.fidelity.mean(f'{term}_{kind}'):.4f}", f"worst {case.fidelity.worst(f'{term}_{kind}'):.4f}")
                for case in cases
            ]
            quick = "" if fast is None else f"{fast.fidelity.mean(f'{term}_{kind}'):.4f}"
            add("Final features, sparse to dense", f"{name}, {words}", "", cells, quick)
    dense = cases[0].flops_dense
    flops = (
        ("projections (qkv, out)", lambda f: f.projection_macs),
        ("attention (kept keys, tail)", lambda f: f.attention_macs + f.tail_macs),
        ("predictor", lambda f: f.predictor_macs),
        ("MLP", lambda f: f.mlp_macs),
        ("embedding, head", lambda f: f.patch_embed + f.other),
        ("total", lambda f: f.total_macs),
        ("MHSA as the paper counts", lambda f: f.mhsa_macs),
    )
    for name, value in flops:
        cells = [(macs(value(case.flops_sparse)), ratio(value(case.flops_sparse), value(dense))) for case in cases]
        add("MACs per image", name, macs(value(dense)), cells)
    if cases[0].latency is not None:
        # Every case was measured beside its own dense runs; the dense column shows their median case.
        medians = sorted(case.latency.dense_median for case in cases if case.latency is not None)
        cells = [
            (seconds(case.latency.sparse_median), ratio(case.latency.sparse_median, case.latency.dense_median))
            for case in cases
            if case.latency is not None
        ]
        timed = None if fast is None else fast.latency
        quick = "" if timed is None else seconds(timed.sparse_median)
        add("Latency, batch 1", "median, interleaved", seconds(medians[len(medians) // 2]), cells, quick)
        faster = [(f"{case.latency.speedup:.2f}x", "") for case in cases if case.latency is not None]
        quick = "" if timed is None else f"{timed.speedup:.2f}x"
        add("Latency, batch 1", "speed-up over dense", "1.00x", faster, quick)
    memory = cases[0].memory_dense
    if memory is not None or any(case.memory_sparse is not None for case in cases):
        cells = []
        for case in cases:
            sparse = case.memory_sparse
            if sparse is None:
                cells.append(("not measured", ""))
            else:
                of = "" if memory is None else ratio(sparse.forward_bytes, memory.forward_bytes)
                cells.append((size(sparse.forward_bytes), of))
        add("Peak memory", "forward pass", "not measured" if memory is None else size(memory.forward_bytes), cells)
    add("Query-key pairs kept", "density per layer", "100 %", [(density_text(case), "") for case in cases])
    return rows


def fast_of(cases: list[Case]) -> Fast | None:
    """The fast form that the table of these cases has a column for: the only case's."""
    return cases[0].fast if len(cases) == 1 else None


def density_text(case: Case) -> str:
    """``10.1 %`` where all layers agree, otherwise the range over the layers."""
    values = [value * 100 for value in case.fidelity.density.values()]
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low} %" if low == high else f"{low} - {high} %"


def layer_rows(case: Case) -> list[tuple[str, list[str]]]:
    """Per layer: its name, and the cells density, projections, attention, tail, predictor, MLP."""
    return [
        (
            layer.name,
            [
                f"{case.fidelity.density.get(layer.name, 1.0) * 100:.1f} %",
                *(macs(value) for value in (layer.projections, layer.attention, layer.tail)),
                macs(layer.predictor_macs),
                macs(layer.mlp),
            ],
        )
        for layer in case.flops_sparse.layers
    ]


def macs(count: float) -> str:
    """``1.23 G`` or ``45.6 M``; a dash for none."""
    if not count:
        return "-"
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def size(count: float) -> str:
    """``123 MiB`` or ``1.23 GiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def ratio(value: float, reference: float) -> str:
    """``x0.52``, or nothing where there is nothing to compare with."""
    if not reference:
        return ""
    factor = value / reference
    return f"x{factor:.2f}" if factor < 10 else f"x{factor:.0f}"


def macs_share(flops: FlopReport) -> list[tuple[str, float]]:
    """Shares of the total, for the page's bars."""
    parts = {
        "projections": flops.projection_macs,
        "attention": flops.attention_macs + flops.tail_macs,
        "predictor": flops.predictor_macs,
        "MLP": flops.mlp_macs,
        "embedding, head": flops.patch_embed + flops.other,
    }
    return [(name, count) for name, count in parts.items() if count]
