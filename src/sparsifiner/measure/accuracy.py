"""Accuracy on labelled images, with the interval that the number of images leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SparsifinerError

Z95 = 1.959964  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Batch:
    """Images and what is known of them.

    Args:
        images: ``[B, 3, H, W]``.
        labels: class numbers ``[B]``, -1 without labels.
        numbers: which images of their source these are, ``[B]``.
        broken: name and reason of each image that could not be read.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    broken: dict[str, str]

    def pin_memory(self) -> Batch:
        """Called by the loader, so that copies to a GPU need not wait."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.numbers, self.broken)


@dataclass(frozen=True)
class Accuracy:
    """Counts over a data set.

    Args:
        images: how many were classified.
        top1: how many had their class first.
        top5: how many had it among the first five.
        loss: mean cross-entropy.
        broken: name and reason of the images that could not be read; they are not counted.
    """

    images: int
    top1: int
    top5: int
    loss: float
    broken: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; shares with their 95 % Wilson intervals."""
        return {
            "images": self.images,
            "top1": self.top1 / self.images,
            "top1_interval": list(wilson_interval(self.top1, self.images)),
            "top5": self.top5 / self.images,
            "top5_interval": list(wilson_interval(self.top5, self.images)),
            "loss": self.loss,
            "broken": len(self.broken),
        }


def wilson_interval(hits: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Confidence interval of a share (Wilson, 1927): sound near 0 and 1, where the normal one is not.

    Args:
        hits: successes.
        trials: of so many, at least 1.
        z: quantile of the normal distribution; 95 % by default.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise SparsifinerError(f"hits must lie between 0 and trials, which is at least 1; got {hits} of {trials}")
    share, spread = hits / trials, z * z / trials
    centre = share + spread / 2
    half = z * math.sqrt((share * (1 - share) + spread / 4) / trials)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return (0.0 if hits == 0 else low, 1.0 if hits == trials else high)


def paired_drop(before: Tensor, after: Tensor, z: float = Z95) -> tuple[float, tuple[float, float]]:
    """Accuracy that one model loses against another on the same images, with its confidence interval.

    Only images on which the two disagree tell anything, so the interval is much narrower than those of the two
    accuracies. It is Wald's for paired shares with half an image added to each of the four counts, which keeps it
    honest where they hardly disagree (Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine, 2005).

    Args:
        before: whether the first model was right, ``[n]``, boolean.
        after: the same of the second.
        z: quantile of the normal distribution; 95 % by default.

    Returns:
        The share of ``before`` less that of ``after``, and its interval, both within -1 and 1.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise SparsifinerError(
            f"a paired comparison needs the same images, got {list(before.shape)} and {list(after.shape)}"
        )
    lost, won, images = int((before & ~after).sum()), int((after & ~before).sum()), len(before)
    total = images + 2
    centre = (lost - won) / total
    half = z * math.sqrt(((lost + won + 1) - (lost - won) ** 2 / total) / total**2)
    return (lost - won) / images, (max(-1.0, centre - half), min(1.0, centre + half))


@torch.inference_mode()
def count_correct(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
    progress: Callable[[int], None] = lambda done: None,
    each: Callable[[Batch, Tensor], None] | None = None,
) -> Accuracy:
    """Classify every image once; the model is put into evaluation mode.

    Args:
        model: images ``[B, 3, H, W]`` to logits ``[B, classes]``.
        batches: with labels.
        device: where the model is.
        reduce: sums counts ``[4]`` over processes.
        progress: told how many batches are done.
        each: told of every batch which of its images had their class first, ``[B]``, boolean.

    Raises:
        ValueError: if there is no labelled image, or a label the model has no class for.
    """
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64)
    broken: dict[str, str] = {}
    for number, batch in enumerate(batches):
        broken.update(batch.broken)
        if len(batch.images):
            logits = model(batch.images.to(device, non_blocking=True)).float()
            labels = batch.labels.to(device)
            _check_labels(logits, labels)
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            found = (torch.tensor(float(len(labels))), best[:, 0].sum(), best.any(-1).sum(), loss)
            counts += torch.stack([value.double().cpu() for value in found])
            if each is not None:
                each(batch, best[:, 0].cpu())
        progress(number + 1)
    counts = reduce(counts)
    images = int(counts[0])
    if not images:
        raise SparsifinerError("there is no readable image to validate on")
    return Accuracy(images, int(counts[1]), int(counts[2]), float(counts[3]) / images, broken)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or not logits.shape[-1] or int(labels.max()) >= logits.shape[-1] or int(labels.min()) < 0:
        raise SparsifinerError(
            f"the labels reach from {int(labels.min())} to {int(labels.max())}, but the model's logits have shape "
            f"{list(logits.shape)}; the data must be labelled with the model's own classes"
        )
