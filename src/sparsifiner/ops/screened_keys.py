"""``screened_keys``: ``tile_keys`` of long sequences, among the keys of each tile's best blocks only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ..geometry.tiling import Tiling
from ._common import blocks_of
from ._common import num_blocks as blocks_in
from .block_distances import BLOCK_DISTANCES
from .pool_blocks import POOL_BLOCKS
from .registry import Operation
from .tile_keys import key_scores, pooled_logits, select_in_chunks


def screened_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    blocks: Tiling,
    num_blocks: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
    backend: str = "auto",
) -> Tensor:
    """Keys with the highest scores, as from ``tile_keys``, among those of each tile's best blocks. No gradient flows.

    Probabilities are those among these keys. A block scores as if it were one key: its logit is that of the mean key
    plus the variance that its keys' spread gives the logits, so that a block with one key that matters does not vanish
    behind three others; its weight is the highest of its keys'.

    Args:
        pooled: pooled queries of each tile ``[B, H, T, G, D]``.
        k: keys ``[B, H, N, D]``, prefix tokens first; every tile keeps those.
        weight: factor on each patch's probabilities, not negative, ``[B, H, num_patches]``, or None.
        blocks: blocks of 4 patches, with the number of prefix tokens.
        num_blocks: blocks of each tile whose keys are scored one by one.
        count: patches to select per tile, at most as many as any such blocks hold.
        scale: factor on the logits.
        sum_probabilities: merge the pooled queries' probabilities by sum instead of max.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        Token numbers, int32 ``[B, H, T, prefix + count]``, rising.

    Raises:
        ValueError: if blocks have other than 4 patches, ``k`` has other tokens, or ``num_blocks`` or ``count`` do not
            fit.
    """
    (rows, columns), (height, width), prefix = blocks.grid, blocks.tile, blocks.num_prefix_tokens
    numbers = (rows, columns, height, width, prefix, num_blocks, count, scale, sum_probabilities)
    return SCREENED_KEYS(pooled, k, weight, *numbers, backend=backend)


def _reference(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
    num_blocks: int,
    count: int,
    scale: float,
    sum_probabilities: bool,
) -> Tensor:
    grid = (rows, columns, block_rows, block_columns, prefix)
    blocks = blocks_of(*grid)
    check_screening(k, blocks, num_blocks, count)
    block_of_patch = blocks.tile_of_patch(k.device)
    means = POOL_BLOCKS.reference(k, *grid)[:, :, None].mT
    distance = BLOCK_DISTANCES.reference(k, *grid)[:, :, prefix:]
    spread = blocks.mean_patches(distance.square()[..., None])[:, :, None, None, :, 0] / k.shape[3]  # [B, H, 1, 1, P]
    highest = weight
    if weight is not None:
        highest = weight.new_zeros((*weight.shape[:2], blocks.num_tiles))
        highest = highest.scatter_reduce(2, block_of_patch.expand_as(weight), weight, "amax")
    candidates = k[:, :, prefix:].mT

    def scores(part: Tensor) -> Tensor:
        logits = part @ means + part.square().sum(-1, keepdim=True) * spread
        of_blocks = key_scores(logits, highest, sum_probabilities)
        best = of_blocks.topk(num_blocks, dim=-1).indices
        chosen = torch.zeros_like(of_blocks, dtype=torch.bool).scatter_(-1, best, True)
        left_out = ~chosen[..., block_of_patch]
        logits = pooled_logits(part, candidates).masked_fill(left_out[:, :, :, None], float("-inf"))
        return key_scores(logits, weight, sum_probabilities).masked_fill(left_out, -1.0)

    return select_in_chunks(scores, pooled * scale, k, prefix, count)


def check_screening(k: Tensor, blocks: Tiling, num_blocks: int, count: int) -> None:
    """Refuse blocks that :func:`screened_keys` cannot serve, or too few of them for ``count`` keys."""
    if blocks.tile_size != 4:
        raise SparsifinerError(f"a block must have 4 places, not {blocks.tile[0]} x {blocks.tile[1]}")
    if k.shape[2] != blocks.num_tokens:
        raise SparsifinerError(f"the candidates must be the patches of the grid, {blocks.num_tokens} tokens in all")
    empty = blocks.num_tiles * 4 - blocks.num_patches
    if num_blocks > blocks.num_tiles or num_blocks * 4 - empty < count:
        raise SparsifinerError(f"{num_blocks} of {blocks.num_tiles} blocks may hold fewer than {count} keys")


def _fake(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
    num_blocks: int,
    count: int,
    *_: object,
) -> Tensor:
    return pooled.new_empty((*pooled.shape[:3], prefix + count), dtype=torch.int32)


def _flops(
    pooled: torch.Size,
    k: torch.Size,
    weight: torch.Size | None,
    rows: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    prefix: int,
    num_blocks: int,
    *_: object,
    **__: object,
) -> int:
    """Pooled queries times the means of all blocks and the keys of some."""
    all_blocks = blocks_in(rows, columns, block_rows, block_columns)
    return 2 * pooled.numel() * (all_blocks + block_rows * block_columns * num_blocks)


SCREENED_KEYS = Operation(
    "screened_keys",
    "(Tensor pooled, Tensor k, Tensor? weight, SymInt rows, SymInt columns, SymInt block_rows, SymInt block_columns, "
    "SymInt prefix, SymInt num_blocks, SymInt count, float scale, bool sum_probabilities) -> Tensor",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    batched=("pooled", "k", "weight"),
)
