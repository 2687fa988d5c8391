"""Find a model by name: the built-in one, a saved folder, or anything timm knows."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .._utils.messages import one_line
from ..errors import SparsifinerError
from ..geometry.patch_grid import check_image_size
from ..saving import CONFIG_NAME, from_pretrained
from .builtin import BUILTIN

TIMM_CONFIG_NAME = "config.json"


def load_model(
    name: str,
    *,
    img_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A pretrained model in evaluation mode.

    Args:
        name: ``builtin``, a timm model name, a folder written by ``save_pretrained``, or one in timm's own
            format (``config.json`` and ``model.safetensors``).
        img_size: height and width in pixels the model is to be built for; its own default if None.
        num_classes: width of the classifier, which starts anew if the weights have another; their own if None.
        pretrained: whether to load the weights of a timm model; a folder's are always loaded.
        model_args: further arguments of ``timm.create_model``.

    Raises:
        ValueError: if there is no such model (near matches are named), its weights cannot be had, or it
            cannot be built for ``img_size``.
    """
    if (Path(name) / CONFIG_NAME).is_file():
        if model_args:
            raise SparsifinerError(
                f"{name} is a saved sparse model and has its own arguments; leave out {', '.join(model_args)}"
            )
        model: Any = from_pretrained(name, img_size=img_size)
        if num_classes is not None and num_classes != model.num_classes:
            model.reset_classifier(num_classes)
        return model.eval()
    timm_name = _timm_name(name)
    asked = {"img_size": img_size, "num_classes": num_classes}
    settings: dict[str, Any] = {**(model_args or {}), **{key: v for key, v in asked.items() if v is not None}}
    try:
        model = timm.create_model(timm_name, pretrained=pretrained or "local-dir:" in timm_name, **settings).eval()
    except TypeError as error:
        raise SparsifinerError(f"{name} cannot be built with {settings}: {one_line(error)}") from error
    except Exception as error:  # a download can fail in as many ways as there are transports
        if img_size is not None:  # or the weights are those of another size, and no patch fits into this one
            check_image_size(_without_weights(timm_name, settings), img_size)
        raise SparsifinerError(f"the weights of {name} cannot be loaded: {one_line(error)}") from error
    if img_size is not None:
        check_image_size(model, img_size)
    return model


def _timm_name(name: str) -> str:
    """What ``timm.create_model`` calls the model ``name``."""
    if (Path(name) / TIMM_CONFIG_NAME).is_file():
        return f"local-dir:{name}"
    if Path(name).is_dir():
        raise SparsifinerError(f"the folder {name} holds no saved model: {CONFIG_NAME} is missing")
    if name == "builtin":
        return BUILTIN
    _check_known(name)
    return name


def _without_weights(timm_name: str, settings: Mapping[str, Any]) -> nn.Module | None:
    """The model at its own size, without memory; None if that fails, too."""
    try:
        with torch.device("meta"):
            return timm.create_model(timm_name, **{key: v for key, v in settings.items() if key != "img_size"})
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
