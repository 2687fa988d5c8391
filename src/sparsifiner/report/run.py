"""Measure a model dense and sparse on images, for every size and keep rate asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .._utils.photos import Photos, Preparation, preprocess
from .._utils.progress import Progress
from ..attention.policy import check_fit
from ..config import SparsifinerConfig
from ..convert import conversion, densify, set_keep_rate, sparse_layers, sparsify
from ..errors import SparsifinerError
from ..geometry.patch_grid import check_size
from ..measure.crossover import NEVER_WITH_BIAS, BreakEven, break_even
from ..measure.fidelity import measure_fidelity
from ..measure.flops import FlopReport, count_flops
from ..measure.latency import compare_latency
from ..measure.memory import PeakMemory, measure_memory
from ..runtime import prepare
from .contents import Case, Fast, Report
from .fast import fast_preset
from .machine import this_machine
from .maps import attention_maps
from .pair import load_pair, own_size
from .pictures import draw_maps

TWICE_THE_SIDE = 4.0
"""Time at twice the side of the image by the time at the side itself, for a decision to start."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements.

    Args:
        model: ``builtin``, a timm name, or a folder of ``save_pretrained``.
        image_sizes: rows and columns in pixels; the model's own size where empty.
        keep_rates: the rates of ``config``, or of a saved sparse model, where empty.
        config: all other settings; the training-free default if None. A saved sparse model has its own.
        dtype: float32, bfloat16 or float16.
        device: where both models run.
        repeats: interleaved pairs of latency runs; 0 measures no latency and no break-even.
        max_seconds: no further latency pair, and no larger break-even size, is started after so long.
        max_tokens: bound of the break-even search.
        memory: whether to measure memory.
        pictures: how many images get a picture.
        fast: whether to measure the fast form of a float32 model on the CPU, where there is one keep rate.
        second_size: where no size is given and the model is no folder, measure twice its own as well, without pictures
            and memory, if that is expected to be done after so many seconds of the whole report; None for no second.
    """

    model: str = "builtin"
    image_sizes: tuple[tuple[int, int], ...] = ()
    keep_rates: tuple[float, ...] = ()
    config: SparsifinerConfig | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    repeats: int = 7
    max_seconds: float = 60.0
    max_tokens: int = 16384
    memory: bool = True
    pictures: int = 4
    fast: bool = False
    second_size: float | None = None


@dataclass
class _Collected:
    """Results that grow while the cases are measured."""

    cases: list[Case]
    notes: list[str]
    pictures: dict[str, bytes]
    break_even: dict[object, BreakEven | None]


def run_report(settings: Settings, photos: Photos, progress: Progress | None = None) -> Report:
    """Fidelity, FLOPs, latency, memory, density and pictures for each size and keep rate.

    A saved sparse model is compared with its own densified twin, any other model with its sparse version.

    Raises:
        ValueError: if the model is unknown or cannot be converted, or a size does not fit; nothing long has
            run by then.
    """
    notify = progress or (lambda stage, done, total: None)
    found = _Collected([], [], {}, {})
    start = time.monotonic()
    notify("loading the model", 0, 1)
    sizes: list[tuple[int, int] | None] = list(dict.fromkeys(settings.image_sizes)) or [None]
    dense, sparse = _load_pair(settings, sizes[0])
    _check_sizes(dense, sparse, settings.image_sizes)
    for number, size in enumerate(sizes):
        if number:
            dense, sparse = _load_pair(settings, size)
        notify("loading the model", 1, 1)
        _measure_size(settings, photos, dense, sparse, size or own_size(dense), found, notify)
    if not settings.image_sizes and settings.second_size is not None and not os.path.isdir(settings.model):
        _measure_second(settings, photos, dense, found, notify, start)
    found.notes += _notes(settings, photos, sparse)
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    return Report(
        model=settings.model,
        architecture=_architecture(dense),
        parameters=parameters,
        dtype=str(settings.dtype).removeprefix("torch."),
        machine=this_machine(settings.device),
        source=photos.source,
        images=[photo.name for photo in photos.photos],
        skipped=photos.skipped,
        converted=str(conversion(sparse)).splitlines(),
        cases=found.cases,
        notes=list(dict.fromkeys(found.notes)),
        pictures=found.pictures,
    )


def _measure_second(
    settings: Settings, photos: Photos, dense: nn.Module, found: _Collected, notify: Progress, start: float
) -> None:
    """Twice the model's own size, if there is time and the model takes it; a note says if not."""
    assert settings.second_size is not None
    rows, columns = own_size(dense)
    size, passed = (2 * rows, 2 * columns), time.monotonic() - start
    if passed * (1 + TWICE_THE_SIDE) > settings.second_size:
        found.notes.append(
            f"{size[0]} px were left out: the first size took {passed:.0f} s, and this one would take about "
            f"{TWICE_THE_SIDE * passed:.0f} s; ask for it with --img-size {rows},{size[0]}."
        )
        return
    smaller = replace(settings, pictures=0, memory=False, repeats=min(settings.repeats, 3))
    try:
        dense, sparse = _load_pair(settings, size)
        _check_sizes(dense, sparse, (size,))
    except SparsifinerError as error:
        found.notes.append(f"{size[0]} px were left out: {error}.")
        return
    _measure_size(smaller, photos, dense, sparse, size, found, notify)


def _measure_fast(
    settings: Settings, dense: nn.Module, sparse: nn.Module, images: Callable[[], Iterator[Tensor]], names: list[str],
    found: _Collected, notify: Progress, stage: str,
) -> Fast | None:  # fmt: skip
    """The fast form beside the dense float32 model; None where there is none, and a note says why."""
    layer = next(iter(sparse_layers(sparse).values()))
    preset = fast_preset(layer.config, layer.grid.shape)
    if isinstance(preset, str):
        found.notes.append(f"No fast form was measured: {preset}.")
        return None
    config, runtime = preset
    tile = "x".join(str(side) for side in config.query_tile)
    name = f"{runtime}, {tile} tiles"
    x = next(images())
    notify(f"{stage}: fast form", 0, 1)
    try:
        ready = prepare(sparsify(densify(sparse), config), runtime)
        ready.compile_for(x)
    except SparsifinerError as error:
        found.notes.append(f"No fast form was measured: {error}.")
        return None
    fidelity = measure_fidelity(dense, ready, images(), names)
    latency = None
    if settings.repeats:
        latency = compare_latency(dense, ready, x, repeats=settings.repeats, max_seconds=settings.max_seconds)
    notify(f"{stage}: fast form", 1, 1)
    return Fast(name, runtime.to_dict(), config.to_dict(), fidelity, latency)


def _measure_size(
    settings: Settings,
    photos: Photos,
    dense: nn.Module,
    sparse: nn.Module,
    size: tuple[int, int],
    found: _Collected,
    notify: Progress,
) -> None:
    """All keep rates at one image size; what concerns the dense model alone is measured once."""
    transform = preprocess(dense, size)
    label = f"{size[0]} px" if size[0] == size[1] else f"{size[0]}x{size[1]} px"

    def image(number: int) -> Tensor:
        return _tensor(settings, transform, photos.photos[number].image)

    x = image(0)
    notify(f"{label}: counting FLOPs", 0, 1)
    flops_dense = count_flops(dense, x)
    memory_dense = _memory(settings, dense, x, "dense", found, notify, label)
    rates: tuple[float | tuple[float, ...], ...] = tuple(dict.fromkeys(settings.keep_rates)) or (_rates_of(sparse),)
    for rate in rates:
        set_keep_rate(sparse, rate)
        stage = f"{label}, keep {rate:g}" if isinstance(rate, float) else label
        names = [photo.name for photo in photos.photos]

        fidelity = measure_fidelity(
            dense, sparse, _noting(image, len(names), partial(notify, f"{stage}: fidelity")), names
        )
        flops_sparse: FlopReport = count_flops(sparse, x)
        latency = None
        if settings.repeats:
            notify(f"{stage}: latency", 0, settings.repeats)
            latency = compare_latency(
                dense,
                sparse,
                x,
                repeats=settings.repeats,
                max_seconds=settings.max_seconds,
                progress=partial(notify, f"{stage}: latency"),
            )
            notify(f"{stage}: latency", settings.repeats, settings.repeats)
            if rate not in found.break_even:
                found.break_even[rate] = break_even(
                    sparse,
                    max_tokens=settings.max_tokens,
                    max_seconds=settings.max_seconds,
                    progress=partial(notify, f"{stage}: break-even"),
                )
                notify(f"{stage}: break-even", settings.max_tokens, settings.max_tokens)
        memory_sparse = _memory(settings, sparse, x, "sparse", found, notify, stage)
        pictures = []
        if any(layer.sparse for layer in flops_sparse.layers):
            pictures = _draw(settings, photos, dense, sparse, transform, stage, found, notify)
        fast = None
        if settings.fast and len(rates) == 1 and any(layer.sparse for layer in flops_sparse.layers):
            fast = _measure_fast(
                settings, dense, sparse, lambda: map(image, range(len(photos.photos))), names, found, notify, stage
            )  # fmt: skip
        layer = next(iter(sparse_layers(sparse).values()))
        found.cases.append(
            Case(
                image_size=size,
                grid=layer.grid.shape,
                num_tokens=flops_dense.layers[0].num_tokens,
                keep_rate=rate,
                config=layer.config.replace(keep_rate=rate).to_dict(),
                fidelity=fidelity,
                flops_dense=flops_dense,
                flops_sparse=flops_sparse,
                latency=latency,
                memory_dense=memory_dense,
                memory_sparse=memory_sparse,
                break_even=found.break_even.get(rate),
                pictures=pictures,
                fast=fast,
            )
        )


def _tensor(settings: Settings, transform: Preparation, image: Image) -> Tensor:
    """One photograph as a batch ``[1, channels, rows, columns]``."""
    return transform(image)[None].to(settings.device, settings.dtype)


def _noting(image: Callable[[int], Tensor], count: int, notify: Callable[[int, int], None]) -> Iterator[Tensor]:
    """The images one by one, telling how many are done."""
    for number in range(count):
        notify(number, count)
        yield image(number)
    notify(count, count)


def _memory(
    settings: Settings, model: nn.Module, x: Tensor, side: str, found: _Collected, notify: Progress, stage: str
) -> PeakMemory | None:
    if not settings.memory:
        return None
    notify(f"{stage}: memory ({side})", 0, 1)
    try:
        return measure_memory(model, x)
    except RuntimeError as error:
        found.notes.append(f"Memory of the {side} model was not measured: {error}.")
        return None
    finally:
        notify(f"{stage}: memory ({side})", 1, 1)


def _draw(
    settings: Settings,
    photos: Photos,
    dense: nn.Module,
    sparse: nn.Module,
    transform: Preparation,
    stage: str,
    found: _Collected,
    notify: Progress,
) -> list[str]:
    names, size = [], transform.size
    shown = photos.photos[: settings.pictures]
    rate = stage.partition("keep ")[2] or "own"
    for number, photo in enumerate(shown):
        notify(f"{stage}: pictures", number, len(shown))
        name = f"attention-{number + 1:02d}-{size[0]}x{size[1]}-keep-{rate}.png"
        maps = attention_maps(dense, sparse, _tensor(settings, transform, photo.image))
        seen = transform.crop(photo.image).convert("RGB")
        found.pictures[name] = draw_maps(seen, maps, title=f"{photo.name}, {stage}")
        names.append(name)
    if shown:
        notify(f"{stage}: pictures", len(shown), len(shown))
    return names


def _load_pair(settings: Settings, size: tuple[int, int] | None) -> tuple[nn.Module, nn.Module]:
    return load_pair(settings.model, size, settings.config, dtype=settings.dtype, device=settings.device)


def _check_sizes(dense: nn.Module, sparse: nn.Module, sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse sizes that patches do not divide or tiles do not fit, before anything long runs."""
    patch = _patch_size(dense)
    for size in sizes:
        check_size(size, patch)
        for layer in sparse_layers(sparse).values():
            check_fit((size[0] // patch[0], size[1] // patch[1]), layer.config)


def _rates_of(sparse: nn.Module) -> float | tuple[float, ...]:
    rates = tuple(layer.predictor.keep_rate for layer in sparse_layers(sparse).values())
    return rates[0] if len(set(rates)) == 1 else rates


def _notes(settings: Settings, photos: Photos, sparse: nn.Module) -> list[str]:
    notes = []
    note = next(iter(sparse_layers(sparse).values())).predictor.note
    if settings.config is not None and note:
        notes.append(note)
    if settings.repeats and next(iter(sparse_layers(sparse).values())).takes_bias:
        notes.append(f"No size from which sparse pays was looked for: {NEVER_WITH_BIAS}.")
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if settings.repeats and load > 1.5 * cores:
        notes.append(
            f"This machine was busy while the report was made (load {load:.1f} on {cores} cores): latencies are too "
            f"long and uncertain. Run it again on an idle machine before you rely on them."
        )
    if photos.skipped:
        listed = ", ".join(f"{name} ({reason})" for name, reason in photos.skipped.items())
        notes.append(f"{len(photos.skipped)} unreadable picture(s) skipped: {listed}.")
    return notes


def _architecture(model: nn.Module) -> str:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__


def _patch_size(model: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        raise SparsifinerError(f"{type(model).__name__} has no patch embedding; expected a Vision Transformer")
    return size if isinstance(size, tuple) else (size, size)
