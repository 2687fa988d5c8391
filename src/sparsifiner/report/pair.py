"""A dense model and its sparse version, as reports and the explorer compare them."""

from __future__ import annotations

import torch
from torch import nn

from ..config import SparsifinerConfig
from ..convert import densify, is_sparse, sparsify
from ..errors import SparsifinerError
from ..models import load_model


def load_pair(
    name: str,
    size: tuple[int, int] | None = None,
    config: SparsifinerConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A dense model and its sparse version, in evaluation mode; a saved sparse model comes with its densified twin.

    Args:
        name: ``builtin``, a timm name, or a folder of ``save_pretrained``.
        size: rows and columns in pixels; the model's own if None.
        config: settings of the sparse version; the training-free default if None. A saved sparse model has its own.
        dtype: of both.
        device: of both; the CPU if None.

    Raises:
        ValueError: if there is no such model, it cannot be converted, or it is sparse and ``config`` is given.
    """
    model = load_model(name, img_size=size).to(device or torch.device("cpu"), dtype).eval()
    if not is_sparse(model):
        return model, sparsify(model, config)
    if config is not None:
        raise SparsifinerError(f"{name} is sparse already and has its own settings; leave --config out")
    return densify(model), model


def own_size(model: nn.Module) -> tuple[int, int]:
    """Rows and columns in pixels of the images that ``model`` was built for.

    Raises:
        ValueError: if it has no size of its own.
    """
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        raise SparsifinerError(f"{type(model).__name__} has no image size of its own; name one with --img-size")
    return (size[0], size[1])
