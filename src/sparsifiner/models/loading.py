"""Find a model by name: the built-in one, a saved folder, or anything timm knows."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..messages import one_line
from ..saving import CONFIG_NAME, from_pretrained
from .builtin import BUILTIN


def load_model(name: str, *, img_size: tuple[int, int] | None = None) -> nn.Module:
    """A pretrained model in evaluation mode.

    Args:
        name: ``builtin``, a folder written by ``save_pretrained``, or a timm model name.
        img_size: height and width in pixels the model is to be built for; its own default if None.

    Raises:
        ValueError: if there is no such model (near matches are named), its weights cannot be had, or it
            cannot be built for ``img_size``.
    """
    if (Path(name) / CONFIG_NAME).is_file():
        return from_pretrained(name, img_size=img_size).eval()
    if Path(name).is_dir():
        raise ValueError(f"the folder {name} holds no saved model: {CONFIG_NAME} is missing")
    timm_name = BUILTIN if name == "builtin" else name
    architecture = timm_name.split(".")[0]
    if not timm_name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [*timm.list_models(), "builtin"], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names all"
        raise ValueError(f"unknown model {name!r}: {hint}")
    settings: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        return timm.create_model(timm_name, pretrained=True, **settings).eval()
    except TypeError as error:
        raise ValueError(f"{name} cannot be built with {settings}: {one_line(error)}") from error
    except Exception as error:  # a download can fail in as many ways as there are transports
        raise ValueError(f"the weights of {name} cannot be loaded: {one_line(error)}") from error
