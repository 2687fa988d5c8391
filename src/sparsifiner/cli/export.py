"""``sparsifiner export``: a model as a file for ONNX Runtime, OpenVINO or PyTorch without Python's overhead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import check_files, parse_keep_rates, parse_one_size
from .console import say
from .options import ConfigFile, ImageSize

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}


def export(
    model: Annotated[
        str, typer.Argument(help="builtin, a timm model name, or a folder of save_pretrained.", metavar="MODEL")
    ],
    to: Annotated[str | None, typer.Option(help="onnx, openvino or torch; by --output's suffix if left out.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file; model.onnx, model.xml or model.pt2 by default.")
    ] = None,
    img_size: ImageSize = None,
    keep_rate: Annotated[float | None, typer.Option(help="Share of keys to keep; 0.1 by default.")] = None,
    config: ConfigFile = None,
    dense: Annotated[bool, typer.Option("--dense", help="Export a dense model as it is, to compare with.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images in a batch; any number by default.", min=1)] = None,
) -> None:
    """Write a model as a file for another runtime, run it there, and keep it if it computes the same."""
    from ..errors import SparsifinerError

    size = parse_one_size(img_size, "export")
    check_files(config=config)
    if to is not None and to not in SUFFIXES:
        raise SparsifinerError(f"format {to!r} is unknown; choose {', '.join(SUFFIXES)}")
    if to is None and output is None:
        raise SparsifinerError("name a format with --to (onnx, openvino or torch), or a file with --output")
    rates = parse_keep_rates(None if keep_rate is None else str(keep_rate))
    path = Path(f"model{SUFFIXES[str(to)]}") if output is None else output

    from rich.console import Console

    from .._utils.files import check_file_writable
    from ..config import SparsifinerConfig
    from ..convert import is_sparse, set_keep_rate, sparsify
    from ..exporters import export as write
    from ..exporters.registry import exporter_for
    from ..models import load_model

    check_file_writable(path)
    exporter_for(path, to).check_installed()
    loaded = load_model(model, img_size=size)
    if is_sparse(loaded):
        if dense or config is not None:
            raise SparsifinerError(
                "the model is sparse already and has settings of its own; leave out --config, --dense"
            )
        if rates:
            set_keep_rate(loaded, rates[0])
    elif not dense:
        settings = None if config is None else SparsifinerConfig.from_file(config)
        loaded = sparsify(loaded, settings, keep_rate=rates[0] if rates else None, inplace=True)
    say(Console(), str(write(loaded, path, to=to, image_size=size, batch_size=batch_size)))
