"""The images of a bulk job: a folder, a list file or a Hugging Face data set, in an order that stays the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._utils.digest import digest
from .._utils.messages import one_line
from .._utils.photos import SUFFIXES, Preparation, as_rgb, check_folder, read_photo
from ..errors import SparsifinerError

HUGGING_FACE = "hf/"


@dataclass(frozen=True)
class ImageList:
    """Images by number.

    Args:
        names: of all images, unique.
        folder: where the names are paths from; None for a data set.
        dataset: a data set with ``image(number)``, or None.
    """

    names: list[str]
    folder: Path | None = None
    dataset: Any = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> Any:
        """The image as RGB; errors are those of :func:`read_photo` and of the data set."""
        if self.dataset is not None:
            return as_rgb(self.dataset.image(number))
        return read_photo((self.folder or Path()) / self.names[number])

    def digest(self) -> str:
        """Tells other lists of images from this one, by their names."""
        return digest(iter(["\n".join(self.names)]))


def list_images(source: str | Path, split: str = "train") -> ImageList:
    """The images of ``source``.

    Args:
        source: a folder, with the folders in it; a text file with a path per line, relative to it; ``hf/NAME``, a data
            set of Hugging Face that is on this machine, or ``hf/FOLDER``, one that ``save_to_disk`` has written.
        split: of a data set.

    Raises:
        SparsifinerError: if there is no such source, or it holds no image.
    """
    text = str(source)
    if text.startswith(HUGGING_FACE):
        return _data_set(text.removeprefix(HUGGING_FACE), split)
    path = Path(source)
    if path.is_file():
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SparsifinerError(
                f"the list {path} cannot be read: {one_line(error)}; write a path per line"
            ) from error
        names = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
        found = ImageList(names, path.parent)
    else:
        folder = check_folder(path)
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        found = ImageList([file.relative_to(folder).as_posix() for file in files], folder)
    if not found.names:
        raise SparsifinerError(
            f"{path} holds no image; give a folder of jpg, png, webp, bmp or tif, or a list of paths"
        )
    return found


def _data_set(name: str, split: str) -> ImageList:
    from ..training.sources import open_source

    folder = Path(name)
    saved = folder.is_dir()
    dataset = open_source("hf/" if saved else f"hf/{name}", name if saved else None, split, train=False)
    return ImageList([f"{split}/{number}" for number in range(len(dataset))], dataset=dataset)


class Prepared(Dataset[tuple[int, "Tensor | str"]]):
    """Images as a model takes them, decoded by whoever asks: ``(number, tensor)``, or ``(number, reason)``.

    Args:
        images: all images.
        numbers: those to read, in this order.
        preparation: cuts, resizes and normalises.
    """

    def __init__(self, images: ImageList, numbers: range, preparation: Preparation) -> None:
        self.images, self.numbers, self.preparation = images, numbers, preparation

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        number = self.numbers[place]
        try:
            return number, self.preparation(self.images.read(number))
        except Exception as error:  # decoders raise what they like
            return number, one_line(error)


def one_thread(_: int) -> None:
    """Decoding processes leave the cores to the model."""
    torch.set_num_threads(1)
