"""State of one forward pass that attention layers and blocks share."""

from __future__ import annotations

import torch
from torch import Tensor


def num_tokens_of(x: Tensor) -> int:
    """Length of ``[B, N, C]`` as a key of its state, which a size that ``torch.jit.trace`` follows cannot be."""
    return int(x.shape[1]) if torch.jit.is_tracing() else x.shape[1]


class ForwardPass:
    """The patch grid of the images under way, and which of their tokens are left.

    Args:
        shape: rows and columns of the patch grid.
        num_frames: frames of that grid in the sequence.

    Attributes:
        kept: raster numbers of the patches each image still holds, int64 ``[B, n]``, by length of the sequence.
        sizes: patches that each token stands for, float32 ``[B, N]``, by length of the sequence.
        place: the thread and the block that it left last; None before the first block.
        entered: the blocks it has entered, by ``id``.
    """

    def __init__(self, shape: tuple[int, int], num_frames: int = 1) -> None:
        self.shape = shape
        self.num_frames = num_frames
        self.kept: dict[int, Tensor] = {}
        self.sizes: dict[int, Tensor] = {}
        self.place: tuple[int, int] | None = None
        self.entered: set[int] = set()

    @property
    def num_patches(self) -> int:
        return self.num_frames * self.shape[0] * self.shape[1]

    def copy(self) -> ForwardPass:
        """The same state, which goes its own way from here."""
        other = ForwardPass(self.shape, self.num_frames)
        other.kept, other.sizes = dict(self.kept), dict(self.sizes)
        return other

    def may_hold(self, num_tokens: int, num_prefix_tokens: int) -> bool:
        """A sequence of ``num_tokens`` tokens may belong to it."""
        return num_tokens == num_prefix_tokens + self.num_patches or num_tokens in {*self.kept, *self.sizes}

    def agrees(self, other: ForwardPass) -> bool:
        """Either serves for the other: the same grid, and nothing that only one of them knows."""
        return self is other or (
            (self.shape, self.num_frames) == (other.shape, other.num_frames)
            and not (self.kept or self.sizes or other.kept or other.sizes)
        )
