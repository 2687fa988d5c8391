"""Texts given on the command line as values, each mistake refused in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import SparsifinerError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = {
    "data.path": "--data",
    "data.source": "--source",
    "data.train_split": "--train-split",
    "; or set data.val_split=null": "",
    "data.val_split": "--split",
    "data.img_size": "--img-size",
    "data.download=true": "--download",
}
"""Names of a command's options in a recipe, whose words messages use."""


def parse_keep_rates(text: str | None) -> tuple[float, ...]:
    """``"0.05,0.1"`` as numbers in (0, 1]; empty for None."""
    if text is None:
        return ()
    rates = []
    for part in _parts(text, "--keep-rate", "0.05,0.1"):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not 0 < rate <= 1:
            raise SparsifinerError(f"keep rate {part!r} must be a number in (0, 1]; 0.1 keeps a tenth of the keys")
        rates.append(rate)
    return tuple(dict.fromkeys(rates))


def parse_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """``"518,480x640"`` as rows and columns in pixels; empty for None."""
    if text is None:
        return ()
    sizes = []
    for part in _parts(text, "--img-size", "518,1036"):
        match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", part)
        if match is None or not all(int(side) for side in match.groups(default="1")):
            raise SparsifinerError(f"image size {part!r} must be pixels such as 518, or rows x columns: 480x640")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(dict.fromkeys(sizes))


def parse_one_size(text: str | None, command: str) -> tuple[int, int] | None:
    """:func:`parse_sizes` for a ``command`` that takes a single size; None for None."""
    sizes = parse_sizes(text)
    if len(sizes) > 1:
        raise SparsifinerError(f"--img-size {text!r} names several sizes; {command} takes one")
    return sizes[0] if sizes else None


@contextmanager
def option_words() -> Iterator[None]:
    """Errors about the settings of a recipe in the words of a command that has options for them."""
    try:
        yield
    except SparsifinerError as error:
        text = str(error)
        for setting, option in OPTIONS.items():
            text = text.replace(setting, option)
        raise SparsifinerError(text) from error


def _parts(text: str, option: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise SparsifinerError(f"{option} {text!r} has an empty entry; expected a list such as {example}")
    return parts


def check_dtype(name: str) -> None:
    """Refuse a dtype that no model can be run in."""
    if name not in DTYPES:
        raise SparsifinerError(f"dtype {name!r} is unknown; choose {', '.join(DTYPES)}")


def check_device(name: str) -> None:
    """Refuse what is no name of a CPU or of a CUDA GPU; whether there is one is for :func:`parse_device` to say."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise SparsifinerError(f"device {name!r} is unknown; choose cpu or cuda, or a GPU by number: cuda:1")


def parse_device(name: str) -> torch.device:
    """The device of that name, which has to be the CPU or a CUDA GPU that torch sees."""
    import torch

    check_device(name)
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise SparsifinerError("device cuda cannot be used: torch sees no CUDA GPU here; choose cpu")
        if device.index is not None and device.index >= count:
            raise SparsifinerError(f"device {name} cannot be used: the highest GPU here is cuda:{count - 1}")
    return device


def check_files(config: Path | None = None, images: Path | None = None, recipe: Path | None = None) -> None:
    """Refuse files that are missing or hold no settings before anything slow is imported; None is no file."""
    from .._utils.settings_files import read_configuration, read_recipe

    if config is not None:
        read_configuration(config)
    if recipe is not None:
        read_recipe(recipe)
    if images is not None:
        from .._utils.photos import check_folder

        check_folder(images)
