"""Long sequences: blocks of four keys are scored first, single keys only in the best blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry.tiling import Tiling
from ..ops.pooling import distance_from_block, pool_blocks

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


@dataclass(frozen=True)
class Screening:
    """What is known of the blocks, to choose those whose keys are scored one by one.

    Args:
        blocks: blocks of the patch grid.
        num_blocks: blocks to choose per tile.
        means: mean key of each block, ``[B, H, P, D]``.
        spread: mean square distance of a block's keys from it per element, ``[B, H, P]``.
        stakes: highest factor on the probabilities of a block's keys, ``[B, H, P]``, or None.
    """

    blocks: Tiling
    num_blocks: int
    means: Tensor
    spread: Tensor
    stakes: Tensor | None

    @classmethod
    def of(cls, k: Tensor, stakes: Tensor | None, tiling: Tiling, num_blocks: int) -> Screening:
        """Means and spread of the keys ``k`` ``[B, H, N, D]``; ``stakes`` are per patch, ``[B, H, N - prefix]``."""
        blocks = screening_blocks(tiling)
        distance = distance_from_block(k, blocks)[:, :, blocks.num_prefix_tokens :]
        spread = blocks.mean_patches(distance.square()[..., None])[..., 0] / k.shape[3]
        if stakes is not None:
            block_of_patch = blocks.tile_of_patch(k.device).expand_as(stakes)
            highest = stakes.new_zeros((*stakes.shape[:2], blocks.num_tiles))
            stakes = highest.scatter_reduce(2, block_of_patch, stakes, "amax")
        return cls(blocks, num_blocks, pool_blocks(k, blocks), spread, stakes)

    def choose(self, pooled: Tensor, by_sum: bool) -> Tensor:
        """The patches whose keys are scored one by one.

        A block scores as if it were one key: its logit is that of the mean key plus the variance that its keys'
        spread gives the logits, so that a block with one key that matters does not vanish behind three others.

        Args:
            pooled: pooled queries, scaled, ``[B, H, T, G, D]``.
            by_sum: merge the probabilities of a tile's queries by sum instead of max.

        Returns:
            Boolean ``[B, H, T, num_patches]``.
        """
        logits = (
            pooled @ self.means[:, :, None].mT + pooled.square().sum(-1, keepdim=True) * self.spread[:, :, None, None]
        )
        weights = logits.softmax(-1)
        needed = weights.sum(3) if by_sum else weights.amax(3)
        if self.stakes is not None:
            needed = needed * self.stakes[:, :, None]
        best = needed.topk(self.num_blocks, dim=-1).indices
        chosen = torch.zeros_like(needed, dtype=torch.bool).scatter_(-1, best, True)
        return chosen[..., self.blocks.tile_of_patch(pooled.device)]
