"""Sequences that lost tokens: which patches each image still holds, and how they form tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.cached_tensors import cached_tensors
from .tiling import Tiling


@dataclass(frozen=True, eq=False, kw_only=True)
class SubsetTiling(Tiling):
    """Tiles of consecutive tokens where each image kept other patches, though equally many.

    The survivors lie along a Z-order curve of the patch grid, so that neighbours in the sequence are neighbours in
    the image: a run of 16 of them stands in for a 4x4 tile, or for a 4x4 block of the tail, which so counts
    only what is there. To the operator it is a grid of one row. A fused token, where there is one,
    counts as the last prefix token: every query tile may attend to it, and its own row is dense.

    Args:
        grid: one row and as many columns as patches were kept.
        tile: one row and as many columns as the image's tile has patches, as far as there are so many.
        num_prefix_tokens: the model's own and the fused token.
        image_shape: rows and columns of the image's patch grid.
        positions: raster numbers of the kept patches, int64 ``[B, n]``, in the order of the sequence.
        fused: whether the sequence holds a fused token.
    """

    image_shape: tuple[int, int]
    positions: Tensor
    fused: bool

    @classmethod
    def of(
        cls,
        positions: Tensor,
        image_shape: tuple[int, int],
        tile: tuple[int, int],
        num_prefix_tokens: int,
        num_tokens: int,
    ) -> SubsetTiling:
        """The tiles of a sequence of ``num_tokens`` tokens, ``num_prefix_tokens`` of them the model's own prefix."""
        kept = positions.shape[1]
        fused = bool(num_tokens - num_prefix_tokens - kept == 1)  # a tensor where torch.jit.trace follows sizes
        return cls(
            (1, kept),
            (1, min(kept, math.prod(tile))),
            num_prefix_tokens + fused,
            image_shape=image_shape,
            positions=positions,
            fused=fused,
        )

    @property
    def image_grid(self) -> tuple[int, int]:
        return self.image_shape

    @property
    def num_image_prefix_tokens(self) -> int:
        return self.num_prefix_tokens - self.fused

    @property
    def num_missing(self) -> int:
        return math.prod(self.image_shape) - self.num_patches

    def rectangle(self, size: tuple[int, int]) -> tuple[int, int]:
        return (1, min(self.num_patches, math.prod(size)))

    def rows(self, weight: Tensor, *, total: bool) -> Tensor:
        """Rows of a table with one row per token of the whole image, for the tokens that are present.

        The fused token takes the sum (``total``) or the mean of the rows of the patches that are gone.

        Args:
            weight: ``[N of the whole image, d]``.
            total: whether the table's rows are summed over the keys.

        Returns:
            ``[B, N, d]``.
        """
        first = self.num_image_prefix_tokens
        batch = self.positions.shape[0]  # len() would fix the batch of an exported program
        prefix, patches = weight[:first].expand(batch, -1, -1), weight[first:]
        kept = patches[self.positions]
        if not self.fused:
            return torch.cat([prefix, kept], dim=1)
        gone = (patches.sum(0) - kept.sum(1))[:, None]
        return torch.cat([prefix, gone if total else gone / self.num_missing, kept], dim=1)

    def coordinates(self) -> Tensor:
        """Row and column of each kept patch, float32 ``[B, n, 2]``."""
        columns = self.image_shape[1]
        return torch.stack([self.positions // columns, self.positions % columns], dim=-1).float()

    def tile_centres(self) -> Tensor:
        """Mean row and column of the patches of each tile, float32 ``[B, T, 2]``."""
        return self.mean_patches(self.coordinates())


def z_order(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Place of each patch along the Z-order (Morton) curve of the grid, int64 ``[num_patches]``, with gaps."""
    if torch.jit.is_tracing():  # whose sizes are tensors
        grid = (int(grid[0]), int(grid[1]))
    return _z_order(grid).to(device)


@cached_tensors
def _z_order(grid: tuple[int, int]) -> Tensor:
    row = torch.arange(grid[0], device="cpu")[:, None]
    column = torch.arange(grid[1], device="cpu")[None, :]
    place = torch.zeros(grid, dtype=torch.int64, device="cpu")
    for bit in range(max(grid).bit_length()):
        place += ((column >> bit) & 1) << (2 * bit)
        place += ((row >> bit) & 1) << (2 * bit + 1)
    return place.flatten()
