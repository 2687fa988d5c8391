"""For how many keys each pooled token stands, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import SparsifinerError
from .._common import check_indices, num_blocks
from .launch import launch


@triton.jit
def count_kernel(
    indices_ptr, bias_ptr, member_ptr, counts_ptr,
    num_tiles, num_listed, num_groups, num_patches, grid_columns, prefix,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MEMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the kept keys of one tile to the counts of their groups; after the tiles, all patches to the last row."""
    pair, row = tl.program_id(0) // (num_tiles + 1), tl.program_id(0) % (num_tiles + 1)
    offset = pair.to(tl.int64)
    everything = row == num_tiles
    list_number = offset * num_tiles + row
    counts_ptr += (offset * (num_tiles + 1) + row) * num_groups
    for start in range(0, tl.where(everything, num_patches, num_listed), BLOCK):
        place = start + tl.arange(0, BLOCK)
        listed = (place < num_listed) & ~everything
        token = tl.load(indices_ptr + list_number * num_listed + place, mask=listed, other=-1)
        patch = tl.where(everything, place, token - prefix)
        counted = (patch >= 0) & (patch < num_patches) & (listed | everything)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + list_number * num_listed + place, mask=listed, other=0.0)
            counted = counted & (bias != float("-inf"))
        if HAS_MEMBER:
            group = tl.load(member_ptr + offset * num_patches + patch, mask=counted, other=0)
        else:
            row_of_block, column_of_block = patch // grid_columns // ROWS, patch % grid_columns // COLUMNS
            group = row_of_block * tl.cdiv(grid_columns, COLUMNS) + column_of_block
        ones = tl.full([BLOCK], 1, tl.int32)
        tl.atomic_add(counts_ptr + group, ones, mask=counted, sem="relaxed")


@triton.jit
def log_kernel(counts_ptr, out_ptr, num_tiles, num_groups, BLOCK: tl.constexpr):
    """Logarithms of how many keys of each group one tile does not keep."""
    parts = tl.cdiv(num_groups, BLOCK)
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    pair, tile = (row // num_tiles).to(tl.int64), row % num_tiles
    group = part * BLOCK + tl.arange(0, BLOCK)
    inside = group < num_groups
    counts_ptr += pair * (num_tiles + 1) * num_groups + group
    kept = tl.load(counts_ptr + tile * num_groups, mask=inside, other=0)
    left = tl.load(counts_ptr + num_tiles * num_groups, mask=inside, other=0) - kept
    log = tl.where(left > 0, tl.log(tl.maximum(left, 1).to(tl.float32)), float("-inf"))
    tl.store(out_ptr + row.to(tl.int64) * num_groups + group, log, mask=inside)


def count_unkept(
    indices: Tensor,
    bias: Tensor | None,
    member: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
) -> Tensor:
    """Arguments and result as in ``sparsifiner::count_unkept``."""
    check_indices(indices, prefix + rows * columns)
    if member is not None and member.shape != (*indices.shape[:2], rows * columns):
        raise SparsifinerError(f"member must have shape [B, H, {rows * columns}], got {list(member.shape)}")
    pairs, num_tiles, num_listed = indices.shape[:2].numel(), indices.shape[2], indices.shape[3]
    num_groups = num_blocks(rows, columns, block_rows, block_columns)
    counts = torch.zeros((pairs, num_tiles + 1, num_groups), dtype=torch.int32, device=indices.device)
    out = indices.new_empty((*indices.shape[:3], num_groups), dtype=torch.float32)
    launch(
        count_kernel,
        (pairs * (num_tiles + 1),),
        indices.contiguous(), indices if bias is None else bias.contiguous(),
        indices if member is None else member.contiguous(), counts,
        num_tiles, num_listed, num_groups, rows * columns, columns, prefix,
        ROWS=block_rows, COLUMNS=block_columns, HAS_BIAS=bias is not None, HAS_MEMBER=member is not None, BLOCK=256,
        num_warps=2, num_stages=1, outputs=(counts,),
    )  # fmt: skip
    block = min(256, triton.next_power_of_2(num_groups))
    launch(
        log_kernel, (pairs * num_tiles * triton.cdiv(num_groups, block),), counts, out, num_tiles, num_groups,
        BLOCK=block, num_warps=1, num_stages=1, outputs=(out,),
    )  # fmt: skip
    return out
