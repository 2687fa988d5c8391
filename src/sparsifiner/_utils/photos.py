"""The images a report is made on: the user's folder or the four bundled photographs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SparsifinerError
from .messages import one_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


CROPPING = "centre, in one step"
"""How :func:`crop` cuts, for results that are only comparable if they were cut alike."""


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
    folder = check_folder(folder)
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


def check_folder(folder: str | Path) -> Path:
    """``folder`` as a path, if there is such a folder.

    Raises:
        ValueError: if it is missing or no folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise SparsifinerError(
            f"the image folder {folder} does not exist; give one that holds jpg, png, webp, bmp or tif"
        )
    if not folder.is_dir():
        raise SparsifinerError(f"{folder} is a file; give the folder that holds the images")
    return folder


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


def crop(image: Image, size: tuple[int, int], share: float = 1.0, interpolation: str = "bicubic") -> Image:
    """The centre of ``image`` as it fills ``size``.

    Args:
        image: a picture.
        size: rows and columns in pixels.
        share: of its height or width, whichever is short, that is seen.
        interpolation: timm's name of how it is resized.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    method = getattr(Pillow.Resampling, interpolation.upper(), Pillow.Resampling.BICUBIC)
    return ImageOps.fit(image, (size[1], size[0]), method, bleed=(1 - share) / 2)


class Preparation:
    """Photographs as a model takes them: cropped, then a tensor ``[channels, rows, columns]``, normalised, float32.

    The same for reports, calibration and validation. What is seen of a photograph, how it is resized and normalised
    follow timm's evaluation, but for the centre crop: timm resizes the whole picture to whole pixels and cuts them out,
    so that its cut is up to half a pixel off the centre; here the part that is seen is resized in one step.

    Args:
        config: timm's data configuration of a model: mean, std, interpolation, crop_pct and crop_mode.
        size: rows and columns in pixels.
        channels: of the model: 3, or 1 for grey.

    Raises:
        ValueError: for other channels, which no photograph has.
    """

    def __init__(self, config: Mapping[str, Any], size: tuple[int, int], channels: int = 3) -> None:
        from timm.data import create_transform

        if channels not in (1, 3):
            raise SparsifinerError(
                f"the model takes images of {channels} channels, and photographs have 3, or 1 in grey; measure it in "
                f"Python on tensors of your own: sparsifiner.measure has the functions"
            )
        self.size, self.mode = size, "RGB" if channels == 3 else "L"
        self.interpolation, crop_pct = config["interpolation"], config["crop_pct"]
        # As timm does, which makes the picture a whole number of pixels: 224 / 0.9 is 248.
        self.share = min(1.0, min(size) / max(1, math.floor(min(size) / crop_pct)))
        steps = create_transform(
            (channels, *size),
            is_training=False,
            interpolation=self.interpolation,
            mean=_per_channel(config["mean"], channels),
            std=_per_channel(config["std"], channels),
            crop_pct=crop_pct,
            crop_mode=config.get("crop_mode"),
        ).transforms
        centred = config.get("crop_mode") in (None, "center")
        self.cut, self.to_numbers = [] if centred else steps[:-2], steps[-2:]

    def crop(self, image: Image) -> Image:
        """What a model sees of ``image``, RGB or grey, in its size."""
        image = image.convert(self.mode)
        if not self.cut:
            return crop(image, self.size, self.share, self.interpolation)
        for step in self.cut:
            image = step(image)
        return image

    def __call__(self, image: Image) -> Tensor:
        numbers: Any = self.crop(image)
        for step in self.to_numbers:
            numbers = step(numbers)
        return numbers


def preprocess(model: nn.Module, size: tuple[int, int]) -> Preparation:
    """The :class:`Preparation` of photographs for ``model``, a timm model, in ``size``, rows and columns in pixels."""
    from timm.data import resolve_model_data_config

    return Preparation(resolve_model_data_config(model), size, input_channels(model))


def input_channels(model: Any) -> int:
    """Channels of the images that a timm model takes."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    return getattr(model, "in_chans", None) or getattr(projection, "in_channels", None) or 3


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number per channel; grey gets the mean of three colours, and a single number is all channels'."""
    if len(values) == 1:
        return tuple(values) * channels
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def read_photo(file: Path, name: str = "") -> Image:
    """One picture as RGB, turned as its camera was held.

    Args:
        file: where it lies.
        name: what a message calls it; its path if empty.

    Raises:
        ValueError: if it is missing or no image.
    """
    try:
        return _read(file)
    except Exception as error:  # PIL's decoders raise what they like on a broken file
        raise SparsifinerError(f"the picture {name or file} cannot be read: {_reason(error)}") from error


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
