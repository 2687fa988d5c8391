"""Means, distances and log-counts over blocks of the patch grid, in C++ where that can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ..geometry.tiling import Tiling
from . import cpu


def pool_blocks(x: Tensor, blocks: Tiling) -> Tensor:
    """Mean of the patches of ``x`` ``[B, H, N, D]`` over each block: ``[B, H, P, D]``.

    Args:
        x: tokens, prefix tokens first; differentiable where it is computed by torch.
        blocks: blocks of the patch grid, with the number of prefix tokens to skip.
    """
    if cpu.why_not(x) is None and x.shape[-1] <= 128 and not cpu.needs_gradients(x):
        return native_pool_blocks(x, *blocks.grid, *blocks.tile, blocks.num_prefix_tokens)
    return blocks.mean_patches(x[:, :, blocks.num_prefix_tokens :])


def count_unkept(indices: Tensor, bias: Tensor | None, blocks: Tiling, member: Tensor | None = None) -> Tensor:
    """Log of the number of keys per block that are not among the kept ones, float32 ``[B, H, T, P]``.

    Args:
        indices: token numbers of the kept keys, int32 ``[B, H, T, K]``.
        bias: ``[B, H, T, K]`` or None; entries whose bias is ``-inf`` are not kept.
        blocks: blocks of the patch grid, with the number of prefix tokens, which are in no block.
        member: group of each patch, int32 ``[B, H, num_patches]``, where groups stand for the blocks they started as.
    """
    if cpu.why_missing() is None and indices.device.type == "cpu":
        bias = None if bias is None else bias.detach()
        return native_count_unkept(indices, bias, member, *blocks.grid, *blocks.tile, blocks.num_prefix_tokens)
    if member is None:
        member = blocks.tile_of_patch(indices.device).expand(*indices.shape[:2], -1)
    # Prefix keys and padding are counted in an extra last column, which is cut off.
    block_of_token = torch.nn.functional.pad(member.long(), (blocks.num_prefix_tokens, 0), value=blocks.num_tiles)
    block = block_of_token.gather(2, indices.flatten(2).long()).view(indices.shape)
    if bias is not None:
        block = block.masked_fill(bias == float("-inf"), blocks.num_tiles)

    def count(numbers: Tensor) -> Tensor:
        zeros = torch.zeros(*numbers.shape[:-1], blocks.num_tiles + 1, device=numbers.device)
        return zeros.scatter_add_(-1, numbers, torch.ones_like(numbers, dtype=zeros.dtype))[..., :-1]

    return (count(member.long())[:, :, None] - count(block)).log()


def distance_from_block(x: Tensor, blocks: Tiling) -> Tensor:
    """How far each token of ``x`` ``[B, H, N, D]`` lies from the mean of its block, ``[B, H, N]``.

    Args:
        x: tokens, prefix tokens first. They lie in no block: theirs is the distance from zero.
        blocks: blocks of the patch grid, with the number of prefix tokens.
    """
    if cpu.serves(x):
        return native_block_distances(x, *blocks.grid, *blocks.tile, blocks.num_prefix_tokens)
    prefix, patches = x[:, :, : blocks.num_prefix_tokens], x[:, :, blocks.num_prefix_tokens :]
    means = blocks.mean_patches(patches)[:, :, blocks.tile_of_patch(x.device)]
    return torch.cat([prefix, patches - means], dim=2).norm(dim=-1)


def check_tokens(x: Tensor, rows: int, columns: int, prefix: int) -> None:
    """Refuse ``x`` ``[B, H, N, D]`` whose tokens are not ``prefix`` ones and a grid of ``rows`` by ``columns``."""
    if x.shape[2] != prefix + rows * columns:
        raise SparsifinerError(f"x must have {prefix + rows * columns} tokens, got {list(x.shape)}")


@torch.library.custom_op("sparsifiner::native_block_distances", mutates_args=(), device_types="cpu")
def native_block_distances(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int
) -> Tensor:
    """Distances from the block mean, float32 ``[B, H, N]``."""
    batch, heads, num_tokens, width = x.shape
    check_tokens(x, rows, columns, prefix)
    out = x.new_empty((batch, heads, num_tokens), dtype=torch.float32)
    x = cpu.readable_rows(x)
    grid = (prefix, rows, columns, block_rows, block_columns)
    threads = torch.get_num_threads()
    cpu._native.block_distances(
        cpu.rows(x), x.dtype == torch.bfloat16, batch, heads, width, grid, out.data_ptr(), threads
    )
    return out


@native_block_distances.register_fake
def _(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsifiner::native_pool_blocks", mutates_args=(), device_types="cpu")
def native_pool_blocks(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """``[B, H, prefix + rows * columns, D]`` to the means of its blocks, ``[B, H, P, D]``."""
    batch, heads, _, width = x.shape
    check_tokens(x, rows, columns, prefix)
    out = _empty_blocks(x, rows, columns, block_rows, block_columns)
    x = x if x.stride(3) == 1 else x.contiguous()
    cpu._native.pool_blocks(
        cpu.rows(x),
        x.dtype == torch.bfloat16,
        batch,
        heads,
        width,
        (prefix, rows, columns, block_rows, block_columns),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@native_pool_blocks.register_fake
def _(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    return _empty_blocks(x, rows, columns, block_rows, block_columns)


def _empty_blocks(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int) -> Tensor:
    blocks = -(-rows // block_rows) * -(-columns // block_columns)
    return x.new_empty(x.shape[0], x.shape[1], blocks, x.shape[3])


@torch.library.custom_op("sparsifiner::native_count_unkept", mutates_args=(), device_types="cpu")
def native_count_unkept(
    indices: Tensor,
    bias: Tensor | None,
    member: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
) -> Tensor:
    """Log-counts ``[B, H, T, P]`` float32 of int32 indices ``[B, H, T, K]``."""
    if member is not None and member.shape != (*indices.shape[:2], rows * columns):
        raise SparsifinerError(f"member must have shape [B, H, {rows * columns}], got {list(member.shape)}")
    out = _empty_counts(indices, rows, columns, block_rows, block_columns)
    indices, bias, member = indices.contiguous(), cpu.plain(bias, torch.float32), cpu.plain(member, torch.int32)
    kept = indices.shape[-1]
    cpu._native.log_counts(
        indices.data_ptr(),
        cpu.address(bias),
        indices.numel() // max(1, kept),
        kept,
        (prefix, rows, columns, block_rows, block_columns),
        cpu.address(member),
        max(1, indices.shape[2]),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@native_count_unkept.register_fake
def _(
    indices: Tensor,
    bias: Tensor | None,
    member: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
) -> Tensor:
    return _empty_counts(indices, rows, columns, block_rows, block_columns)


def _empty_counts(indices: Tensor, rows: int, columns: int, block_rows: int, block_columns: int) -> Tensor:
    blocks = -(-rows // block_rows) * -(-columns // block_columns)
    return indices.new_empty((*indices.shape[:3], blocks), dtype=torch.float32)
