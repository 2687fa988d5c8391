"""A model on labelled images: accuracy, FLOPs and speed, beside its dense twin."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._utils.copying import copy_model
from .._utils.photos import input_channels
from .._utils.progress import Progress
from ..config import SparsifinerConfig
from ..convert import always_sparse, find_sparse_layers, is_sparse, set_keep_rate, sparsify
from ..errors import SparsifinerError
from ..measure import compare_latency, count_flops
from ..measure.accuracy import Accuracy, count_correct
from ..models import load_model
from ..reduction import baseline_settings
from ..reduction.pruning import is_pruned, token_pruning
from ..saving import is_converted
from ..training.data import Samples, validation_loader, validation_transform
from ..training.recipe import DataConfig
from ..training.sources import open_validation
from ..training.student import dense_twin


@dataclass(frozen=True)
class ValidationRow:
    """One model.

    Args:
        name: what it is: ``dense``, ``keep 0.1``, ``pruned 0.7, keep 0.1``, ``linformer``.
        accuracy: on the validation images.
        total_macs: multiply-adds per image, all of it.
        mhsa_macs: those of attention without its projections, as the paper counts.
        images_per_second: on one batch, median of runs that alternate with the first row's; None if not measured.
        speed_up: over the first row, by these runs of both, so that the machine's drift does not show; None for itself.
    """

    name: str
    accuracy: Accuracy
    total_macs: int
    mhsa_macs: int
    images_per_second: float | None
    speed_up: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "accuracy"}
        return {**own, **self.accuracy.to_dict()}


@dataclass(frozen=True)
class Validation:
    """One model, beside its dense twin where it has one.

    Args:
        model: its name or folder, or its class.
        rows: the dense one first, if there is one.
        img_size: rows and columns in pixels.
        batch_size: of the speed measurement.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        broken: name and reason of images that could not be read.
    """

    model: str
    rows: list[ValidationRow]
    img_size: tuple[int, int]
    batch_size: int
    dtype: str
    broken: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "img_size": list(self.img_size),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "rows": [row.to_dict() for row in self.rows],
            "broken": self.broken,
        }


def validate(
    model: str | nn.Module,
    data: DataConfig,
    *,
    config: SparsifinerConfig | None = None,
    keep_rates: tuple[float, ...] = (),
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    progress: Progress | None = None,
) -> Validation:
    """Classify the validation images with the dense model and with the converted one, at each keep rate if it has them.

    A dense model is made sparse. One that is sparse, pruned or both is measured as it is, beside its dense twin of the
    same weights; a baseline (Linformer, token merging) has no such twin and is measured alone.

    Sparse attention is sparse at every size here, also where the model by itself would attend densely because that is
    faster (``SparsifinerConfig.mode``).

    Args:
        model: ``builtin``, a timm name, a folder ``train`` or ``save_pretrained`` wrote, or a model, which is copied.
        data: where the images are; ``val_split`` and ``val_limit`` count.
        config: sparse settings for a dense model; the training-free default if None.
        keep_rates: one sparse row each; the settings' own if empty.
        batch_size: images per forward pass; no more than there are.
        dtype: of weights and images.
        device: where to run.
        repeats: interleaved speed measurements; 0 for none.
        progress: told what is being done.

    Raises:
        ValueError: in one line, if model and data do not fit, there is no readable labelled image, ``config`` is given
            for a converted model, or ``keep_rates`` for one without sparse layers that have a keep rate.
    """
    notify = progress or (lambda stage, done, total: None)
    device = torch.device(device)
    if data.val_split is None:
        raise SparsifinerError("data.val_split is null; name the split to validate on, or '' if data.path is it")
    title = model if isinstance(model, str) else type(model).__name__
    loaded = load_model(model, img_size=data.size) if isinstance(model, str) else copy_model(model)
    loaded = loaded.to(device, dtype).eval()
    source = open_validation(
        data.source, data.path, data.val_split, train_split=data.train_split,
        num_classes=getattr(loaded, "num_classes", 0), download=data.download, limit=data.val_limit,
    )  # fmt: skip
    if is_converted(loaded):
        if config is not None:
            raise SparsifinerError(f"{title} is converted already ({_describe(loaded)}); leave the configuration out")
        # Nothing leads back from a baseline.
        dense, converted = (dense_twin(loaded) if baseline_settings(loaded) is None else None), loaded
    else:
        dense, converted = loaded, sparsify(loaded, config)
    if keep_rates and not _keep_rates(converted):
        raise SparsifinerError(
            f"{title} has no attention with a keep rate ({_describe(converted)}); leave the keep rates out"
        )
    size = data.size or tuple(loaded.patch_embed.img_size)  # type: ignore[union-attr, arg-type]
    channels = input_channels(loaded)
    transform = validation_transform((size[0], size[1]), resolve_model_data_config(loaded), channels)
    samples = Samples(source, transform, 0, replace_broken=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(min(batch_size, len(source)), channels, *size, generator=generator).to(device, dtype)
    variants: list[tuple[nn.Module, float | None]] = [] if dense is None else [(dense, None)]
    variants += [(converted, rate) for rate in dict.fromkeys(keep_rates) or (None,)]
    rows: list[ValidationRow] = []
    broken: dict[str, str] = {}
    for variant, rate in variants:
        if rate is not None:
            set_keep_rate(variant, rate)
        with always_sparse(variant):
            rows.append(_measure(variants[0][0], variant, samples, x, data.workers, repeats, notify))
        broken.update(rows[-1].accuracy.broken)
    return Validation(title, rows, (size[0], size[1]), len(x), str(dtype).removeprefix("torch."), broken)


def _describe(model: nn.Module) -> str:
    """Conversions of a model in words: ``dense``, ``keep 0.1``, ``pruned 0.7, keep 0.1 to 0.3``, ``linformer``."""
    done = []
    if is_pruned(model):
        done.append(f"pruned {token_pruning(model).keep_rate:g}")
    baseline = baseline_settings(model)
    if baseline is not None:
        done.append(baseline["name"])
    if is_sparse(model):
        rates = _keep_rates(model)
        done.append(f"keep {' to '.join(f'{r:g}' for r in sorted({rates[0], rates[-1]}))}" if rates else "sparse")
    return ", ".join(done) or "dense"


def _keep_rates(model: nn.Module) -> list[float]:
    """Those of the sparse layers, rising; a layer with a score threshold in their place has none."""
    layers = find_sparse_layers(model).values()
    return sorted(layer.predictor.keep_rate for layer in layers if not layer.config.predictor.keeps_any_number)


def _measure(
    reference: nn.Module,
    variant: nn.Module,
    samples: Samples,
    x: Tensor,
    workers: int,
    repeats: int,
    notify: Progress,
) -> ValidationRow:
    """The row of ``variant``; ``x`` is the batch ``[B, 3, H, W]`` that its speed is measured on."""
    name = _describe(variant)
    loader = validation_loader(samples, len(x), workers)
    told = partial(_notify_batches, notify, f"{name}: accuracy", len(loader))
    accuracy = count_correct(Cast(variant, x.dtype), loader, x.device, progress=told)
    flops = count_flops(variant, x[:1])
    speed = speed_up = None
    if repeats:
        notify(f"{name}: speed", 0, 1)
        timings = compare_latency(reference, variant, x, repeats=repeats, warmup=1)
        speed = len(x) / timings.sparse_median
        speed_up = None if variant is reference else timings.paired_speedup
        notify(f"{name}: speed", 1, 1)
    return ValidationRow(name, accuracy, flops.total_macs, flops.mhsa_macs, speed, speed_up)


class Cast(nn.Module):
    """Images in the model's own type."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype))


def _notify_batches(notify: Progress, stage: str, total: int, done: int) -> None:
    notify(stage, done, total)
