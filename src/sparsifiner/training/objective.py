"""One forward pass of training: student, teacher, and the weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..attention.layer import LayerRecord
from ..convert import sparse_layers
from ..errors import SparsifinerError
from ..models import LvVit
from ..predictors import LowRankPredictor
from ..recording import observable_twin, record
from . import losses
from .patches import auxiliary_head, refuse_reducing_teacher, same_patches
from .recipe import PATCH_LOSSES, TEACHER_LOSSES

FROM_TEACHER = set(TEACHER_LOSSES)
FROM_OUTPUTS = {"ce"} | FROM_TEACHER
FROM_AUXILIARY_HEADS = {"aux_mse": losses.patch_logit_distillation, "token_label": losses.token_labels}
FROM_QUERIES = {"attn_recon", "attn_self_distill", "least_k", "ratio"}


class Objective(nn.Module):
    """The training loss as a module, so that distributed training wraps all of it.

    Args:
        student: a timm Vision Transformer, dense, sparse or pruned.
        teacher: a dense one that gives the targets, or None. It is no submodule: it has no gradients, is not
            saved, and is not moved with this module.
        weights: weight of each loss by name (:data:`recipe.LOSSES`).
        smoothing: label smoothing, for targets that are class numbers.

    Raises:
        ValueError: if a loss has no teacher, or teacher and student do not fit each other; what only their outputs
            tell, ``forward`` refuses.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, weights: Mapping[str, float], smoothing: float = 0.0
    ) -> None:
        super().__init__()
        for name in weights:
            if name not in FROM_TEACHER:
                continue
            if teacher is None:
                raise SparsifinerError(
                    f"the loss {name} learns from a teacher, but there is none; name one or leave it out"
                )
            if name in PATCH_LOSSES:
                refuse_reducing_teacher(teacher, name)
            if name in FROM_AUXILIARY_HEADS:
                auxiliary_head(student, "student", name)
                auxiliary_head(teacher, "teacher", name)
        self.student = student
        self.weights = dict(weights)
        self.smoothing = smoothing
        self._teacher = (None if teacher is None else Teacher(teacher, student, attention="attn_recon" in weights),)

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher[0]

    def forward(self, images: Tensor, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss and the unweighted parts, detached.

        Args:
            images: ``[B, 3, H, W]``, normalised as the student has it.
            target: class numbers ``[B]``, shares ``[B, classes]``, or None where no loss needs labels.
        """
        wanted = set(self.weights)
        taught = None
        if self.teacher is not None and wanted & self.teacher.serves:
            taught = self.teacher(images)
        with ExitStack() as stack:
            seen: dict[str, LayerRecord] = {}
            if wanted & FROM_QUERIES:
                seen = stack.enter_context(record(self.student, tensors=True))
            tokens, logits = run_model(self.student, images, head=bool(wanted & {"ce", "kl"}))
        parts: dict[str, Tensor] = {}
        if "ce" in wanted:
            assert target is not None
            parts["ce"] = losses.cross_entropy(logits, target, self.smoothing)
        if taught is not None and "kl" in wanted:
            _same_shape("logits", logits, taught.logits)
            parts["kl"] = losses.logit_distillation(logits, taught.logits)
        if taught is not None and wanted.intersection(PATCH_LOSSES):
            parts.update(self._patch_losses(tokens, taught))
        parts.update(self._predictor_losses(seen, taught))
        total = torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _patch_losses(self, tokens: Tensor, taught: Taught) -> dict[str, Tensor]:
        """The losses on patch tokens ``[B, n, C]``, mean over the patches that the student has left."""
        parts: dict[str, Tensor] = {}
        tokens, targets = same_patches(self.student, tokens, taught.tokens)
        if "token_mse" in self.weights:
            _same_shape("patch tokens", tokens, targets)
            parts["token_mse"] = losses.token_distillation(tokens, targets)
        for name, loss in FROM_AUXILIARY_HEADS.items():
            if name in self.weights:
                assert self.teacher is not None
                logits = auxiliary_head(self.student, "student", name)(tokens)
                labels = self.teacher.classify(targets, name)
                _same_shape("patch logits", logits, labels)
                parts[name] = loss(logits, labels)
        return parts

    def _predictor_losses(self, seen: Mapping[str, LayerRecord], taught: Taught | None) -> dict[str, Tensor]:
        """The losses on predictors, each the mean over the layers."""
        wanted = [name for name in self.weights if name not in FROM_OUTPUTS]
        if not wanted:
            return {}
        # The choice of keys has cast the predictors' weights without gradients; older torch would take those casts
        # again (pytorch issue 65766).
        torch.clear_autocast_cache()
        layers = sparse_layers(self.student)
        parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for number, (path, layer) in enumerate(layers.items()):
            predictor = layer.predictor
            assert isinstance(predictor, LowRankPredictor)
            if "l1_basis" in parts:
                parts["l1_basis"].append(losses.basis_size(predictor))
            if path not in seen:
                continue
            own = seen[path]
            q, k = own.q, own.k
            assert q is not None
            assert k is not None
            tiling = layer.tiling(q.shape[2])
            targets = dict.fromkeys(("attn_self_distill", "attn_recon"), (own, layer.scale))
            if "attn_recon" in parts and taught is not None:
                targets["attn_recon"] = taught.attention(number, q, len(layers))
            for name, (target, scale) in targets.items():
                if name in parts:
                    assert target.q is not None
                    assert target.k is not None
                    loss = losses.attention_reconstruction(
                        predictor, q, k, target.q, target.k, tiling, scale, target.attn_bias
                    )
                    parts[name].append(loss)
            if "least_k" in parts:
                parts["least_k"].append(losses.least_scores(predictor, q, k, tiling))
            if "ratio" in parts:
                parts["ratio"].append(losses.kept_ratio(predictor, q, k, tiling))
        return {name: torch.stack(values).mean() for name, values in parts.items()}


class Taught:
    """Answers of a teacher to a batch.

    Args:
        tokens: patch tokens ``[B, P, C]``.
        logits: ``[B, classes]``.
        seen: queries, keys, biases and scales of its attention layers, where asked for.
    """

    def __init__(self, tokens: Tensor, logits: Tensor, seen: Sequence[tuple[LayerRecord, float]]) -> None:
        self.tokens, self.logits = tokens, logits
        self._layers = seen

    def attention(self, number: int, q: Tensor, layers: int) -> tuple[LayerRecord, float]:
        """Queries, keys and bias of a layer, and the factor on its logits.

        The teacher's heads may be of another width than the student's, whose queries ``[B, H, N, D]`` are given.
        """
        if len(self._layers) != layers:
            raise SparsifinerError(
                f"attn_recon needs a teacher with as many attention layers as the student: {layers}, "
                f"got {len(self._layers)}"
            )
        seen, scale = self._layers[number]
        assert seen.q is not None
        if seen.q.shape[:3] != q.shape[:3]:
            raise SparsifinerError(
                f"attn_recon needs a teacher with the student's heads and tokens: {list(q.shape[1:3])}, "
                f"got {list(seen.q.shape[1:3])}"
            )
        return seen, scale


class Teacher:
    """A frozen dense model.

    Args:
        model: in evaluation mode from now on.
        student: the model whose images it is given; its own may be normalised otherwise.
        attention: whether what its attention is made of is wanted as well.
    """

    def __init__(self, model: nn.Module, student: nn.Module, *, attention: bool) -> None:
        self.renormalise = _renormalisation(student, model)
        self.model = model.requires_grad_(False).eval()
        self.serves = FROM_TEACHER | ({"attn_recon"} if attention else set())
        self.records = attention
        if attention:
            self.model = observable_twin(self.model).requires_grad_(False)  # its predictors are new

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Taught:
        """Its answers to ``images`` ``[B, 3, H, W]``, normalised as the student has it."""
        with ExitStack() as stack:
            seen = stack.enter_context(record(self.model, tensors=True)) if self.records else {}
            tokens, logits = run_model(self.model, self.renormalise(images), head=True)
        layers = sparse_layers(self.model) if seen else {}
        return Taught(tokens, logits, [(did, layers[path].scale) for path, did in seen.items()])

    @torch.no_grad()
    def classify(self, tokens: Tensor, loss: str) -> Tensor:
        """Logits ``[B, P, classes]`` of its auxiliary head for its own patch tokens ``[B, P, C]``."""
        return auxiliary_head(self.model, "teacher", loss)(tokens)


def run_model(model: Any, images: Tensor, *, head: bool) -> tuple[Tensor, Tensor]:
    """Patch tokens after the last layer and its norm ``[B, P, C]``, and logits ``[B, classes]`` (empty without head).

    The logits of an LV-ViT are those of the class token alone, by which its authors and Wei et al. train it.

    Raises:
        ValueError: if the model is no timm Vision Transformer.
    """
    if not hasattr(model, "forward_features") or not hasattr(model, "num_prefix_tokens"):
        raise SparsifinerError(f"{type(model).__name__} is no timm Vision Transformer; training needs its patch tokens")
    features = model.forward_features(images)
    classify = model.forward_class_token if isinstance(model, LvVit) else model.forward_head
    logits = classify(features) if head else features.new_empty(0)
    return features[:, model.num_prefix_tokens :], logits


def _renormalisation(student: nn.Module, teacher: nn.Module) -> Callable[[Tensor], Tensor]:
    """Turns images ``[B, 3, H, W]`` normalised for the student into the same images normalised for the teacher."""
    ours, theirs = (resolve_model_data_config(model) for model in (student, teacher))
    if (ours["mean"], ours["std"]) == (theirs["mean"], theirs["std"]):
        return lambda images: images
    mean, std, new_mean, new_std = (
        torch.tensor(settings[name], dtype=torch.float64)[:, None, None]
        for settings in (ours, theirs)
        for name in ("mean", "std")
    )
    scale, shift = std / new_std, (mean - new_mean) / new_std
    return lambda images: images * scale.to(images) + shift.to(images)


def _same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise SparsifinerError(
            f"the teacher's {what} have shape {list(teacher.shape)} and the student's {list(student.shape)}; "
            f"distil from a teacher of the same kind, or leave that loss out"
        )
