"""Batches for training and validation, the same ones each time: order and augmentation follow from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .._utils.messages import one_line
from .._utils.photos import Preparation
from ..errors import SparsifinerError
from ..measure.accuracy import Batch
from .randomness import seed_of, seeded
from .sources import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

    from .recipe import AugmentConfig

Transform = Callable[["Image"], Tensor]


class Samples(Dataset[Any]):
    """Transformed images, each with randomness of its own that depends on nothing but seed, epoch and number.

    Args:
        source: the images.
        transform: an image to ``[3, H, W]``.
        seed: of the run.
        replace_broken: give the next readable image in the place of a broken one, so that batches keep their
            size (training); otherwise it is left out (validation).
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int, *, replace_broken: bool) -> None:
        self.source, self.transform, self.seed, self.replace_broken = source, transform, seed, replace_broken

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor | None, int, int, dict[str, str]]:
        epoch, wanted = place
        broken: dict[str, str] = {}
        for number in chain(range(wanted, len(self)), range(wanted)):
            try:
                image = self.source.image(number)
            except Exception as error:  # decoders raise what they like on a broken file
                broken[self.source.name(number)] = one_line(error)
                if not self.replace_broken:
                    return None, -1, wanted, broken
                continue
            with seeded(self.seed, epoch, wanted):
                return self.transform(image), self.source.label(number), wanted, broken
        raise SparsifinerError(f"none of the {len(self)} images can be read; the first: {next(iter(broken.items()))}")


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Places ``(epoch, number)`` of one process's batches, from any batch on to the last.

    Each epoch is a permutation by its own seed; the rest that fills no optimiser step is left out. The processes
    share each global batch: process ``r`` of ``P`` takes its ``r``-th part.

    Args:
        length: images.
        batch_size: images per process and batch.
        batches_per_epoch: batches per process.
        total: batches per process in all.
        start: the first batch to give.
        seed: numbers that tell this run and phase from others.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        batches_per_epoch: int,
        total: int,
        *,
        start: int = 0,
        seed: tuple[int, ...] = (0,),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.batch_size, self.per_epoch, self.total = length, batch_size, batches_per_epoch, total
        self.start, self.seed, self.rank, self.world = start, seed, rank, world

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        current = -1
        for number in range(self.start, self.total):
            epoch, batch = divmod(number, self.per_epoch)
            if epoch != current:
                generator = torch.Generator().manual_seed(seed_of(*self.seed, epoch))
                order, current = torch.randperm(self.length, generator=generator).tolist(), epoch
            first = (batch * self.world + self.rank) * self.batch_size
            yield [(epoch, place) for place in order[first : first + self.batch_size]]


def train_loader(samples: Samples, batches: TrainBatches, workers: int) -> DataLoader[Batch]:
    """The batches of ``batches`` in order, decoded by ``workers`` processes (0: this one)."""
    return _loader(samples, batches, workers)


def validation_loader(
    samples: Samples, batch_size: int, workers: int, *, rank: int = 0, world: int = 1
) -> DataLoader[Batch]:
    """Every image once; process ``rank`` of ``world`` gets its share of them."""
    places = [(0, number) for number in range(rank, len(samples), world)]
    batches = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
    return _loader(samples, batches, workers)


def _loader(samples: Samples, batches: Any, workers: int) -> DataLoader[Batch]:
    pin = torch.cuda.is_available()
    # The loader draws a seed for its workers; from a generator of its own, the global one stays untouched.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        samples, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin, generator=generator
    )


def collate(samples: list[tuple[Tensor | None, int, int, dict[str, str]]]) -> Batch:
    """Samples to a batch; those that could not be read are left out."""
    broken: dict[str, str] = {}
    for _, _, _, names in samples:
        broken.update(names)
    kept = [(image, label, number) for image, label, number, _ in samples if image is not None]
    images = torch.stack([image for image, _, _ in kept]) if kept else torch.empty(0)
    labels = torch.tensor([label for _, label, _ in kept], dtype=torch.long)
    return Batch(images, labels, torch.tensor([number for _, _, number in kept], dtype=torch.long), broken)


def mixing(augment: AugmentConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup and cutmix of a batch ``[B, 3, H, W]`` and its class numbers ``[B]``, to shares; None where off."""
    if not augment.mixes:
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=max(1, num_classes),
    )


def train_transform(
    config: AugmentConfig, size: tuple[int, int], normalisation: dict[str, Any], channels: int = 3
) -> Transform:
    """timm's augmentation as ``config`` wants it.

    Args:
        config: what to do.
        size: rows and columns in pixels.
        normalisation: timm's data configuration of the model: mean, std, interpolation.
        channels: of the model.

    Raises:
        ValueError: for other models than those of colour images.
    """
    if channels != 3:
        raise SparsifinerError(f"training takes models of 3 input channels, and this one has {channels}")
    from timm.data import create_transform

    return create_transform(
        (3, *size),
        is_training=True,
        scale=config.crop_scale,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=normalisation["interpolation"],
        mean=normalisation["mean"],
        std=normalisation["std"],
        re_prob=config.random_erasing,
        re_mode="pixel",
    )


def validation_transform(size: tuple[int, int], normalisation: dict[str, Any], channels: int = 3) -> Transform:
    """Photographs as reports see them, too, and as the model's own configuration says."""
    return Preparation(normalisation, size, channels)
