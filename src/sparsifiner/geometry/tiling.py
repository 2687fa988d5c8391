"""Rectangles of the patch grid: the tiles that share keys, the blocks that are pooled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.cached_tensors import cached_tensors
from ..errors import SparsifinerError


@dataclass(frozen=True)
class Tiling:
    """A cut of a patch grid into rectangles, counted row by row.

    Rectangles at the right and lower border are smaller where the sizes do not divide.

    Args:
        grid: rows and columns of the patch grid.
        tile: rows and columns of a rectangle.
        num_prefix_tokens: tokens (class, registers) that precede the patches in the sequence.

    Raises:
        ValueError: if the grid is smaller than a rectangle.
    """

    grid: tuple[int, int]
    tile: tuple[int, int]
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.grid[0] < self.tile[0] or self.grid[1] < self.tile[1]:
            raise SparsifinerError(
                f"a {self.tile[0]}x{self.tile[1]} tile does not fit the {self.grid[0]}x{self.grid[1]} patch grid; "
                f"use larger images, or smaller query_tile and tail sizes"
            )

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of rectangles."""
        return (-(-self.grid[0] // self.tile[0]), -(-self.grid[1] // self.tile[1]))

    @property
    def num_tiles(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def tile_size(self) -> int:
        """Patches in a whole rectangle."""
        return self.tile[0] * self.tile[1]

    @property
    def divides(self) -> bool:
        """True where no rectangle sticks out of the grid."""
        return self.grid[0] % self.tile[0] == 0 and self.grid[1] % self.tile[1] == 0

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of the whole image's patch grid, pruned tokens included."""
        return self.grid

    @property
    def num_image_prefix_tokens(self) -> int:
        """Prefix tokens of the model itself."""
        return self.num_prefix_tokens

    @property
    def num_missing(self) -> int:
        """Patches of the image that are no longer in the sequence."""
        return 0

    def rectangle(self, size: tuple[int, int]) -> tuple[int, int]:
        """The rectangle of this grid that serves for one of ``size`` patches of the image."""
        return size

    def regions(self, size: tuple[int, int]) -> Tiling:
        """The same patches cut into rectangles of ``size`` instead: the tail's blocks."""
        return Tiling(self.grid, self.rectangle(size), self.num_prefix_tokens)

    def tokens(self, device: torch.device) -> Tensor:
        """Token numbers of each rectangle, int32 ``[T, S]``; -1 where it sticks out of the grid."""
        return _index_tensors(self.grid, self.tile, self.num_prefix_tokens, device)[0]

    def tile_of_patch(self, device: torch.device) -> Tensor:
        """Number of the rectangle each patch lies in, int64 ``[num_patches]``."""
        return _index_tensors(self.grid, self.tile, 0, device)[1]

    def slots(self, device: torch.device) -> Tensor:
        """Position of each patch in :meth:`tokens` flattened, int64 ``[num_patches]``."""
        return _index_tensors(self.grid, self.tile, 0, device)[3]

    def sizes(self, device: torch.device) -> Tensor:
        """Patches in each rectangle, float32 ``[T]``."""
        return _index_tensors(self.grid, self.tile, 0, device)[2]

    def sum_patches(self, x: Tensor) -> Tensor:
        """Sum ``[..., num_patches, d]`` over each rectangle: ``[..., T, d]``."""
        return self._split(x).sum(dim=(-4, -2)).flatten(-3, -2)

    def max_patches(self, x: Tensor) -> Tensor:
        """Maximum of ``[..., num_patches, d]``, not negative, over each rectangle: ``[..., T, d]``."""
        return self._split(x).amax(dim=(-4, -2)).flatten(-3, -2)

    def mean_patches(self, x: Tensor) -> Tensor:
        """Mean of ``[..., num_patches, d]`` over each rectangle: ``[..., T, d]``."""
        if self.divides:
            return self._split(x).mean(dim=(-4, -2)).flatten(-3, -2)
        return self.sum_patches(x) / self.sizes(x.device).to(x.dtype)[:, None]

    def _split(self, x: Tensor) -> Tensor:
        """``[..., num_patches, d]`` to ``[..., rows, tile rows, columns, tile columns, d]``, zero-padded."""
        rows, columns = self.shape
        x = x.unflatten(-2, self.grid)
        if not self.divides:
            below, right = rows * self.tile[0] - self.grid[0], columns * self.tile[1] - self.grid[1]
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return x.unflatten(-3, (rows, self.tile[0])).unflatten(-2, (columns, self.tile[1]))


@cached_tensors
def _index_tensors(
    grid: tuple[int, int], tile: tuple[int, int], num_prefix_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of each rectangle ``[T, S]``, rectangle of each patch ``[num_patches]``, rectangle sizes ``[T]``, and
    where each patch stands in the first of these, ``[num_patches]``."""
    rows, columns = -(-grid[0] // tile[0]), -(-grid[1] // tile[1])
    y = torch.arange(rows * tile[0], device=device).view(rows, 1, tile[0], 1)
    x = torch.arange(columns * tile[1], device=device).view(1, columns, 1, tile[1])
    token = torch.where((y < grid[0]) & (x < grid[1]), num_prefix_tokens + y * grid[1] + x, -1)
    tokens = token.reshape(rows * columns, tile[0] * tile[1]).to(torch.int32)
    row, column = torch.arange(grid[0], device=device).view(-1, 1), torch.arange(grid[1], device=device).view(1, -1)
    tile_of_patch = row // tile[0] * columns + column // tile[1]
    place = tile_of_patch * (tile[0] * tile[1]) + row % tile[0] * tile[1] + column % tile[1]
    return tokens, tile_of_patch.flatten(), (tokens >= 0).sum(dim=1).float(), place.flatten()
