"""Calibration: fit a sparse model's predictors and tail to its own dense attention, without labels."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .._utils import checks
from .._utils.copying import copy_model
from .._utils.messages import LOGGER, shown
from .._utils.progress import Progress, progress_on
from ..attention.attend import tail_groups
from ..attention.layer import SparseAttention
from ..attention.module_state import weight_like
from ..attention.policy import Policy
from ..config import SparsifinerConfig
from ..convert import sparse_layers
from ..errors import SparsifinerError
from ..measure.fidelity import compare_features, final_features
from ..predictors import LowRankPredictor
from ..reduction.blocks import refuse_reduced
from . import budget, spectral
from .images import Images, load_images
from .observation import Replay, common_patches, last_kept, sparse_again, visit_densely
from .reconstruction import reconstruction_loss
from .report import Calibration, summarise
from .state import Optimizer, State, fingerprint
from .tail import best_offsets, offset_errors, output_errors, sample_tiles

KeepRates = Literal["given", "per_layer"]
Start = Literal["spectral", "current"]

QUERIES = 384  # per image and layer, where attention is computed densely
FEW_TO_FIT = 8  # images; fewer may make others worse
FEW_IMAGES = 8  # for what costs several passes of each: keep rates per layer, and the choice of predictor
SAVE_SECONDS = 20.0


@torch.inference_mode(False)  # it takes gradients, wherever it is called
def calibrate(
    model: nn.Module,
    images: Images,
    *,
    validation: Images | None = None,
    keep_rates: KeepRates = "given",
    start: Start = "spectral",
    steps: int = 200,
    learning_rate: float = 3e-3,
    max_images: int | None = 64,
    img_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Fit ``model``'s predictors and tail to its own dense attention; its other weights stay.

    What is fitted: a ``lowrank`` predictor starts in closed form (``calibration/spectral.py``) and then follows the
    paper's reconstruction loss, per tile and aware of the tail where there is one; each layer keeps whichever of the
    two leaves the smaller error of the attention output; a tail gets an offset of its
    logits per head, chosen by the error of the attention output; and with ``keep_rates="per_layer"`` the layers
    share the budget of keys by the error each was measured to cause. ``model`` is changed at the very end, all at
    once; its keep rate can be changed afterwards, but the offsets are best at the rate they were fitted for. It stays
    as it was where that makes the images of ``validation`` worse, which is logged.

    Args:
        model: a sparse model, from :func:`sparsifiner.sparsify`.
        images: a folder, picture files, a tensor ``[B, 3, height, width]``, an iterable of tensors, or a
            ``DataLoader``; preprocessed if tensors. Give a few dozen: a fit to a handful does not carry over.
        validation: images that the result is measured on; ``images`` themselves if None.
        keep_rates: ``given`` leaves them, ``per_layer`` redistributes their mean.
        start: ``spectral`` replaces the weights of a ``lowrank`` predictor, ``current`` goes on from them.
        steps: optimiser steps of the reconstruction loss, one image each; ``lowrank`` only.
        learning_rate: of Adam, relative to the root mean square of each weight matrix at the start, falling to
            zero along a cosine.
        max_images: how many of each set are used at most; None uses all.
        img_size: rows and columns in pixels for pictures, or one number for both; the model's own if None.
        seed: of the order of images and the queries that are looked at.
        state: a file to continue from after an interruption, made if missing. The result is that of an
            uninterrupted run. It stays when all is done.
        progress: told of each step; bars on stderr if None.

    Returns:
        Errors per layer and fidelity, before and after; ``str()`` of it is a table.

    Raises:
        ValueError: if the model is not sparse or has nothing to fit, the images or settings are unusable, or
            ``state`` belongs to another calibration; one line says what to do. ``model`` is unchanged then.
    """
    for name, value, known in (("keep_rates", keep_rates, KeepRates), ("start", start, Start)):
        if value not in get_args(known):
            raise SparsifinerError(f"{name} {value!r} is unknown; choose {' or '.join(get_args(known))}")
    for name, number, least in (("steps", steps, 0), ("max_images", max_images, 1)):
        if number is not None and (not isinstance(number, int) or number < least):
            raise SparsifinerError(f"{name} must be a whole number of at least {least}, got {shown(number)}")
    if not (isinstance(learning_rate, (int, float)) and math.isfinite(learning_rate) and learning_rate > 0):
        raise SparsifinerError(f"learning_rate must be above 0, got {shown(learning_rate)}")
    checks.seed("seed", seed)
    layers = sparse_layers(model)
    _check_something_to_fit(layers, keep_rates)
    if keep_rates == "per_layer":
        refuse_reduced(model, "keep rates per layer")
    fit_images = load_images(model, images, max_images, img_size)
    val_images = fit_images if validation is None else load_images(model, validation, max_images, img_size)
    settings = {
        "configs": [layer.config.to_dict() for layer in layers.values()],
        "arguments": [keep_rates, start, steps, learning_rate, seed, len(fit_images), len(val_images)],
    }
    identity = "" if state is None else fingerprint(settings, [*model.state_dict().values(), *fit_images, *val_images])
    saved = State(state, identity)
    with nullcontext(progress) if progress is not None else _bars() as notify:
        run = _Run(model, fit_images, saved, notify, seed)
        if any(isinstance(layer.predictor, LowRankPredictor) for layer in layers.values()):
            run.fit_predictors(start, steps, learning_rate)
        run.fit_tail("tail offsets")
        if keep_rates == "per_layer":
            run.share_budget()
            run.fit_tail("tail offsets at the new keep rates")
        result = run.measure(model, val_images, held_out=validation is not None)
    if not result.applied:
        LOGGER.warning(
            "calibration to %d image%s made the held-out images worse, relative L2 %.4f before and %.4f after: the "
            "model keeps what it had; give more images",
            len(fit_images), "" if len(fit_images) == 1 else "s", *result.patch_errors,
        )  # fmt: skip
        return result
    if validation is None and len(fit_images) < FEW_TO_FIT:
        LOGGER.warning(
            "fitted to %d image%s and measured on the same: others may have become worse; give %d or more, or others "
            "as validation",
            len(fit_images), "" if len(fit_images) == 1 else "s", FEW_TO_FIT,
        )  # fmt: skip
    for name, layer in layers.items():
        fitted = run.layers[name]
        layer.predictor = fitted.predictor.train(layer.training)
        layer.configure(fitted.config)
    return result


class _Run:
    """A calibration under way, on a copy of the model."""

    def __init__(self, model: nn.Module, images: list[Tensor], state: State, notify: Progress, seed: int) -> None:
        self.model = copy_model(model).eval()
        self.layers = sparse_layers(self.model)
        self.images, self.state, self.progress, self.seed = images, state, notify, seed
        self.saved_at = time.monotonic()
        for layer in self.layers.values():
            _watch_sparse(layer)
            if layer.config.tail is not None and not layer.config.tail.offset:
                _add_tail_offset(layer)

    def stage(self, name: str, total: int, step: Callable[[int], None]) -> None:
        """Run ``step`` with each number below ``total`` that is not done yet, saving now and then."""
        self.progress(name, self.state.done.get(name, 0), total)
        for number in range(self.state.done.get(name, 0), total):
            step(number)
            self.state.done[name] = number + 1
            if number + 1 == total or time.monotonic() - self.saved_at >= SAVE_SECONDS:
                self.state.save()
                self.saved_at = time.monotonic()
            self.progress(name, number + 1, total)

    def on_device(self, x: Tensor) -> Tensor:
        weight = weight_like(next(iter(self.layers.values())))
        return x.to(device=weight.device, dtype=weight.dtype)

    def fit_predictors(self, start: Start, steps: int, learning_rate: float) -> None:
        """The closed-form start, then the reconstruction loss, in float32."""
        fits = {
            name: copy.deepcopy(layer.predictor).float().requires_grad_(True)
            for name, layer in self.layers.items()
            if isinstance(layer.predictor, LowRankPredictor)
        }
        if start == "spectral":
            self._start_spectrally(fits)
        parameters = {
            f"{name}.{key}": parameter
            for name, fit in fits.items()
            for key, parameter in fit.named_parameters()
            if key != "tail_offset"
        }
        if steps:
            starts = {name: copy.deepcopy(fit.state_dict()) for name, fit in fits.items()}
            self._reconstruct(fits, parameters, steps, learning_rate)
            self._choose({name: (starts[name], fit.state_dict()) for name, fit in fits.items()})
        else:
            for name, fit in fits.items():
                self.layers[name].predictor.load_state_dict(fit.state_dict())

    def _choose(self, candidates: dict[str, tuple[dict[str, Tensor], ...]]) -> None:
        """Give each layer's predictor the one of its states that leaves the least error of the attention output.

        The reconstruction imitates scores, by squares; what the kept keys make of them is not the same.
        """
        stage, tensors, chosen = "start or reconstruction", self.state.tensors, self._few_images()

        def step(number: int) -> None:
            def visit(name: str, layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
                if name not in candidates:
                    return
                errors = []
                with sparse_again(layer):
                    for state in candidates[name]:
                        layer.predictor.load_state_dict(state)
                        errors += output_errors([layer], q, k, v, bias)
                tensors[f"chosen.{name}"] = tensors.get(f"chosen.{name}", 0) + torch.tensor(errors, dtype=torch.float64)

            visit_densely(self.model, self.on_device(chosen[number]), visit)

        self.stage(stage, len(chosen), step)
        for name, states in candidates.items():
            self.layers[name].predictor.load_state_dict(states[int(tensors[f"chosen.{name}"].argmin())])

    def _few_images(self) -> list[Tensor]:
        """Evenly spaced ones of the images."""
        count = min(FEW_IMAGES, len(self.images))
        return [self.images[number * len(self.images) // count] for number in range(count)]

    def _start_spectrally(self, fits: dict[str, LowRankPredictor]) -> None:
        tensors = self.state.tensors

        def step(number: int) -> None:
            def visit(name: str, layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
                if name in fits:
                    moments = spectral.second_moments(layer, q, k)
                    tensors[f"moments.{name}"] = tensors.get(f"moments.{name}", 0) + moments

            visit_densely(self.model, self.on_device(self.images[number]), visit)

        self.stage("second moments of queries and keys", len(self.images), step)
        for name, fit in fits.items():
            spectral.start(fit, tensors[f"moments.{name}"], self.layers[name].scale)

    def _reconstruct(
        self, fits: dict[str, LowRankPredictor], parameters: dict[str, torch.nn.Parameter], steps: int, rate: float
    ) -> None:
        stage = "reconstruction"
        tensors = self.state.tensors
        # Steps relative to the size of a weight: the pooling start is sparse, and one absolute step for all would
        # drown its few entries in the many that leave zero together.
        sizes = [_size_of(name, parameters) * rate for name in parameters]
        optimizer = Optimizer(
            [{"params": [p], "lr": size} for p, size in zip(parameters.values(), sizes, strict=True)], weight_decay=0.0
        )
        if self.state.done.get(stage):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"predictor.{name}"])
            optimizer.from_tensors(tensors)
        for fit in fits.values():
            fit.train()

        def step(number: int) -> None:
            epoch, place = divmod(number, len(self.images))
            order = torch.randperm(len(self.images), generator=self._generator(epoch, 1))
            optimizer.zero_grad()

            def visit(name: str, layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
                if name not in fits:
                    return
                inputs = layer.inputs(q.float(), k.float(), v.float(), bias)
                tiles = sample_tiles(inputs.tiling, QUERIES // inputs.tiling.tile_size or 1, self._generator(number, 2))
                groups = tail_groups(layer.config.tail, inputs)
                with torch.enable_grad():
                    reconstruction_loss(fits[name], inputs, groups, tiles.to(q.device)).backward()

            visit_densely(self.model, self.on_device(self.images[order[place]]), visit)
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = size * 0.5 * (1 + math.cos(math.pi * number / steps))
            optimizer.step()
            # References: they hold the values of this step whenever the state is written.
            tensors.update({f"predictor.{name}": parameter.detach() for name, parameter in parameters.items()})
            tensors.update(optimizer.to_tensors())

        self.stage(stage, steps, step)
        for fit in fits.values():
            fit.eval()

    def fit_tail(self, stage: str) -> None:
        """The offset per head that leaves the least error of the attention output, over all images."""
        with_tail = [name for name, layer in self.layers.items() if layer.config.tail is not None]
        if not with_tail:
            return
        tensors = self.state.tensors

        def step(number: int) -> None:
            def visit(name: str, layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
                if name in with_tail:
                    tiling = layer.tiling(q.shape[2])
                    tiles = sample_tiles(tiling, QUERIES // tiling.tile_size or 1, self._generator(number, 3))
                    errors = offset_errors(layer, q, k, v, bias, tiles.to(q.device))
                    tensors[f"{stage}.{name}"] = tensors.get(f"{stage}.{name}", 0) + errors

            visit_densely(self.model, self.on_device(self.images[number]), visit)

        self.stage(stage, len(self.images), step)
        for name in with_tail:
            offset = self.layers[name].predictor.tail_offset
            assert offset is not None
            with torch.no_grad():
                offset.copy_(best_offsets(tensors[f"{stage}.{name}"], len(self.images)))

    def share_budget(self) -> None:
        """Keep rates per layer under the mean of the present ones."""
        rates = [layer.predictor.keep_rate for layer in self.layers.values()]
        mean = sum(rates) / len(rates)
        measured = budget.measured_rates(mean)
        chosen = self._few_images()
        tensors = self.state.tensors
        replay = Replay(copy_model(self.model))

        def step(number: int) -> None:
            tensors[f"budget.{number}"] = budget.layer_errors(replay, self.on_device(chosen[number]), measured)

        self.stage("error of each layer", len(chosen), step)
        errors = torch.stack([tensors[f"budget.{number}"] for number in range(len(chosen))])
        squares = budget.combine_images(errors, measured.index(min(measured, key=lambda rate: abs(rate - mean))))
        layer = next(iter(self.layers.values()))
        rows, columns = (side // patch for side, patch in zip(chosen[0].shape[-2:], layer.grid.patch_size, strict=True))
        candidates = rows * columns + (0 if layer.config.keep_prefix else layer.grid.num_prefix_tokens)
        for layer, keep_rate in zip(
            self.layers.values(), budget.allocate(squares, measured, mean, candidates), strict=True
        ):
            layer.configure(layer.config.replace(keep_rate=keep_rate))

    def measure(self, model: nn.Module, images: list[Tensor], *, held_out: bool) -> Calibration:
        """Errors before and after, on each image."""
        before = copy_model(model).eval()
        before_layers = sparse_layers(before)
        for layer in before_layers.values():
            _watch_sparse(layer)
        tensors = self.state.tensors

        def step(number: int) -> None:
            x = self.on_device(images[number])
            errors: list[list[float]] = []

            def visit(name: str, layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
                before_layers[name].grid.follow(layer.grid)
                with sparse_again(layer):
                    errors.append(output_errors([before_layers[name], layer], q, k, v, bias))

            dense, dense_kept = visit_densely(self.model, x, visit), last_kept(self.model)
            tensors[f"measured.layers.{number}"] = torch.tensor(errors, dtype=torch.float64)
            for which, sparse in (("before", before), ("after", self.model)):
                with torch.no_grad():
                    got = final_features(sparse, x)
                compared = compare_features("", *common_patches(dense, dense_kept, got, last_kept(sparse)))
                values = (compared.patch_l2, compared.patch_cosine, compared.class_l2, compared.class_cosine)
                tensors[f"measured.{which}.{number}"] = torch.tensor(
                    [float("nan") if value is None else value for value in values], dtype=torch.float64
                )

        self.stage("fidelity before and after", len(images), step)
        return summarise(before_layers, self.layers, tensors, len(self.images), len(images), held_out=held_out)

    def _generator(self, number: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + number) * 8 + stream) % 2**63)


def _watch_sparse(layer: SparseAttention) -> None:
    """On a copy: what counts is how the layer is when sparse, also at a size where it would run dense."""
    layer.observer = None
    layer.override = Policy("sparse")


def _add_tail_offset(layer: SparseAttention) -> None:
    old = layer.predictor
    assert layer.config.tail is not None
    layer.configure(layer.config.replace(tail=layer.config.tail.replace(offset=True)))
    layer.reset_predictor(old.basis_grid or layer.grid.shape)
    layer.predictor.load_state_dict(old.state_dict(), strict=False)
    layer.predictor.eval()


def _size_of(name: str, parameters: dict[str, torch.nn.Parameter]) -> float:
    """Root mean square of a weight; a bias goes by the weight of its layer."""
    weight = parameters[name.removesuffix("bias") + "weight" if name.endswith(".bias") else name]
    return weight.detach().square().mean().sqrt().clamp(min=1e-6).item()


def has_something_to_fit(config: SparsifinerConfig) -> bool:
    """True where calibration changes a layer of these settings, its keep rate aside."""
    return config.tail is not None or config.predictor.learned


def _check_something_to_fit(layers: dict[str, SparseAttention], keep_rates: KeepRates) -> None:
    configs = [layer.config for layer in layers.values()]
    if keep_rates == "per_layer" and any(config.predictor.keeps_any_number for config in configs):
        raise SparsifinerError("keep_rates='per_layer' needs a budget, but score_threshold keeps any number of keys")
    if keep_rates == "given" and not any(map(has_something_to_fit, configs)):
        raise SparsifinerError(
            f"predictor {configs[0].predictor.name!r} without a tail has nothing to fit; use a learned predictor, a "
            f"tail, or keep_rates='per_layer'"
        )


def _bars():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return progress_on(Console(file=sys.stderr))
