"""``sparsifiner info``: what this machine has, which backend would run, and why others would not."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated, Any

import typer


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


def gather_facts() -> dict[str, Any]:
    """The same as plain JSON values."""
    import torch

    from .. import __version__
    from ..ops import choose_backend, cpu
    from ..report.contents import this_machine

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    choices = []
    with torch.inference_mode():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                backend, reason = choose_backend(torch.empty(1, 1, 1, 64, dtype=dtype, device=device))
                name = str(dtype).removeprefix("torch.")
                choices.append({"device": device.type, "dtype": name, "backend": backend, "reason": reason})
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
    }
