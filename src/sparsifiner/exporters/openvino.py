"""OpenVINO's own files, by way of ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import onnx
from .registry import Exporter, Run, register_exporter


def write(model: nn.Module, x: Tensor, path: Path, any_batch: bool) -> None:
    """Write ``model`` for images like ``x`` in float32; the weights lie beside the file, in ``.bin``."""
    import openvino

    with tempfile.TemporaryDirectory(prefix="sparsifiner-") as folder:
        graph = Path(folder, "model.onnx")
        onnx.write(model, x, graph, any_batch)
        openvino.save_model(openvino.convert_model(graph), path, compress_to_fp16=False)


def load(path: Path, **properties: Any) -> Run:
    """The model in OpenVINO on the CPU, in float32 unless ``properties`` say otherwise."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), **properties}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(x: Tensor) -> list[Tensor]:
        found = compiled(x.numpy())
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run


def companions(path: Path) -> Sequence[Path]:
    """The file of the weights."""
    return [path.with_suffix(".bin")]


register_exporter(
    Exporter(
        "openvino",
        "OpenVINO",
        suffixes=(".xml",),
        needs=("openvino", "onnx", "onnxscript"),
        write=write,
        load=load,
        companions=companions,
    )
)
