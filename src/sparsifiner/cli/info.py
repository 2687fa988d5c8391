"""``sparsifiner info``: what this machine has, which backend would run, and why others would not."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from ..ops.registry import Operation


def info(json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
    """Say which instruction sets and backends can run here, and why others cannot."""
    facts = gather_facts()
    if json:
        print(jsonlib.dumps(facts, indent=2))
        return
    machine, kernels = facts["machine"], facts["native"]
    print(f"sparsifiner {facts['sparsifiner']}, torch {machine['torch']}, {machine['processor']}")
    print(f"torch runs {machine['threads']} threads")
    if kernels["missing"]:
        print(f"native kernels: no: {kernels['missing']}")
    else:
        print(f"native kernels: {kernels['level']} (this machine can run {', '.join(kernels['levels'])})")
        for level, reason in kernels["missing_levels"].items():
            print(f"not {level}: {reason}")
    for choice in facts["choices"]:
        print(f"auto, {choice['device']}, {choice['dtype']}: {choice['backend']}: {choice['reason']}")
    for device, operations in facts["operations"].items():
        served: dict[str, list[str]] = {}
        refused: dict[str, list[str]] = {}
        for name, answer in operations.items():
            served.setdefault(answer["backend"], []).append(name)
            for backend, reason in answer["others"].items():
                refused.setdefault(f"not {backend}: {reason}", []).append(name)
        print(f"operations on {device}, float32:")
        for line, names in {**served, **refused}.items():
            print(f"  {line}: {', '.join(names)}")


def gather_facts() -> dict[str, Any]:
    """The same as plain JSON values."""
    import torch

    from .. import __version__
    from ..ops import OPERATIONS, choose_backend, cpu
    from ..report.machine import this_machine

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    choices = []
    with torch.inference_mode():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                backend, reason = choose_backend(torch.empty(1, 1, 1, 64, dtype=dtype, device=device))
                name = str(dtype).removeprefix("torch.")
                choices.append({"device": device.type, "dtype": name, "backend": backend, "reason": reason})
        operations = {
            device.type: {name: _who_serves(operation, device) for name, operation in OPERATIONS.items()}
            for device in devices
        }
    return {
        "sparsifiner": __version__,
        "machine": asdict(this_machine(torch.device("cpu"))),
        "native": {
            "level": cpu.level(),
            "levels": cpu.levels(),
            "missing_levels": cpu.missing_levels(),
            "missing": cpu.why_missing(),
        },
        "choices": choices,
        "operations": operations,
    }


def _who_serves(operation: Operation, device: torch.device) -> dict[str, Any]:
    """The backend of an operation on float32 tensors, and why every other one does not serve it."""
    import torch

    from ..ops import backends, serving
    from ..ops.registry import refusal

    first = operation.arguments[0]
    sizes = (1, 1, 1, 1, 64) if first == "pooled" else (1, 1, 1, 64)  # all that backends ask about
    arguments = {first: torch.empty(sizes, device=device)}
    chosen, _ = serving(operation, "auto", False, arguments)
    others = (name for name in backends() if name not in (chosen, "reference"))
    reasons = {name: refusal(operation, name, False, arguments) for name in others}
    return {"backend": chosen, "others": {name: reason for name, reason in reasons.items() if reason is not None}}
