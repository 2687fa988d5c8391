"""``group_patches``: blocks of the grid whose borders have moved to where the image changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.cached_tensors import cached_tensors
from ..geometry.tiling import Tiling
from ._common import blocks_of, check_tokens, float_like, num_blocks, numbers_of
from .registry import Operation, needs_derivatives


def group_patches(x: Tensor, blocks: Tiling, steps: int, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Groups of patches with like rows of ``x``, by a few steps of Lloyd's algorithm that start at the blocks.

    In each step every patch joins, of its own block's group and those around it (3x3), the one with the nearest mean,
    and the means are taken anew, as superpixels are made (Achanta et al., SLIC, 2012). A group that lost all its
    patches keeps its mean and can win some back. Gradients flow through the means, none through the choice of groups.

    Args:
        x: tokens ``[B, H, N, D]``, prefix tokens first, which are in no group.
        blocks: the blocks, with the number of prefix tokens.
        steps: how often patches are regrouped, at least 1.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        The group of each patch, int32 ``[B, H, num_patches]``; the mean of each group ``[B, H, P, D]`` in the dtype of
        ``x``; and the distance of each token from the mean of its group, of prefix tokens from zero, ``[B, H, N]``,
        float64 for float64 and float32 for everything else.

    Raises:
        ValueError: if ``x`` has other tokens than ``blocks``.
    """
    member, means, distance = GROUP_PATCHES(x, *numbers_of(blocks), steps, backend=backend)
    if needs_derivatives(x):
        means = group_means(x[:, :, blocks.num_prefix_tokens :], member.long(), means).to(x.dtype)
    return member, means, distance


def group_means(patches: Tensor, member: Tensor, empty: Tensor) -> Tensor:
    """Mean of each group, at least float32; ``empty`` ``[B, H, P, D]`` where a group has no patches.

    Args:
        patches: ``[B, H, num_patches, D]``.
        member: group of each patch, int64 ``[B, H, num_patches]``.
        empty: what groups without patches have.
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    sums = torch.zeros(empty.shape, dtype=dtype, device=patches.device)
    sums = sums.scatter_add(2, _rows(member, patches), patches.to(dtype))
    counts = sums.new_zeros(sums.shape[:3]).scatter_add(2, member, sums.new_ones(1).expand(member.shape))[..., None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), empty.to(dtype))


def blocks_around(blocks: Tiling, device: torch.device) -> Tensor:
    """Numbers of the up to 3x3 blocks around each block, itself included, int64 ``[P, 9]``; -1 beyond the border."""
    return _blocks_around(blocks.shape, device)


@cached_tensors
def _blocks_around(shape: tuple[int, int], device: torch.device) -> Tensor:
    rows, columns = shape
    step = torch.arange(-1, 2, device=device)
    y = (torch.arange(rows, device=device)[:, None] + step)[:, None, :, None]
    x = (torch.arange(columns, device=device)[:, None] + step)[None, :, None, :]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return torch.where(inside, y * columns + x, -1).reshape(rows * columns, 9)


def grouping_macs(blocks: Tiling, width: int, steps: int) -> int:
    """Multiply-adds of one head: the means of the groups, and in each step a mean and a product per group around."""

    def pairs(patches: int, block: int, number: int) -> int:
        # Along one side: every patch meets its own block and the one before and after it, where there is one.
        last = patches - (number - 1) * block
        return 3 * patches - block - last if number > 1 else patches

    (rows, columns), (block_rows, block_columns), (vertical, horizontal) = blocks.grid, blocks.tile, blocks.shape
    all_pairs = pairs(rows, block_rows, vertical) * pairs(columns, block_columns, horizontal)
    return width * steps * (all_pairs + blocks.num_patches)


def _reference(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(x, rows, columns, prefix)
    blocks = blocks_of(rows, columns, block_rows, block_columns, prefix)
    wide = x.to(float_like(x))
    patches = wide[:, :, prefix:]
    member, centres = _lloyd(patches, blocks, steps)
    means = group_means(patches, member, centres).to(x.dtype)
    distance = torch.cat([wide[:, :, :prefix], patches - means.gather(2, _rows(member, patches))], dim=2).norm(dim=-1)
    return member.to(torch.int32), means, distance


def _lloyd(patches: Tensor, blocks: Tiling, steps: int) -> tuple[Tensor, Tensor]:
    """Group of each patch, int64 ``[B, H, n]``, and the means ``[B, H, P, D]`` the last step started from.

    The patches of a block are compared together with the nine means around it, which is a product of two matrices.
    """
    device = patches.device
    around = blocks_around(blocks, device)  # [P, 9]
    number, missing = around.clamp(min=0), around < 0
    slots = blocks.slots(device)
    in_blocks = patches.new_zeros((*patches.shape[:2], around.shape[0] * blocks.tile_size, patches.shape[3]))
    in_blocks = in_blocks.index_copy_(2, slots, patches).unflatten(2, (around.shape[0], -1))  # [B, H, P, S, D]
    centres = blocks.mean_patches(patches)
    member = blocks.tile_of_patch(device).expand(patches.shape[:3])
    for step in range(steps):
        if step:
            centres = group_means(patches, member, centres)
        half = (centres.square().sum(-1) / 2)[:, :, number].masked_fill(missing, float("inf"))  # [B, H, P, 9]
        # |x - c|^2 without the part that is the same for all groups, negated and halved.
        nearness = in_blocks @ centres[:, :, number].mT - half[:, :, :, None]
        nearest = number.expand(half.shape).gather(3, nearness.argmax(-1))  # [B, H, P, S]
        member = nearest.flatten(2)[:, :, slots]
    return member, centres


def _rows(member: Tensor, patches: Tensor) -> Tensor:
    return member[..., None].expand(patches.shape)


def _fake(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_tokens, width = x.shape
    return (
        x.new_empty((batch, heads, rows * columns), dtype=torch.int32),
        x.new_empty((batch, heads, num_blocks(rows, columns, block_rows, block_columns), width)),
        x.new_empty((batch, heads, num_tokens), dtype=float_like(x)),
    )


GROUP_PATCHES = Operation(
    "group_patches",
    "(Tensor x, SymInt rows, SymInt columns, SymInt block_rows, SymInt block_columns, SymInt prefix, SymInt steps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    batched=("x",),
)
