"""Groups of patches with like values: blocks of the grid whose borders have moved to where the image changes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ..geometry.tiling import Tiling, made_once
from . import cpu
from .pooling import check_tokens


def group_patches(x: Tensor, blocks: Tiling, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of patches with like rows of ``x``, by a few steps of Lloyd's algorithm that start at the blocks.

    In each step every patch joins, of its own block's group and those around it (3x3), the one with the nearest mean,
    and the means are taken anew, as superpixels are made (Achanta et al., SLIC, 2012). A group that lost all its
    patches keeps its mean and can win some back. No gradient flows through the choice of groups.

    Args:
        x: tokens ``[B, H, N, D]``, prefix tokens first.
        blocks: the blocks, with the number of prefix tokens, which are in no group.
        steps: how often patches are regrouped, at least 1.

    Returns:
        The group of each patch, int32 ``[B, H, num_patches]``; the mean of each group ``[B, H, P, D]``, differentiable
        where torch computes it; and the distance of each token from the mean of its group, of prefix tokens from zero,
        ``[B, H, N]``.
    """
    fixed = x.detach()  # gradients flow through the means only
    prefix, patches = x[:, :, : blocks.num_prefix_tokens], x[:, :, blocks.num_prefix_tokens :]
    if cpu.serves(fixed):
        member, means, distance = native_group_patches(fixed, *blocks.grid, *blocks.tile, prefix.shape[2], steps)
        if cpu.needs_gradients(x):
            means = _means(patches, member.long(), means).to(x.dtype)
        return member, means, distance
    with torch.no_grad():
        member, centres = _lloyd(patches.to(torch.promote_types(x.dtype, torch.float32)), blocks, steps)
    means = _means(patches, member, centres).to(x.dtype)
    with torch.no_grad():
        own_mean = means.gather(2, _rows(member, patches))
        distance = torch.cat([prefix, patches - own_mean], dim=2).norm(dim=-1)
    return member.to(torch.int32), means, distance


def pool_groups(x: Tensor, member: Tensor, blocks: Tiling) -> Tensor:
    """Mean of the patches of ``x`` ``[B, H, N, D]`` over each group: ``[B, H, P, D]``; zeros for a group without any.

    Args:
        x: tokens, prefix tokens first; differentiable where torch computes it.
        member: group of each patch, from :func:`group_patches`.
        blocks: the blocks that the groups started as.
    """
    if cpu.serves(x):
        return native_pool_groups(x, member, *blocks.grid, *blocks.tile, blocks.num_prefix_tokens)
    patches = x[:, :, blocks.num_prefix_tokens :]
    empty = x.new_zeros((*x.shape[:2], blocks.num_tiles, x.shape[3]))
    return _means(patches, member.long(), empty).to(x.dtype)


def blocks_around(blocks: Tiling, device: torch.device) -> Tensor:
    """Numbers of the up to 3x3 blocks around each block, itself included, int64 ``[P, 9]``; -1 beyond the border."""
    return _blocks_around(blocks.shape, device)


@made_once
def _blocks_around(shape: tuple[int, int], device: torch.device) -> Tensor:
    rows, columns = shape
    step = torch.arange(-1, 2, device=device)
    y = (torch.arange(rows, device=device)[:, None] + step)[:, None, :, None]
    x = (torch.arange(columns, device=device)[:, None] + step)[None, :, None, :]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return torch.where(inside, y * columns + x, -1).reshape(rows * columns, 9)


def grouping_macs(blocks: Tiling, width: int, steps: int) -> int:
    """Multiply-adds of one head: the means of the groups, and in each step a mean and a product per group around."""
    rows, columns = blocks.shape
    pairs = 0
    for row in range(rows):
        height = min(blocks.tile[0], blocks.grid[0] - row * blocks.tile[0])
        around_rows = min(rows - 1, row + 1) - max(0, row - 1) + 1
        for column in range(columns):
            breadth = min(blocks.tile[1], blocks.grid[1] - column * blocks.tile[1])
            pairs += height * breadth * around_rows * (min(columns - 1, column + 1) - max(0, column - 1) + 1)
    return width * steps * (pairs + blocks.num_patches)


def _lloyd(patches: Tensor, blocks: Tiling, steps: int) -> tuple[Tensor, Tensor]:
    """Group of each patch, int64 ``[B, H, n]``, and the means ``[B, H, P, D]`` the last step started from.

    The patches of a block are compared together with the nine means around it, which is a product of two matrices.
    """
    device = patches.device
    around = blocks_around(blocks, device)  # [P, 9]
    number, missing = around.clamp(min=0), around < 0
    places = blocks.places(device)
    in_blocks = patches.new_zeros((*patches.shape[:2], around.shape[0] * blocks.tile_size, patches.shape[3]))
    in_blocks = in_blocks.index_copy_(2, places, patches).unflatten(2, (around.shape[0], -1))  # [B, H, P, S, D]
    centres = blocks.mean_patches(patches)
    member = blocks.tile_of_patch(device).expand(patches.shape[:3])
    with _full_precision(device):
        for step in range(steps):
            if step:
                centres = _means(patches, member, centres)
            half = (centres.square().sum(-1) / 2)[:, :, number].masked_fill(missing, float("inf"))  # [B, H, P, 9]
            # |x - c|^2 without the part that is the same for all groups, negated and halved.
            nearness = in_blocks @ centres[:, :, number].mT - half[:, :, :, None]
            nearest = number.expand(half.shape).gather(3, nearness.argmax(-1))  # [B, H, P, S]
            member = nearest.flatten(2)[:, :, places]
    return member, centres


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Products as they are, also where autocast would round them; meta tensors know no autocast."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def _means(patches: Tensor, member: Tensor, empty: Tensor) -> Tensor:
    """Mean of each group, at least float32; ``empty`` ``[B, H, P, D]`` where a group has no patches."""
    dtype = torch.promote_types(patches.dtype, torch.float32)
    sums = torch.zeros(empty.shape, dtype=dtype, device=patches.device)
    sums = sums.scatter_add(2, _rows(member, patches), patches.to(dtype))
    counts = sums.new_zeros(sums.shape[:3]).scatter_add_(2, member, sums.new_ones(1).expand(member.shape))[..., None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), empty.to(dtype))


def _rows(member: Tensor, patches: Tensor) -> Tensor:
    return member[..., None].expand(patches.shape)


@torch.library.custom_op("sparsifiner::native_group_patches", mutates_args=(), device_types="cpu")
def native_group_patches(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`group_patches` of ``[B, H, prefix + rows * columns, D]``; distances are float32."""
    member, means, distances = _empty(x, rows, columns, block_rows, block_columns)
    check_tokens(x, rows, columns, prefix)
    x = cpu.readable_rows(x)
    cpu._native.group_patches(
        (*x.shape[:2], x.shape[3], steps),
        x.dtype == torch.bfloat16,
        cpu.rows(x),
        (prefix, rows, columns, block_rows, block_columns),
        member.data_ptr(),
        means.data_ptr(),
        distances.data_ptr(),
        torch.get_num_threads(),
    )
    return member, means, distances


@native_group_patches.register_fake
def _(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, rows, columns, block_rows, block_columns)


@torch.library.custom_op("sparsifiner::native_pool_groups", mutates_args=(), device_types="cpu")
def native_pool_groups(
    x: Tensor, member: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int
) -> Tensor:
    """:func:`pool_groups` of ``[B, H, prefix + rows * columns, D]``."""
    _, means, _ = _empty(x, rows, columns, block_rows, block_columns)
    check_tokens(x, rows, columns, prefix)
    if member.dtype != torch.int32 or member.shape != (*x.shape[:2], rows * columns):
        raise SparsifinerError(
            f"member must be int32 [B, H, {rows * columns}], got {member.dtype} {list(member.shape)}"
        )
    x, member = cpu.readable_rows(x), member.contiguous()
    cpu._native.pool_groups(
        cpu.rows(x),
        x.dtype == torch.bfloat16,
        *x.shape[:2],
        x.shape[3],
        (prefix, rows, columns, block_rows, block_columns),
        member.data_ptr(),
        means.data_ptr(),
        torch.get_num_threads(),
    )
    return means


@native_pool_groups.register_fake
def _(x: Tensor, member: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    return _empty(x, rows, columns, block_rows, block_columns)[1]


def _empty(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_tokens, width = x.shape
    groups = -(-rows // block_rows) * -(-columns // block_columns)
    return (
        x.new_empty((batch, heads, rows * columns), dtype=torch.int32),
        x.new_empty((batch, heads, groups, width)),
        x.new_empty((batch, heads, num_tokens), dtype=torch.float32),
    )
