"""The models of a run: the student, its teacher, and how they are saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from .._utils.copying import copy_model
from .._utils.files import make_folder, write_together
from .._utils.reading import read_json
from ..convert import densify, is_sparse, sparse_layers, sparsify
from ..errors import SparsifinerError
from ..methods import convert_with
from ..models import load_model
from ..reduction.pruning import is_pruned, unprune_tokens
from ..saving import CONFIG_NAME, is_converted, save_pretrained
from .recipe import TEACHER_LOSSES, TrainConfig


def build_models(config: TrainConfig, num_classes: int | None) -> tuple[nn.Module, nn.Module | None]:
    """The student, and the dense teacher where the recipe's losses need one, both in float32.

    A folder may hold half precision. Small updates would round away in it, and ``precision`` says what is computed in.

    Args:
        config: the recipe.
        num_classes: width of the student's head; the model's own if None.

    Raises:
        ValueError: in one line, if a model cannot be had, or its kind does not fit the recipe.
    """
    base: Any = load_model(
        config.model,
        img_size=config.data.size,
        num_classes=num_classes,
        pretrained=config.pretrained,
        model_args=config.model_args,
    ).float()
    if is_converted(base) and not is_sparse(base):
        raise SparsifinerError(f"{config.model} is pruned or a baseline; name the dense model it was made from")
    saved = is_sparse(base)
    if saved != (config.sparsity == "saved"):
        raise SparsifinerError(
            f"{config.model} is sparse already and has its own settings; set sparsity=saved"
            if saved
            else f"sparsity is 'saved', but {config.model} is a dense model; give the settings"
        )
    if saved:
        config.check_phases(next(iter(sparse_layers(base).values())).config)
    teacher = _teacher(config, base)
    if config.method is not None:
        name, keep_rate = config.method
        return convert_with(name, base, keep_rate), teacher
    settings = config.sparse_config()
    return base if settings is None else sparsify(base, settings, inplace=True), teacher


def _teacher(config: TrainConfig, base: Any) -> nn.Module | None:
    """The teacher if any phase needs one."""
    if not any(needs_teacher(config, number) for number in range(len(config.phases))):
        return None
    if config.teacher != "same":
        return load_model(config.teacher, img_size=config.data.size).float()
    if (
        config.pretrained
        and base.num_classes != _trained_classes(config, base)
        and any({"kl", "aux_mse", "token_label"} & phase.losses.keys() for phase in config.phases)
    ):
        raise SparsifinerError(
            f"{config.model} has no trained head for {base.num_classes} classes, so it cannot teach them; train it "
            f"dense first and name its folder as model, name another teacher, or leave out kl, aux_mse and token_label"
        )
    return dense_twin(base)


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of a dense, sparse or pruned model with the same weights, dense attention and every token."""
    twin = densify(model) if is_sparse(model) else copy_model(model)
    return unprune_tokens(twin, inplace=True) if is_pruned(twin) else twin


def _trained_classes(config: TrainConfig, base: Any) -> int | None:
    """Width of the head that came with the weights."""
    description = Path(config.model) / CONFIG_NAME
    if description.is_file():
        return read_json(description)["model_args"].get("num_classes")
    return (getattr(base, "pretrained_cfg", None) or {}).get("num_classes")


def needs_teacher(config: TrainConfig, number: int) -> bool:
    """True where the phase of that number asks the teacher anything.

    Attention is the student's own where that is the same teacher's: while it runs dense and nothing but predictors
    has learned.
    """
    phase, so_far = config.phases[number], config.phases[: number + 1]
    own_attention = config.teacher == "same" and phase.dense_attention and all(p.train == "predictor" for p in so_far)
    attention = "attn_recon" in phase.losses and not own_attention and config.teacher != "none"
    return bool(set(phase.losses) & set(TEACHER_LOSSES)) or attention


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a trained model: a converted one as ``save_pretrained`` does, a dense one in timm's own format.

    Either folder is a model name for ``load_model``.

    Raises:
        OSError: if the folder cannot be written; what it held is still there.
    """
    if is_converted(model):
        save_pretrained(model, folder)
        return
    make_folder(folder)
    write_together(
        {
            folder / "config.json": partial(save_config_for_hf, model),
            folder / "model.safetensors": partial(save_file, model.state_dict()),
        }
    )
