"""Checks and shapes that several operations share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ..geometry.tiling import Tiling

# Scores or probabilities held at once; 16,384 tokens in 4x4 tiles would otherwise need 1.6 GB per layer.
CHUNK_BYTES = 64 * 2**20


def check_indices(indices: Tensor, num_tokens: int) -> None:
    """Raise an IndexError if one is negative or not below ``num_tokens``; only on a CPU: a GPU would wait."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if ((indices < 0) | (indices >= num_tokens)).any():
        raise IndexError(
            f"connectivity.indices must lie in [0, {num_tokens}), the number of keys, "
            f"got values from {indices.min().item()} to {indices.max().item()}"
        )


def check_tokens(x: Tensor, rows: int, columns: int, prefix: int) -> None:
    """Refuse ``x`` ``[B, H, N, D]`` whose tokens are not ``prefix`` ones and a grid of ``rows`` by ``columns``."""
    if x.shape[2] != prefix + rows * columns:
        raise SparsifinerError(f"x must have {prefix + rows * columns} tokens, got {list(x.shape)}")


def check_count(count: int, candidates: int) -> None:
    """Refuse to select no keys or more than there are."""
    if not 1 <= count <= candidates:
        raise SparsifinerError(f"cannot select {count} of {candidates} keys")


def blocks_of(rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tiling:
    """The blocks that five numbers of a schema stand for."""
    return Tiling((rows, columns), (block_rows, block_columns), prefix)


def numbers_of(blocks: Tiling) -> tuple[int, int, int, int, int]:
    """Rows and columns of the grid and of a block, and the number of prefix tokens, as the schemas have them."""
    return (*blocks.grid, *blocks.tile, blocks.num_prefix_tokens)


def num_blocks(rows: int, columns: int, block_rows: int, block_columns: int) -> int:
    """Blocks of a grid, those that stick out of it included."""
    return -(-rows // block_rows) * -(-columns // block_columns)


def float_like(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
