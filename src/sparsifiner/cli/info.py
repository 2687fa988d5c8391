"""``sparsifiner info``: what this machine has, which backend serves which operation, and why others do not."""

from __future__ import annotations

import json as jsonlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._utils import native_module
from .._utils.processor import processor_name

if TYPE_CHECKING:
    import torch

    from ..ops.registry import Operation

DTYPES = ("float32", "bfloat16", "float16")


def info(json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
    """Say which instruction sets and backends can run here, and why others cannot."""
    if json:
        print(jsonlib.dumps(gather_facts(), indent=2))
        return
    for line in machine_lines():
        print(line)
    print(flush=True)  # the rest needs torch, which takes seconds to import
    for line in backend_lines(gather_facts()):
        print(line)


def machine_lines() -> list[str]:
    """Versions, processor and CPU kernels: what is known without torch."""
    from .. import __version__

    kernels = native_module.describe()
    lines = [
        f"sparsifiner {__version__}, torch {_installed('torch')}, Python {platform.python_version()}",
        f"{processor_name()}, {os.cpu_count()} logical cores, {platform.system()} {platform.machine()}",
    ]
    if kernels["missing"]:
        return [*lines, f"CPU kernels: none: {kernels['missing']}"]
    others = ", ".join(level for level in kernels["levels"] if level != kernels["level"])
    lines.append(f"CPU kernels: {kernels['level']}{f'; this machine can run {others}, too' if others else ''}")
    return lines + [f"  not {level}: {reason}" for level, reason in kernels["missing_levels"].items()]


def backend_lines(facts: Mapping[str, Any]) -> list[str]:
    """A table of the backends by operation and precision for each device, and a line for each that does not serve."""
    threads = facts["machine"]["threads"]
    lines = [f"torch {facts['machine']['torch']} runs {threads} thread{'' if threads == 1 else 's'}"]
    for device, operations in facts["served"].items():
        lines += ["", f"On {device}, the backend that serves where none is asked for:", ""]
        lines += _table([("operation", *DTYPES), *((name, *row.values()) for name, row in operations.items())])
        lines += ["", "What the others do not serve, and why:", ""]
        refused = facts["refused"][device].items()
        lines += _table(
            (backend, "; ".join(f"{what}: {why}" for what, why in reasons.items())) for backend, reasons in refused
        )
    return lines


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]


def gather_facts() -> dict[str, Any]:
    """The same as plain JSON values."""
    import torch

    from .. import __version__
    from ..ops import OPERATIONS, choose_backend
    from ..report.machine import this_machine

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    choices, answers = [], {}
    with torch.inference_mode():
        for device in devices:
            for dtype in DTYPES:
                backend, reason = choose_backend(torch.empty(1, 1, 1, 64, dtype=getattr(torch, dtype), device=device))
                choices.append({"device": device.type, "dtype": dtype, "backend": backend, "reason": reason})
            answers[device.type] = {
                dtype: {name: _who_serves(operation, device, dtype) for name, operation in OPERATIONS.items()}
                for dtype in DTYPES
            }
    return {
        "sparsifiner": __version__,
        "machine": asdict(this_machine(torch.device("cpu"))),
        "native": native_module.describe(),
        "choices": choices,
        "operations": {device: found["float32"] for device, found in answers.items()},
        "served": {
            device: {name: {dtype: found[dtype][name]["backend"] for dtype in DTYPES} for name in OPERATIONS}
            for device, found in answers.items()
        },
        "refused": {device: _refusals(found) for device, found in answers.items()},
    }


def _refusals(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Of each backend: what it does not serve, in few words, and why."""
    places: dict[str, dict[str, list[tuple[str, str]]]] = {}
    operations = list(next(iter(found.values())))
    for dtype, answers in found.items():
        for name, answer in answers.items():
            for backend, reason in answer["others"].items():
                if reason == f"it has no kernel for {name}":
                    reason = "no kernel"
                places.setdefault(backend, {}).setdefault(reason, []).append((dtype, name))
    return {
        backend: {_words(where, list(found), operations): reason for reason, where in reasons.items()}
        for backend, reasons in places.items()
    }


def _words(places: Sequence[tuple[str, str]], dtypes: Sequence[str], operations: Sequence[str]) -> str:
    """``float16``, ``attend and topk``, ``anything``: pairs of a dtype and an operation."""
    names = [name for name in operations if any(place[1] == name for place in places)]
    which = [dtype for dtype in dtypes if any(place[0] == dtype for place in places)]
    others = [name for name in operations if name not in names]
    if not others:
        what = ""
    elif len(others) < len(names):
        what = f"anything but {', '.join(others)}"
    else:
        what = ", ".join(names)
    if len(which) == len(dtypes):
        return what or "anything"
    return f"{', '.join(which)}{f' ({what})' if what else ''}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _who_serves(operation: Operation, device: torch.device, dtype: str) -> dict[str, Any]:
    """The backend of an operation on tensors of a dtype, and why every other one does not serve it."""
    import torch

    from ..ops import backends, serving
    from ..ops.registry import refusal

    first = operation.arguments[0]
    sizes = (1, 1, 1, 1, 64) if first == "pooled" else (1, 1, 1, 64)  # all that backends ask about
    arguments = {first: torch.empty(sizes, dtype=getattr(torch, dtype), device=device)}
    chosen, _ = serving(operation, "auto", False, arguments)
    others = (name for name in backends() if name not in (chosen, "reference"))
    reasons = {name: refusal(operation, name, False, arguments) for name in others}
    return {"backend": chosen, "others": {name: reason for name, reason in reasons.items() if reason is not None}}
