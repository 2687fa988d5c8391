"""Which keys each query tile attends to, and what stands in for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pooling import count_unkept, pool_blocks
from .tiling import Tiling


@dataclass(frozen=True)
class Connectivity:
    """The keys that each tile of queries keeps (design of the operator; the paper's mask for 1x1 tiles).

    Args:
        tiling: which queries form a tile. Prefix tokens belong to no tile; their query rows are dense.
        indices: token numbers of the kept keys, int32 ``[B, H, T, K]``, no key twice in a row.
        bias: added to the logits of the kept keys, ``[B, H, T, K]``, or None; ``-inf`` marks padding,
            which is how tiles keep different numbers of keys.
    """

    tiling: Tiling
    indices: Tensor
    bias: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """Entries per tile, padding included."""
        return self.indices.shape[-1]

    def density(self) -> float:
        """Kept query-key pairs over all pairs; the dense query rows of prefix tokens count as kept."""
        tiling = self.tiling
        kept: Tensor | int = self.num_keys
        if self.bias is not None:
            kept = (self.bias > float("-inf")).sum(-1).double().mean((0, 1))
        pairs = (tiling.sizes(self.indices.device).double() * kept).sum().item()
        return (pairs + tiling.num_prefix_tokens * tiling.num_tokens) / tiling.num_tokens**2

    def to_mask(self) -> Tensor:
        """Boolean ``[B, H, N, N]``, True where a query attends to a key. For tests and pictures only."""
        tiling = self.tiling
        batch, heads, tiles, _ = self.indices.shape
        valid = torch.ones_like(self.indices, dtype=torch.bool)
        if self.bias is not None:
            valid = self.bias > float("-inf")
        rows = torch.zeros(batch, heads, tiles, tiling.num_tokens, dtype=torch.int32, device=self.indices.device)
        rows.scatter_add_(-1, self.indices.long(), valid.to(torch.int32))
        patch_rows = (rows > 0)[:, :, tiling.tile_of_patch(rows.device)]
        prefix_rows = patch_rows.new_ones(batch, heads, tiling.num_prefix_tokens, tiling.num_tokens)
        return torch.cat([prefix_rows, patch_rows], dim=2)


@dataclass(frozen=True)
class Tail:
    """Pooled keys and values that stand in for the keys a tile did not keep.

    Args:
        k: mean key of each block, ``[B, H, P, D]``.
        v: mean value of each block, ``[B, H, P, D]``.
        bias: ``log`` of how many keys of the block the tile did not keep, ``[B, H, T, P]``, at least
            float32; ``-inf`` where it kept all of them.
    """

    k: Tensor
    v: Tensor
    bias: Tensor


def pool_tail(
    k: Tensor, v: Tensor, connectivity: Connectivity, block: tuple[int, int], offset: Tensor | None = None
) -> Tail:
    """Pool the keys into blocks of the patch grid, with exact log-counts of what each tile did not keep.

    Prefix tokens are in no block. At a keep rate of 1 every bias is ``-inf`` and the tail vanishes.

    Args:
        k: keys ``[B, H, N, D]``.
        v: values ``[B, H, N, D]``.
        connectivity: the kept keys.
        block: rows and columns of a block.
        offset: added to the bias of each head, ``[H]``, or None; differentiable.

    Raises:
        ValueError: if the patch grid is smaller than a block.
    """
    tiling = connectivity.tiling
    blocks = tiling.regions(block)
    bias = tail_log_counts(connectivity, blocks).to(torch.promote_types(k.dtype, torch.float32))
    if offset is not None:
        bias = bias + offset.to(bias.dtype)[:, None, None]
    return Tail(pool_blocks(k, blocks), pool_blocks(v, blocks), bias)


def tail_log_counts(connectivity: Connectivity, blocks: Tiling) -> Tensor:
    """Log of the number of keys per block that each tile did not keep, float32 ``[B, H, T, P]``."""
    blocks = Tiling(blocks.grid, blocks.tile, connectivity.tiling.num_prefix_tokens)
    return count_unkept(connectivity.indices, connectivity.bias, blocks)
