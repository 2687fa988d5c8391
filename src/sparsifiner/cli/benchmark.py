"""``sparsifiner benchmark``: the operator, a whole model, and from which size sparse attention pays, measured here."""

from __future__ import annotations

import json as jsonlib
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SparsifinerError
from .arguments import check_dtype, check_files, parse_device, parse_keep_rates, parse_sizes
from .console import output_console, say
from .options import ConfigFile, Json, KeepRates, MaxTokens

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.benchmark import Measured
    from ..measure.crossover import BreakEven


def benchmark(
    model: Annotated[
        str, typer.Option(help="builtin, or a timm model name (random weights; only time is measured).")
    ] = "builtin",
    img_size: Annotated[str, typer.Option(help="Pixels of the whole model's images, such as 518,1036.")] = "518,1036",
    tokens: Annotated[str, typer.Option(help="Token counts of the operator, such as 1024,4096.")] = "1024,4096",
    keep_rate: KeepRates = "0.05,0.1,0.25",
    config: ConfigFile = None,
    batch: Annotated[int, typer.Option(help="Images at once, for the whole model.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="Of the whole model: float32, bfloat16, or both.")] = "float32,bfloat16",
    compile: Annotated[bool, typer.Option(help="Measure the whole model under torch.compile, too.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 7,
    max_seconds: Annotated[
        float, typer.Option(help="Start no further round of one measurement after so many seconds.", min=1)
    ] = 30.0,
    max_tokens: MaxTokens = 4096,
    save_profile: Annotated[
        bool, typer.Option(help="Instead of all this measure, once, what models with mode=auto decide by.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of the profile: cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Measure sparse beside dense attention, interleaved in one process: medians, ratios, and where sparse pays."""
    if save_profile:
        from .profile import save_profile as save

        save(parse_device(device), max_seconds=max_seconds, json=json)
        return
    rates, sizes, counts = parse_keep_rates(keep_rate), parse_sizes(img_size), _parse_counts(tokens)
    dtypes = list(dict.fromkeys(name.strip() for name in dtype.split(",")))
    for name in dtypes:
        check_dtype(name)
    check_files(config=config)

    import torch
    from rich.console import Console

    from .. import __version__
    from .._utils.progress import progress_on
    from ..config import SparsifinerConfig
    from ..convert import sparsify
    from ..geometry.patch_grid import check_size
    from ..measure.benchmark import measure_model, measure_operator
    from ..measure.crossover import NEVER_WITH_BIAS, break_even
    from ..ops import cpu
    from ..report.machine import this_machine

    base = SparsifinerConfig() if config is None else SparsifinerConfig.from_file(config)
    models = {size: _build(model, size) for size in sizes}
    for size, built in models.items():
        check_size(size, built.patch_embed.patch_size)
    stderr = Console(stderr=True)
    found: list[Measured] = []
    pays: dict[str, BreakEven | None] = {}
    with progress_on(stderr) as notify:
        for count in counts:
            side = math.isqrt(count)
            for rate in rates:
                stage = f"operator, {side * side} patches, keep {rate:g}"
                settings = base.replace(keep_rate=rate, mode="sparse", dense_below=None)
                found += measure_operator(
                    (side, side),
                    settings,
                    repeats=repeats,
                    max_seconds=max_seconds,
                    progress=lambda done, total, stage=stage: notify(stage, done, total),  # type: ignore[misc]
                )
        for size, built in models.items():
            for name in dtypes:
                for rate in rates:
                    stage = f"{model}, {size[0]}x{size[1]}, {name}, keep {rate:g}"
                    found.append(
                        measure_model(
                            built,
                            {"sparse": base.replace(keep_rate=rate)},
                            size,
                            title=model,
                            batch=batch,
                            dtype=getattr(torch, name),
                            compiled=compile,
                            repeats=repeats,
                            max_seconds=max_seconds,
                            progress=lambda done, total, stage=stage: notify(stage, done, total),  # type: ignore[misc]
                        )
                    )
        smallest = models[min(sizes)]
        for name in dtypes:
            for rate in rates:
                stage = f"break-even, {name}, keep {rate:g}"
                sparse = sparsify(smallest, base.replace(keep_rate=rate)).to(getattr(torch, name))
                pays[f"{name}, keep {rate:g}"] = break_even(
                    sparse,
                    max_tokens=max_tokens,
                    max_seconds=max_seconds,
                    progress=lambda done, total, stage=stage: notify(stage, done, total),  # type: ignore[misc]
                )
    machine = this_machine(torch.device("cpu"))
    facts: dict[str, Any] = {
        "sparsifiner": __version__,
        "machine": asdict(machine),
        "level": cpu.level(),
        "measured": [item.to_dict() for item in found],
        "break_even": {name: item and item.to_dict() for name, item in pays.items()},
    }
    if json:
        print(jsonlib.dumps(facts, indent=2))
        return
    stdout = output_console()
    level = cpu.level() or f"no native kernels ({cpu.why_missing()})"
    say(stdout, f"{machine.processor}, {machine.threads} threads, torch {machine.torch}, {level}")
    print_measured(found, stdout)
    for name, item in pays.items():
        say(stdout, f"{name}: {item or f'not measured: {NEVER_WITH_BIAS}'}")
    say(stdout, "A sparse model runs dense by itself where sparse is expected to be slower (mode=auto).")


def print_measured(found: list[Measured], console: Console) -> None:
    """One block per measurement: milliseconds and the ratio to dense."""
    from rich import box
    from rich.table import Table

    for item in found:
        table = Table(title=item.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("median", justify="right")
        table.add_column("against dense", justify="right")
        for name in item.seconds:
            table.add_row(name, f"{item.median(name) * 1e3:.2f} ms", f"{item.speedup(name):.2f}x")
        console.print(table)


def _build(model: str, size: tuple[int, int]) -> Any:
    import timm

    from .._utils.trust import create_model
    from ..models import load_model

    if model == "builtin" or not timm.is_model(model):
        return load_model(model, img_size=size)  # a folder; or nothing, and near matches are named
    return create_model(model, img_size=size, num_classes=0).eval()


def _parse_counts(text: str) -> list[int]:
    """``"1024,4096"`` as whole numbers, those of square grids."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 64 or max(counts) > 2**20:
        raise SparsifinerError(
            f"--tokens {text!r} must be whole numbers of at least 64, at most {2**20}, such as 1024,4096"
        )
    sides = dict.fromkeys(math.isqrt(count) for count in counts)  # each square grid once
    return [side * side for side in sides]
