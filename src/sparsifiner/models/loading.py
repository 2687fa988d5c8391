"""Find a model by name: the built-in one, a saved folder, or anything timm knows."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .._utils.description import check_data
from .._utils.messages import one_line, shown
from .._utils.reading import read_json
from .._utils.trust import check_architecture, check_model_args, create_model
from ..errors import SparsifinerError
from ..geometry.patch_grid import check_image_size
from ..saving import CONFIG_NAME, from_pretrained
from .builtin import BUILTIN

TIMM_CONFIG_NAME, TIMM_WEIGHTS_NAME = "config.json", "model.safetensors"
LOCAL = "local-dir:"
"""Prefix of timm's names for folders in its own format."""


def load_model(
    name: str,
    *,
    img_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
    trust_remote: bool = False,
) -> nn.Module:
    """A pretrained model in evaluation mode.

    Args:
        name: ``builtin``, a timm model name, a folder written by ``save_pretrained`` (a runtime in it is left out: the
            model comes in its own precision, uncompiled), or one in timm's own format (``config.json`` and
            ``model.safetensors``).
        img_size: height and width in pixels the model is to be built for; its own default if None.
        num_classes: width of the classifier, which starts anew if the weights have another; their own if None.
        pretrained: whether to load the weights of a timm model; a folder's are always loaded.
        model_args: further arguments of ``timm.create_model``.
        trust_remote: whether the description in a folder may say where else to load from, as in
            :func:`~sparsifiner.from_pretrained`.

    Raises:
        ValueError: if there is no such model (near matches are named), its weights cannot be had, or it
            cannot be built for ``img_size``.
    """
    if (Path(name) / CONFIG_NAME).is_file():
        if model_args:
            raise SparsifinerError(
                f"{name} is a saved sparse model and has its own arguments; leave out {', '.join(model_args)}"
            )
        model: Any = from_pretrained(name, img_size=img_size, trust_remote=trust_remote, ready=False)
        if num_classes is not None and num_classes != model.num_classes:
            model.reset_classifier(num_classes)
        return model.eval()
    timm_name = _timm_name(name, trust_remote)
    given, asked = dict(model_args or {}), {"img_size": img_size, "num_classes": num_classes}
    settings: dict[str, Any] = {**given, **{key: v for key, v in asked.items() if v is not None}}
    for key in asked.keys() & given.keys():
        if _as_pair(settings[key]) != _as_pair(given[key]):
            warnings.warn(
                f"model_args say {key}={given[key]}; what is built is {settings[key]}, as the images or the call ask",
                stacklevel=2,
            )
    try:
        pretrained = pretrained or timm_name.startswith(LOCAL)
        model = create_model(timm_name, pretrained=pretrained, **settings).eval()
    except TypeError as error:
        raise SparsifinerError(f"{name} cannot be built with {settings}: {one_line(error)}") from error
    except Exception as error:  # a download can fail in as many ways as there are transports
        if img_size is not None:  # or the weights are those of another size, and no patch fits into this one
            check_image_size(_without_weights(timm_name, settings), img_size)
        raise SparsifinerError(f"the weights of {name} cannot be loaded: {one_line(error)}") from error
    if img_size is not None:
        check_image_size(model, img_size)
    return model


def _as_pair(size: Any) -> Any:
    """Rows and columns where one number stands for both."""
    return (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else size


def _timm_name(name: str, trust_remote: bool) -> str:
    """Name of the model ``name`` for ``timm.create_model``."""
    if (Path(name) / TIMM_CONFIG_NAME).is_file():
        _check_timm_folder(Path(name), trust_remote)
        return f"{LOCAL}{name}"
    if Path(name).is_dir():
        raise SparsifinerError(f"the folder {name} holds no saved model: {CONFIG_NAME} is missing")
    if name == "builtin":
        return BUILTIN
    _check_known(name)
    return name


def _check_timm_folder(folder: Path, trust_remote: bool) -> None:
    """Refuse a folder in timm's format that holds no weights but pickles, or whose description is none of timm's."""
    path = folder / TIMM_CONFIG_NAME
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise SparsifinerError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(settings, dict) or "architecture" not in settings:
        raise SparsifinerError(
            f"{path} does not describe a timm model: it names no architecture; name a folder that train or "
            f"save_pretrained has written"
        )
    if not (folder / TIMM_WEIGHTS_NAME).is_file():
        raise SparsifinerError(
            f"{folder / TIMM_WEIGHTS_NAME} is missing; copy it beside {TIMM_CONFIG_NAME} (pickles are not read)"
        )
    if not trust_remote:
        check_architecture(settings["architecture"], path)
        check_model_args(settings.get("model_args", {}), path)
    pretrained_cfg = settings.get("pretrained_cfg", {})
    if not isinstance(pretrained_cfg, dict):
        raise SparsifinerError(f"pretrained_cfg in {path} must be named settings, got {shown(pretrained_cfg)}")
    check_data(pretrained_cfg, path, "pretrained_cfg.")


def _without_weights(timm_name: str, settings: Mapping[str, Any]) -> nn.Module | None:
    """The model at its own size, without memory; None if that fails, too."""
    try:
        with torch.device("meta"):
            return create_model(timm_name, **{key: v for key, v in settings.items() if key != "img_size"})
    except Exception:
        return None


def _check_known(name: str) -> None:
    architecture = name.split(".")[0]
    if name.startswith(("hf-hub:", "hf_hub:")) or timm.is_model(architecture):
        return
    if "/" in name or os.sep in name:
        raise SparsifinerError(
            f"there is no model folder {name}; name one that train or save_pretrained has written, or hf-hub:{name}"
        )
    near = difflib.get_close_matches(architecture, [*timm.list_models(), "builtin"], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "it is no folder here, and no model of timm.list_models()"
    raise SparsifinerError(f"unknown model {name!r}: {hint}")
