"""Every writer of the library, each on something small."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy
import timm
import torch
from conftest import TINY

from sparsifiner import SparsifinerConfig, save_pretrained, sparsify
from sparsifiner.calibration.state import State
from sparsifiner.evaluation.cell import DENSE, Cell, Row
from sparsifiner.evaluation.figure import draw_pareto
from sparsifiner.evaluation.results import save_rows
from sparsifiner.exporters.run import EXPORTERS, _keep
from sparsifiner.extraction.shards import FORMATS, write_shard
from sparsifiner.report.contents import Report
from sparsifiner.report.html import write_report
from sparsifiner.report.machine import Machine
from sparsifiner.training.checkpoint import Checkpoint, save_checkpoint
from sparsifiner.training.student import save_model


def save_sparse(folder: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    save_pretrained(sparsify(model, SparsifinerConfig(mode="sparse", query_tile=(2, 2))), folder)


def save_dense(folder: Path) -> None:
    save_model(timm.create_model("vit_tiny_patch16_224", **TINY).eval(), folder)


def save_state(folder: Path) -> None:
    state = State(folder / "state", "test")
    state.tensors["x"] = torch.zeros(3)
    state.save()


def save_training(folder: Path) -> None:
    save_checkpoint(Checkpoint(recipe={}, phase=0, update=1, student={}), folder)


def rows() -> list[Row]:
    dense = Row(DENSE, hits=[True, False], mhsa_macs=5, mhsa_full_macs=5, total_macs=9, ms=1.0, dense_ms=1.0)
    return [dense, Row(Cell("local", 0.5), hits=[True, True], mhsa_full_macs=3, ms=0.5, dense_ms=1.0)]


def save_report(folder: Path) -> None:
    machine = Machine("none", "cpu", 1, "none", "3", "2")
    report = Report(
        model="m", architecture="a", parameters=1, dtype="float32", machine=machine, source="s", images=["i"],
        skipped={}, converted=[], cases=[], notes=[], pictures={"one.png": b"x" * 5000},
    )  # fmt: skip
    with patch("sparsifiner.report.html.render_html", return_value="<html></html>"):  # which needs measurements
        write_report(report, folder)


def save_export(folder: Path) -> None:
    _keep(EXPORTERS["onnx"], Path(__file__), folder / "model.onnx")  # whatever the exporter has written


def save_features(folder: Path) -> None:
    write_shard(folder, 0, FORMATS["safetensors"], ["image.jpg"], {"class": numpy.zeros((1, 3), "float32")}, {})


WRITERS = {
    "save_pretrained": (save_sparse, ("model.safetensors", "sparsifiner.json")),
    "save_model": (save_dense, ("model.safetensors", "config.json")),
    "calibration state": (save_state, ("state",)),
    "training checkpoint": (save_training, ("checkpoint.pt",)),
    "sweep": (lambda folder: save_rows(folder, {}, rows()), ("pareto.json", "pareto.csv")),
    "report": (save_report, ("report.html", "report.json", "one.png")),
    "export": (save_export, ("model.onnx",)),
    "features": (save_features, ("features-000000.json", "features-000000.safetensors")),
    "figures": (lambda folder: draw_pareto(rows(), folder), ("pareto-macs.png", "pareto-ms.png")),
}
