"""Several frames of one patch grid in a sequence, and the orders in which models lay out their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.cached_tensors import cached_tensors
from ..errors import SparsifinerError
from .tiling import Tiling

Order = Literal["raster", "merge2x2"]


@dataclass(frozen=True, kw_only=True)
class FrameTiling(Tiling):
    """A cut of several frames, one after the other in the sequence, into boxes that cross no frame unasked.

    Operations that know one grid only see the frames below each other, ``num_frames * rows`` by ``columns``.

    Args:
        grid: rows of all frames together, and columns.
        tile: rows of a box, those of all its frames together, and columns.
        num_prefix_tokens: tokens that precede the patches of all frames.
        num_frames: frames in the sequence.
        tile_frames: frames that a box spans.

    Raises:
        SparsifinerError: if a frame is smaller than a box.
    """

    num_frames: int
    tile_frames: int = 1

    @classmethod
    def of(
        cls, grid: tuple[int, int, int], tile: tuple[int, int], num_prefix_tokens: int, tile_frames: int = 1
    ) -> FrameTiling:
        """Boxes of ``tile_frames`` by ``tile`` in ``grid``, which has frames, rows and columns."""
        frames, rows, columns = grid
        return cls(
            (frames * rows, columns), (tile_frames * tile[0], tile[1]), num_prefix_tokens,
            num_frames=frames, tile_frames=tile_frames,
        )  # fmt: skip

    def __post_init__(self) -> None:
        Tiling(self.image_grid, self._box[1:])
        if self.num_frames < self.tile_frames:
            raise SparsifinerError(
                f"tiles of {self.tile_frames} frames do not fit into {self.num_frames}; use a smaller tile_frames"
            )

    @property
    def _frames(self) -> tuple[int, int, int]:
        return (self.num_frames, self.grid[0] // self.num_frames, self.grid[1])

    @property
    def _box(self) -> tuple[int, int, int]:
        return (self.tile_frames, self.tile[0] // self.tile_frames, self.tile[1])

    @property
    def _boxes(self) -> tuple[int, int, int]:
        frames, rows, columns = (-(-size // side) for size, side in zip(self._frames, self._box, strict=True))
        return frames, rows, columns

    @property
    def shape(self) -> tuple[int, int]:
        frames, rows, columns = self._boxes
        return (frames * rows, columns)

    @property
    def divides(self) -> bool:
        return all(size % side == 0 for size, side in zip(self._frames, self._box, strict=True))

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of one frame."""
        return self._frames[1:]

    def regions(self, size: tuple[int, int]) -> FrameTiling:
        return FrameTiling.of(self._frames, size, self.num_prefix_tokens)

    def tokens(self, device: torch.device) -> Tensor:
        return _index_tensors(self._frames, self._box, self.num_prefix_tokens, device)[0]

    def tile_of_patch(self, device: torch.device) -> Tensor:
        return _index_tensors(self._frames, self._box, 0, device)[1]

    def sizes(self, device: torch.device) -> Tensor:
        return _index_tensors(self._frames, self._box, 0, device)[2]

    def slots(self, device: torch.device) -> Tensor:
        return _index_tensors(self._frames, self._box, 0, device)[3]

    def _split(self, x: Tensor) -> Tensor:
        x = x.unflatten(-2, self._frames)
        missing = [-size % side for size, side in zip(self._frames, self._box, strict=True)]
        if any(missing):
            frames, rows, columns = missing
            x = F.pad(x, (0, 0, 0, columns, 0, rows, 0, frames))
        (frames, rows, columns), (depth, height, width) = self._boxes, self._box
        x = x.unflatten(-4, (frames, depth)).unflatten(-3, (rows, height)).unflatten(-2, (columns, width))
        x = x.transpose(-6, -5)  # [..., frames, rows, depth, height, columns, width, d]
        return x.flatten(-7, -6).flatten(-5, -4)

    def fold(self, x: Tensor) -> Tensor:
        """Patches ``[B, H, num_patches, ...]`` to images of one frame, ``[B * num_frames, H, rows * columns, ...]``."""
        return x.unflatten(2, (self.num_frames, -1)).transpose(1, 2).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """What each frame gave, ``[B * num_frames, H, n, ...]``, to ``[B, H, num_frames * n, ...]``."""
        return x.unflatten(0, (-1, self.num_frames)).transpose(1, 2).flatten(2, 3)


@cached_tensors
def _index_tensors(
    grid: tuple[int, int, int], box: tuple[int, int, int], num_prefix_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in ``tiling.py``, for boxes: tokens of each ``[T, S]``, the box of each patch, sizes, slots of the patches."""
    boxes = [-(-size // side) for size, side in zip(grid, box, strict=True)]
    inside = torch.ones((), dtype=torch.bool, device=device)
    token = torch.zeros((), dtype=torch.int64, device=device)
    tile = torch.zeros((), dtype=torch.int64, device=device)
    slot = torch.zeros((), dtype=torch.int64, device=device)
    for axis in range(3):
        shape = [1] * 6
        shape[axis], shape[axis + 3] = boxes[axis], box[axis]
        by_box = torch.arange(boxes[axis] * box[axis], device=device).view(shape)
        inside = inside & (by_box < grid[axis])
        token = token * grid[axis] + by_box
        place = torch.arange(grid[axis], device=device).view([-1 if a == axis else 1 for a in range(3)])
        tile = tile * boxes[axis] + place // box[axis]
        slot = slot * box[axis] + place % box[axis]
    tokens = torch.where(inside, token + num_prefix_tokens, -1).reshape(math.prod(boxes), math.prod(box))
    tokens = tokens.to(torch.int32)
    slots = tile * math.prod(box) + slot
    return tokens, tile.flatten(), (tokens >= 0).sum(dim=1).float(), slots.flatten()


@dataclass(frozen=True)
class TokenLayout:
    """Where a model's sequence has its prefix tokens and patches.

    Args:
        grid: frames, rows and columns.
        num_prefix_tokens: tokens before all patches.
        prefix_per_frame: tokens before the patches of each frame.
        num_suffix_tokens: tokens after all patches.
        order: of the patches of a frame: ``raster`` is row by row; ``merge2x2`` takes the four patches of each 2x2
            block before the next block, row by row of blocks.

    Raises:
        SparsifinerError: if a size is not positive, or 2x2 blocks do not divide the grid.
    """

    grid: tuple[int, int, int]
    num_prefix_tokens: int = 0
    prefix_per_frame: int = 0
    num_suffix_tokens: int = 0
    order: Order = "raster"

    def __post_init__(self) -> None:
        if self.order == "merge2x2" and (self.grid[1] % 2 or self.grid[2] % 2):
            raise SparsifinerError(
                f"order='merge2x2' needs even numbers of rows and columns, got {self.grid[1]}x{self.grid[2]} patches"
            )

    @property
    def num_front_tokens(self) -> int:
        """Tokens that are no patches."""
        return self.num_prefix_tokens + self.prefix_per_frame * self.grid[0] + self.num_suffix_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_front_tokens + math.prod(self.grid)

    def tiling(self, tile: tuple[int, int], tile_frames: int = 1) -> Tiling:
        """Query tiles of the sorted sequence."""
        frames, rows, columns = self.grid
        if frames == 1 and tile_frames == 1:
            return Tiling((rows, columns), tile, self.num_front_tokens)
        return FrameTiling.of(self.grid, tile, self.num_front_tokens, tile_frames)

    @property
    def is_sorted(self) -> bool:
        """True where the sequence has its prefix tokens first, then the patches frame by frame, row by row."""
        one_frame = self.grid[0] == 1
        return self.order == "raster" and not self.num_suffix_tokens and (one_frame or not self.prefix_per_frame)

    def sort(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with the tokens along ``dim`` sorted: those that are no patches, then the patches row by row."""
        return x if self.is_sorted else x.index_select(dim, _orders(self, x.device)[0])

    def unsort(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`sort`."""
        return x if self.is_sorted else x.index_select(dim, _orders(self, x.device)[1])


@cached_tensors
def _orders(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token that comes ``i``-th when sorted, and where token ``i`` comes then."""
    frames, rows, columns = layout.grid
    start = layout.num_prefix_tokens
    every = torch.arange(start, start + frames * (layout.prefix_per_frame + rows * columns), device=device)
    by_frame = every.view(frames, -1)
    own, patches = by_frame[:, : layout.prefix_per_frame], by_frame[:, layout.prefix_per_frame :]
    if layout.order == "merge2x2":
        patches = patches.reshape(frames, rows // 2, columns // 2, 2, 2).transpose(2, 3)
    prefix = torch.arange(start, device=device)
    suffix = torch.arange(layout.num_tokens - layout.num_suffix_tokens, layout.num_tokens, device=device)
    order = torch.cat([prefix, own.flatten(), suffix, patches.flatten()])
    return order, torch.argsort(order)
