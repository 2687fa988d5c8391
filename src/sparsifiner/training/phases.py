"""Changes from phase to phase: trained weights, mode of attention, the optimiser and its schedule."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from ..convert import find_sparse_layers, set_keep_rate, sparse_layers
from ..errors import SparsifinerError
from ..reduction.blocks import reduces_tokens
from .batchnorm import hold_frozen_statistics
from .recipe import PhaseConfig, TrainConfig
from .student import needs_teacher


def check_phases(student: nn.Module, config: TrainConfig) -> None:
    """Refuse a phase that the student cannot enter, before any of them trains.

    Raises:
        ValueError: in one line, if keep rates do not fit the layers, what shall learn is not there, or the student
            has lost tokens whose attention the teacher would be asked for.
    """
    layers = find_sparse_layers(student).values()
    for number, phase in enumerate(config.phases):
        try:
            if "attn_recon" in phase.losses and reduces_tokens(student) and needs_teacher(config, number):
                raise SparsifinerError(
                    "attn_recon compares with the teacher's attention among all tokens, but the student drops some; "
                    "use attn_self_distill (its own attention), or leave attn_recon out"
                )
            _trainable(student, phase.train or "all")
            if phase.keep_rate is not None:
                for layer_number, layer in enumerate(layers):
                    layer.config.replace(keep_rate=phase.keep_rate).for_layer(layer_number, len(layers))
        except ValueError as error:
            raise SparsifinerError(f"phase {phase.name}: {error}") from error


def enter_phase(student: nn.Module, phase: PhaseConfig) -> None:
    """Set keep rates, the reconstruction mode, and which parameters have gradients."""
    if phase.keep_rate is not None:
        set_keep_rate(student, phase.keep_rate)
    set_reconstruction(student, phase.dense_attention)
    wanted = _trainable(student, phase.train or "all")
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    set_training_mode(student, phase)


def set_reconstruction(student: nn.Module, on: bool) -> None:
    """Attention of a learning predictor dense (the paper's first phase) or sparse."""
    for layer in find_sparse_layers(student).values():
        layer.configure(layer.config.replace(predictor=layer.config.predictor.with_reconstruction(on)))


def set_training_mode(student: nn.Module, phase: PhaseConfig) -> None:
    """Training mode for what learns.

    While only predictors learn, the backbone is undisturbed by dropout; frozen BatchNorm never gathers statistics.
    """
    student.train(phase.train != "predictor")
    if phase.train == "predictor":
        for layer in sparse_layers(student).values():
            layer.training = True  # the layer alone, for its reconstruction mode, not what it is made of
            layer.predictor.train()
    hold_frozen_statistics(student)


def make_optimizer(student: nn.Module, config: TrainConfig, phase: PhaseConfig) -> Optimizer:
    """timm's optimiser of that name over the parameters with gradients; no decay on biases and norms.

    Raises:
        ValueError: if timm knows no such optimiser.
    """
    try:
        return create_optimizer_v2(student, opt=config.optimizer, lr=phase.lr, weight_decay=config.weight_decay)
    except ValueError as error:
        raise SparsifinerError(
            f"optimizer {config.optimizer!r} is unknown to timm; adamw and sgd are among those it has"
        ) from error


def make_scheduler(optimizer: Optimizer, phase: PhaseConfig, updates_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up to ``lr``, then a whole cosine down from it over the steps that are left.

    The rate is a function of the update, so a resumed run needs no more.
    """
    warmup = phase.warmup_updates(updates_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, phase.num_updates(updates_per_epoch) - warmup),
        lr_min=phase.min_lr,
        warmup_t=warmup,
        warmup_lr_init=phase.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _trainable(student: Any, train: str) -> set[int]:
    """Identities of the parameters that learn."""
    everything = {id(parameter) for parameter in student.parameters()}
    if train == "all":
        return everything
    if train == "head":
        heads = student.get_classifier()
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        found = {id(parameter) for head in heads for parameter in head.parameters()}
        if not found:
            raise SparsifinerError(f"train is head, but {type(student).__name__} has none; set num_classes")
        return found
    layers = find_sparse_layers(student).values()
    predictors = {id(parameter) for layer in layers for parameter in layer.predictor.parameters()}
    return predictors if train == "predictor" else everything - predictors
