"""Sparse models that ``save_pretrained`` of transformers or ``save_for_hf`` of timm wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ._utils.messages import one_line
from ._utils.reading import read_json
from ._utils.trust import check_architecture, check_model_args, create_model
from .attention.markers import NAME, TIMM_KEY
from .config import SparsifinerConfig
from .convert import sparsify
from .errors import SparsifinerError


def is_of_transformers(model: nn.Module) -> bool:
    """True for a model of transformers whose configuration holds the settings."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), NAME)


def load_from_others(folder: Path, img_size: tuple[int, int] | None, trust_remote: bool) -> nn.Module:
    """The sparse model in a folder with a ``config.json`` but without our own; no code of the folder runs.

    Raises:
        SparsifinerError: if the folder holds no sparse model, or one that cannot be built here.
    """
    settings = read_json(folder / "config.json")
    settings = settings if isinstance(settings, dict) else {}
    if img_size is not None:
        raise SparsifinerError(
            "img_size is for models that sparsifiner.save_pretrained wrote with timm's architectures"
        )
    arguments = settings.get("model_args")
    if isinstance(arguments, dict) and TIMM_KEY in arguments:
        return _from_timm(folder, settings, trust_remote)
    names = settings.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or NAME not in settings:
        raise SparsifinerError(
            f"{folder} holds no saved sparse model: its config.json has no settings of sparsifiner, and "
            f"sparsifiner.json is missing"
        )
    try:
        import transformers
    except ImportError as error:
        raise SparsifinerError(
            f"{folder} holds a model of transformers; pip install 'sparsifiner[transformers]'"
        ) from error
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise SparsifinerError(f"{folder / 'config.json'} names {names[0]!r}, which transformers does not have")
    return kind.from_pretrained(folder).eval()


def _from_timm(folder: Path, settings: dict[str, Any], trust_remote: bool) -> nn.Module:
    path, weights = folder / "config.json", folder / "model.safetensors"
    arguments = {name: value for name, value in settings["model_args"].items() if name != TIMM_KEY}
    architecture = settings.get("architecture")
    if not trust_remote:
        check_architecture(architecture, path)
        check_model_args(arguments, path)
    if not weights.is_file():
        raise SparsifinerError(
            f"{weights} is missing, and pickles are not read; save with timm's safe_serialization=True or with "
            f"sparsifiner.save_pretrained"
        )
    try:
        state = load_file(weights)
        model = create_model(str(architecture), **arguments)
        sparse = sparsify(model, SparsifinerConfig.from_dict(settings["model_args"][TIMM_KEY]), inplace=True)
        sparse.load_state_dict(state)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise SparsifinerError(f"cannot rebuild {architecture} for {folder}: {one_line(error)}") from error
    return sparse.eval()
