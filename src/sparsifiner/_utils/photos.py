"""The images a report is made on: the user's folder or the four bundled photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SparsifinerError
from .messages import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Photo:
    """A decoded picture: its path below the folder and the RGB image as it was taken."""

    name: str
    image: Image


@dataclass(frozen=True)
class Photos:
    """Pictures of one folder.

    Args:
        photos: those that could be read.
        skipped: file name and reason of those that could not.
        source: the folder, or what else they are.
    """

    photos: list[Photo]
    skipped: dict[str, str] = field(default_factory=dict)
    source: str = ""


def load_photos(folder: str | Path, limit: int | None = None) -> Photos:
    """Read the pictures of a folder and of the folders in it, hidden ones aside.

    They come sorted by name, the first of each folder before the second of any, so that a few of a folder per class
    are of all classes. An unreadable picture is skipped and named in the result; the next one takes its place in
    ``limit``.

    Args:
        folder: where they lie; jpg, png, webp, bmp or tif.
        limit: how many at most.

    Raises:
        ValueError: if the folder is missing, is no folder, or holds no readable picture.
    """
    folder = Path(folder)
    if not folder.exists():
        raise SparsifinerError(
            f"the image folder {folder} does not exist; give one that holds jpg, png, webp, bmp or tif"
        )
    if not folder.is_dir():
        raise SparsifinerError(f"{folder} is a file; give the folder that holds the images")
    try:
        files = _pictures(folder)
    except OSError as error:
        raise SparsifinerError(f"the image folder {folder} cannot be read: {error.strerror}") from error
    if not files:
        raise SparsifinerError(f"the folder {folder} holds no image; expected jpg, png, webp, bmp or tif files in it")
    photos: list[Photo] = []
    skipped: dict[str, str] = {}
    for file in files:
        if limit is not None and len(photos) == limit:
            break
        try:
            photos.append(Photo(_name(file, folder), _read(file)))
        except Exception as error:  # PIL's decoders raise what they like on a broken file
            skipped[_name(file, folder)] = _reason(error)
    if not photos:
        name, reason = next(iter(skipped.items()))
        raise SparsifinerError(
            f"none of the {len(files)} images in {folder} can be read; the first is {name}: {reason}"
        )
    return Photos(photos, skipped, str(folder))


def _pictures(folder: Path) -> list[Path]:
    ranked: list[tuple[int, Path]] = []
    count: dict[Path, int] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts[:-1])
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            count[file.parent] = count.get(file.parent, -1) + 1
            ranked.append((count[file.parent], file))
    return [file for _, file in sorted(ranked)]


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def bundled_photos(limit: int | None = None) -> Photos:
    """The four free photographs that come with the package (``data/photos/LICENSES.md``)."""
    with resources.as_file(resources.files("sparsifiner") / "data" / "photos") as folder:
        loaded = load_photos(folder, limit)
    return Photos(loaded.photos, loaded.skipped, "bundled photographs")


def crop(image: Image, size: tuple[int, int]) -> Image:
    """Resize the shorter side and crop the centre: ``image`` as it fills ``size``, rows and columns in pixels."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    return ImageOps.fit(image, (size[1], size[0]), Pillow.Resampling.BICUBIC)


def preprocess(model: nn.Module, size: tuple[int, int]) -> Callable[[Image], Tensor]:
    """A function from an RGB image to ``[3, rows, columns]``, normalised as the model expects, float32.

    Args:
        model: a timm model; mean and standard deviation are those of its own configuration.
        size: rows and columns in pixels.
    """
    import numpy
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))

    def transform(image: Image) -> Tensor:
        pixels = torch.from_numpy(numpy.array(crop(image, size))).permute(2, 0, 1).float() / 255
        return (pixels - mean) / std

    return transform


def read_photo(file: Path) -> Image:
    """One picture as RGB, turned as its camera was held.

    Raises:
        ValueError: if it is missing or no image.
    """
    try:
        return _read(file)
    except Exception as error:  # PIL's decoders raise what they like on a broken file
        raise SparsifinerError(f"the picture {file} cannot be read: {_reason(error)}") from error


def as_rgb(image: Image) -> Image:
    """``image`` in RGB with 8 bits; 16-bit grey is scaled, where Pillow would cut it off at 255.

    Raises:
        ValueError: if its numbers have no known white: floats, or whole numbers beyond 16 bits.
    """
    import numpy
    from PIL import Image as Pillow

    if image.mode == "F":
        raise SparsifinerError("it holds floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = numpy.asarray(image).astype("int32")
        if pixels.min() < 0 or pixels.max() > 65535:
            raise SparsifinerError("it holds whole numbers beyond 16 bits; save it with 8 or 16 bits")
        image = Pillow.fromarray(((pixels + 128) // 257).astype("uint8"))
    return image.convert("RGB")


def _read(file: Path) -> Image:
    from PIL import Image as Pillow
    from PIL import ImageOps

    with Pillow.open(file) as opened:
        return as_rgb(ImageOps.exif_transpose(opened))


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return one_line(error)
