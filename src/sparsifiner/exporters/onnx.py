"""ONNX files in standard operators, which ONNX Runtime, TensorRT and OpenVINO read without extensions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .program import standard_program
from .registry import Exporter, Run, register_exporter

OPSET = 20
INPUT = "images"


def write(model: nn.Module, x: Tensor, path: Path, any_batch: bool) -> None:
    """Write ``model`` for images like ``x``; weights of more than 2 GB lie beside the file."""
    program = standard_program(model, x, any_batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        written: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=OPSET, input_names=[INPUT], optimize=True
        )
    for value in [*written.model.graph.inputs, *written.model.graph.outputs] if any_batch else ():
        value.shape[0] = "batch"
    written.save(path)


def load(path: Path, threads: int | None = None) -> Run:
    """The model in ONNX Runtime, on the CPU, with as many threads as PyTorch has if None."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in session.run(None, {name: x.numpy()})]

    return run


def companions(path: Path) -> Sequence[Path]:
    """The file of the weights, where there is one."""
    return [path.with_name(f"{path.name}.data")]


register_exporter(
    Exporter(
        "onnx",
        "ONNX",
        suffixes=(".onnx",),
        needs=("onnx", "onnxscript", "onnxruntime"),
        write=write,
        load=load,
        companions=companions,
    )
)
