"""Stand-ins for the keys that were not kept: groups of keys, each with a mean key and a mean value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.frames import FrameTiling
from ..geometry.tiling import Tiling
from .block_distances import block_distances
from .connectivity import Connectivity
from .count_unkept import count_unkept
from .group_patches import group_patches
from .pool_blocks import pool_blocks
from .pool_groups import pool_groups


@dataclass(frozen=True)
class Tail:
    """Pooled keys and values that stand in for the keys a tile did not keep.

    Args:
        k: mean key of each group, ``[B, H, P, D]``.
        v: mean value of each group, ``[B, H, P, D]``.
        bias: ``log`` of how many keys of the group the tile did not keep, ``[B, H, T, P]``, at least
            float32; ``-inf`` where it kept all of them.
    """

    k: Tensor
    v: Tensor
    bias: Tensor


@dataclass(frozen=True)
class KeyGroups:
    """The keys of an image in groups, before any is kept: from :func:`group_keys`.

    Prefix tokens are in no group.

    Args:
        blocks: the blocks of the patch grid that the groups started as.
        member: group of each patch, int32 ``[B, H, num_patches]``; None where the groups are the blocks.
        k: mean key of each group, ``[B, H, P, D]``.
        v: mean value of each group, ``[B, H, P, D]``.
        distance: distance of each value from the mean of its group, of prefix tokens from zero, ``[B, H, N]``: what a
            query that attends to that key alone would get wrong without it.
    """

    blocks: Tiling
    member: Tensor | None
    k: Tensor
    v: Tensor
    distance: Tensor

    def log_counts(self, connectivity: Connectivity, backend: str = "auto") -> Tensor:
        """Log of the number of keys per group that each tile did not keep, float32 ``[B, H, T, P]``."""
        if isinstance(self.blocks, FrameTiling):
            return self._log_counts_of_frames(self.blocks, connectivity, backend)
        return count_unkept(connectivity.indices, connectivity.bias, self.blocks, self.member, backend=backend)

    def _log_counts_of_frames(self, blocks: FrameTiling, connectivity: Connectivity, backend: str) -> Tensor:
        """The operation counts in the blocks of one grid, so it gets a grid with as many blocks and one more; places
        of that grid beyond the patches are members of the one more."""
        assert self.member is not None
        number = blocks.num_tiles
        length = -(-blocks.num_patches // (number + 1))
        grid = Tiling((number + 1, length), (1, length), blocks.num_prefix_tokens)
        member = F.pad(self.member, (0, grid.num_patches - blocks.num_patches), value=number)
        counts = count_unkept(connectivity.indices, connectivity.bias, grid, member, backend=backend)
        return counts[..., :number].contiguous()

    def tail(self, connectivity: Connectivity, offset: Tensor | None = None, backend: str = "auto") -> Tail:
        """Stand-ins for the keys that ``connectivity`` did not keep, with exact log-counts.

        At a keep rate of 1 every bias is ``-inf`` and the tail vanishes.

        Args:
            connectivity: the kept keys.
            offset: added to the bias of each head, ``[H]``, or None; differentiable.
            backend: which kernels serve, see :func:`sparsifiner.ops.backends`.
        """
        bias = self.log_counts(connectivity, backend).to(torch.promote_types(self.k.dtype, torch.float32))
        if offset is not None:
            bias = bias + offset.to(bias.dtype)[:, None, None]
        return Tail(self.k, self.v, bias)

    def of_patches(self, x: Tensor) -> Tensor:
        """The row of each patch's group, ``[B, H, P, ...]`` to ``[B, H, num_patches, ...]``."""
        if self.member is None:
            return x[:, :, self.blocks.tile_of_patch(x.device)]
        index = self.member.long().reshape(*self.member.shape, *[1] * (x.ndim - 3))
        return x.gather(2, index.expand(*self.member.shape, *x.shape[3:]))


def group_keys(k: Tensor, v: Tensor, blocks: Tiling, steps: int = 0, backend: str = "auto") -> KeyGroups:
    """Put the keys of like values into groups.

    The groups start as blocks of the patch grid. Their borders then move: a block across the edge of an object has a
    mean that is like neither side, and keys beyond the edge are better represented by their neighbours' mean.

    Args:
        k: keys ``[B, H, N, D]``.
        v: values ``[B, H, N, D]``.
        blocks: blocks of the patch grid, with the number of prefix tokens.
        steps: how often patches are regrouped (Lloyd); 0 leaves the blocks.
        backend: which kernels serve, see :func:`sparsifiner.ops.backends`.
    """
    if isinstance(blocks, FrameTiling):
        return _group_keys_of_frames(k, v, blocks, steps, backend)
    if not steps:
        mean_key, mean_value = (pool_blocks(x, blocks, backend=backend) for x in (k, v))
        return KeyGroups(blocks, None, mean_key, mean_value, block_distances(v, blocks, backend=backend))
    member, mean_value, distance = group_patches(v, blocks, steps, backend=backend)
    return KeyGroups(blocks, member, pool_groups(k, member, blocks, backend=backend), mean_value, distance)


def _group_keys_of_frames(k: Tensor, v: Tensor, blocks: FrameTiling, steps: int, backend: str) -> KeyGroups:
    """Groups within each frame, made as if every frame were an image of its own."""
    prefix = blocks.num_prefix_tokens
    frame = Tiling(blocks.image_grid, blocks.tile)
    groups = group_keys(blocks.fold(k[:, :, prefix:]), blocks.fold(v[:, :, prefix:]), frame, steps, backend)
    member = groups.member
    if member is None:
        member = frame.tile_of_patch(k.device).to(torch.int32).expand(*groups.k.shape[:2], -1)
    first = torch.arange(blocks.num_frames, dtype=torch.int32, device=k.device) * frame.num_tiles
    members = member.unflatten(0, (-1, blocks.num_frames)) + first[:, None, None]
    of_prefix = v[:, :, :prefix].to(groups.distance.dtype).norm(dim=-1)
    distance = torch.cat([of_prefix, blocks.unfold(groups.distance)], dim=2)
    return KeyGroups(
        blocks, members.transpose(1, 2).flatten(2), blocks.unfold(groups.k), blocks.unfold(groups.v), distance
    )
