"""The images a calibration looks at: a folder, paths, tensors or a data loader, as single preprocessed images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.photos import input_channels, load_photos, preprocess, read_photo
from ..convert import sparse_layers
from ..errors import SparsifinerError
from ..geometry.patch_grid import check_size

Images = str | Path | Tensor | Sequence[str | Path] | Iterable[Any]


def load_images(
    model: nn.Module, images: Images, limit: int | None, size: int | tuple[int, int] | None
) -> list[Tensor]:
    """Images ``[1, 3, height, width]``, float32.

    Args:
        model: a sparse model; pictures are resized and normalised for it.
        images: a folder of pictures, a list of picture files, a tensor ``[B, 3, height, width]`` of preprocessed
            images, or an iterable of such tensors, of single images ``[3, height, width]``, or of tuples that
            start with either (a ``DataLoader`` with labels, which are ignored). Pictures that cannot be read are
            skipped with a warning.
        limit: how many to take at most; an iterable is read no further.
        size: rows and columns in pixels that pictures are brought to, or one number for both; the model's own if
            None.

    Raises:
        ValueError: if there is no image, an entry is none of these, or one is not what the model takes; the message
            says which.
    """
    if isinstance(images, (str, Path)):
        found = load_photos(images, limit)
        if found.skipped:
            name, reason = next(iter(found.skipped.items()))
            warnings.warn(f"{len(found.skipped)} files skipped, such as {name}: {reason}", stacklevel=3)
        transform = preprocess(model, _size(model, size))
        return [transform(photo.image)[None] for photo in found.photos]
    if isinstance(images, Tensor):
        images = [images]
    if not isinstance(images, Iterable):
        raise SparsifinerError(
            f"images must be a folder, picture files, tensors or a data loader, got {type(images).__name__}"
        )
    result: list[Tensor] = []
    skipped: list[str] = []
    for number, entry in enumerate(images):
        if limit is not None and len(result) >= limit:
            break
        if isinstance(entry, (str, Path)):
            transform = preprocess(model, _size(model, size))
            try:
                photo = read_photo(Path(entry))
            except ValueError as error:
                skipped.append(str(error))
            else:
                result.append(transform(photo)[None])
            continue
        batch = entry[0] if isinstance(entry, (tuple, list)) and entry else entry
        if not isinstance(batch, Tensor) or batch.ndim not in (3, 4) or not batch.is_floating_point():
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise SparsifinerError(
                f"images: entry {number} must be a float tensor [B, 3, height, width] or [3, height, width], got {got}"
            )
        if not torch.isfinite(batch).all():
            raise SparsifinerError(f"images: entry {number} holds values that are not finite")
        _refuse_misfits(model, f"entry {number}", batch.shape[-3:])
        result += [image[None] for image in (batch if batch.ndim == 4 else batch[None]).detach().cpu().float()]
    if skipped and not result:
        raise SparsifinerError(f"there is no image left to calibrate on; {skipped[0]}")
    if skipped:
        warnings.warn(f"{len(skipped)} files skipped, such as this: {skipped[0]}", stacklevel=3)
    if not result:
        raise SparsifinerError("there is no image to calibrate on; give a few dozen")
    return result[:limit]


def _size(model: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    grid = next(iter(sparse_layers(model).values())).grid
    if size is None:
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None) or (
            grid.shape[0] * grid.patch_size[0],
            grid.shape[1] * grid.patch_size[1],
        )
    elif isinstance(size, int):
        size = (size, size)
    check_size(size, grid.patch_size)
    _refuse_misfits(model, "pictures", (1 if input_channels(model) == 1 else 3, *size))
    return size


def _refuse_misfits(model: Any, what: str, shape: Sequence[int]) -> None:
    """Refuse images ``[channels, height, width]`` that the model cannot take."""
    channels, size = shape[0], (shape[1], shape[2])
    wanted = getattr(model, "in_chans", channels)
    if channels != wanted:
        raise SparsifinerError(f"images: {what} of {channels} channels do not fit the model, which takes {wanted}")
    embed = getattr(model, "patch_embed", None)
    own = getattr(embed, "img_size", None)
    if own is not None and getattr(embed, "strict_img_size", False) and size != tuple(own):
        raise SparsifinerError(
            f"images: {what} of {size[0]}x{size[1]} pixels do not fit the model, which takes {own[0]}x{own[1]}; "
            f"give that size, or build the model with dynamic_img_size=True"
        )
    if not getattr(embed, "dynamic_img_pad", False):
        check_size(size, next(iter(sparse_layers(model).values())).grid.patch_size)
