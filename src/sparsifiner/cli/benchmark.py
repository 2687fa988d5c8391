"""``sparsifiner benchmark``: the operator, a whole model, and from which size sparse attention pays, measured here."""

from __future__ import annotations

import json as jsonlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
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

ROUNDS_AT_LEAST = 2
"""Rounds that a measurement must have time for, the one that warms up among them."""


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
        float, typer.Option(help="For all measurements together; what does not fit is left out and named.", min=1)
    ] = 100.0,
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

        save(parse_device(device), max_seconds=min(max_seconds, 30.0), json=json)
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
    from ..geometry.patch_grid import check_size
    from ..measure.crossover import NEVER_WITH_BIAS
    from ..ops import cpu
    from ..report.machine import this_machine

    base = SparsifinerConfig() if config is None else SparsifinerConfig.from_file(config)
    models = {size: _build(model, size) for size in sizes}
    for size, built in models.items():
        check_size(size, built.patch_embed.patch_size)
    stderr = Console(stderr=True)
    found: list[Measured] = []
    pays: dict[str, BreakEven | None] = {}
    jobs: list[Job] = []
    for count in counts:
        side = math.isqrt(count)
        for rate in rates:
            stage, weight = f"operator, {side * side} patches, keep {rate:g}", (count / 4096) ** 1.5
            jobs.append(Job(stage, "operator", weight, partial(
                _measure_operator, found, (side, side), base.replace(keep_rate=rate, mode="sparse", dense_below=None),
                repeats,
            )))  # fmt: skip
    for size, built in models.items():
        for name in dtypes:
            for rate in rates:
                weight = (size[0] * size[1] / 518**2) ** 1.2 * (4.0 if name == "float32" else 2.0) * batch
                settings: dict[str, Any] = dict(
                    title=model, batch=batch, dtype=getattr(torch, name), compiled=compile, repeats=repeats
                )
                jobs.append(Job(f"{model}, {size[0]}x{size[1]}, {name}, keep {rate:g}", "model", weight, partial(
                    _measure_model, found, built, base.replace(keep_rate=rate), size, settings,
                )))  # fmt: skip
    smallest = models[min(sizes)]
    for name in dtypes:
        for rate in rates:
            jobs.append(Job(f"break-even, {name}, keep {rate:g}", "break-even", 2.0, partial(
                _measure_break_even, pays, f"{name}, keep {rate:g}", smallest, base.replace(keep_rate=rate),
                getattr(torch, name), max_tokens,
            )))  # fmt: skip
    with progress_on(stderr) as notify:
        left_out = run_within(jobs, max_seconds, notify)
    machine = this_machine(torch.device("cpu"))
    facts: dict[str, Any] = {
        "sparsifiner": __version__,
        "machine": asdict(machine),
        "level": cpu.level(),
        "measured": [item.to_dict() for item in found],
        "left_out": left_out,
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
    if left_out:
        say(stdout, f"Left out, there was no time (--max-seconds {max_seconds:g}): {'; '.join(left_out)}")
    say(stdout, "A sparse model runs dense by itself where sparse is expected to be slower (mode=auto).")


@dataclass(frozen=True)
class Job:
    """A measurement: what it is, its kind, how long one round takes beside others of its kind, and what runs it.

    ``run`` takes the seconds it may take and a callback for progress.
    """

    stage: str
    kind: str
    weight: float
    run: Callable[[float, Callable[[int, int], None]], None]


def run_within(jobs: list[Job], max_seconds: float, notify: Callable[[str, int, int], None]) -> list[str]:
    """Run measurements in ``max_seconds`` together, each with a share by its weight.

    One that would not be done in time, going by those before it, is left out.

    Returns:
        What was left out.
    """
    start, left_out = time.monotonic(), []
    per_weight: dict[str, float] = {}  # by kind of measurement
    for number, job in enumerate(jobs):
        left = max_seconds - (time.monotonic() - start)
        if left <= ROUNDS_AT_LEAST * per_weight.get(job.kind, 0.0) * job.weight:
            left_out.append(job.stage)
            continue
        share = left * job.weight / sum(later.weight for later in jobs[number:])
        begun, rounds = time.monotonic(), 1

        def progress(done: int, total: int, stage: str = job.stage) -> None:
            nonlocal rounds
            rounds = max(rounds, done)
            notify(stage, done, total)

        job.run(share, progress)
        if job.kind == "break-even":  # keeps to its share by itself
            continue
        took = (time.monotonic() - begun) / (rounds + 1) / job.weight
        per_weight[job.kind] = max(per_weight.get(job.kind, 0.0), took)
    return left_out


def _measure_operator(
    found: list[Measured], grid: tuple[int, int], config: Any, repeats: int, seconds: float, progress: Any
) -> None:
    from ..measure.benchmark import measure_operator

    found += measure_operator(
        grid, config, repeats=repeats, max_seconds=seconds / 2, min_repeats=1, progress=progress
    )  # fmt: skip


def _measure_model(
    found: list[Measured], dense: Any, config: Any, size: tuple[int, int], settings: dict[str, Any], seconds: float,
    progress: Any,
) -> None:  # fmt: skip
    from ..measure.benchmark import measure_model

    found.append(
        measure_model(
            dense, {"sparse": config}, size, **settings, max_seconds=seconds, min_repeats=1, progress=progress
        )
    )


def _measure_break_even(
    pays: dict[str, BreakEven | None], name: str, dense: Any, config: Any, dtype: Any, max_tokens: int, seconds: float,
    progress: Any,
) -> None:  # fmt: skip
    from ..convert import sparsify
    from ..measure.crossover import break_even

    pays[name] = break_even(
        sparsify(dense, config).to(dtype), max_tokens=max_tokens, max_seconds=seconds, progress=progress
    )


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
