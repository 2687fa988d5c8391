"""Long sequences: how many blocks of four keys are worth a look at their single keys."""

from __future__ import annotations

import math

from ..geometry.tiling import Tiling

BLOCK = (2, 2)


def screening_blocks(tiling: Tiling) -> Tiling:
    """The blocks of keys that are scored first."""
    return tiling.regions(BLOCK)


def num_screened_blocks(tiling: Tiling, count: int) -> int | None:
    """Blocks per tile whose keys are scored one by one, or None where that would be half of them or more.

    They hold about twice the ``count`` keys that are kept and a tenth of all keys. With fewer, the features of a
    model move away from those that scoring every key gives (``docs/performance.md``).
    """
    if tiling.grid[0] < tiling.rectangle(BLOCK)[0] or tiling.grid[1] < tiling.rectangle(BLOCK)[1]:
        return None
    blocks = screening_blocks(tiling)
    empty = blocks.num_tiles * blocks.tile_size - tiling.num_patches  # places of blocks that stick out of the grid
    number = math.ceil((2 * count + tiling.num_patches / 10 + empty) / blocks.tile_size)
    return None if number >= blocks.num_tiles / 2 else number
