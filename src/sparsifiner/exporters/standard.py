"""The library's operations in standard operators (Gather, TopK, MatMul, Softmax), for runtimes that have no others.

Each function takes the arguments of the operation's schema and gives its reference's results for finite inputs, in a
form that graph runtimes run fast: rows are gathered, and nothing is scattered over the tokens. Batches of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import blocks_of
from ..ops.group_patches import blocks_around
from ..ops.group_queries import filled
from ..ops.registry import OPERATIONS


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` puts in the place of each operation."""
    table: dict[Any, Callable[..., Any]] = {}
    for name, function in _FUNCTIONS.items():
        operation = OPERATIONS[name]

        def decomposed(*arguments: Any, function: Callable[..., Any] = function) -> Any:
            return function(*arguments[:-1])  # without the backend

        table[operation.op] = decomposed
    return table


def topk(scores: Tensor, count: int) -> Tensor:
    """``sparsifiner::topk``; the numbers do not rise, which attention does not notice.

    ONNX Runtime selects by a heap below ``candidates ** 0.725`` entries and by partition, which is faster, from there
    on, so a few more are taken and cut off.
    """
    candidates = int(scores.shape[-1])
    enough = math.ceil(candidates**0.726)
    if count >= enough:
        return scores.topk(count, dim=-1, sorted=False).indices.to(torch.int32)
    return scores.topk(enough, dim=-1).indices[..., :count].to(torch.int32)


def tile_keys(
    pooled: Tensor, k: Tensor, weight: Tensor | None, first: int, count: int, scale: float, by_sum: bool
) -> Tensor:
    """``sparsifiner::tile_keys``."""
    logits = (pooled * scale).flatten(2, 3) @ k[:, :, first:].mT
    scores = _merged(logits.softmax(-1).unflatten(2, pooled.shape[2:4]), weight, by_sum)
    return _after_prefix(topk(scores, count) + first, first)


def budget_keys(
    pooled: Tensor,
    k: Tensor,
    weight: Tensor | None,
    first: int,
    most: int,
    least: int,
    total: int,
    scale: float,
    by_sum: bool,
) -> tuple[Tensor, Tensor]:
    """``sparsifiner::budget_keys``; a tile's own keys and what fills its list up are not put in order."""
    batch, heads, tiles, groups = pooled.shape[:4]
    logits = (pooled * scale).flatten(2, 3) @ k[:, :, first:].mT
    best = _merged(logits.softmax(-1).unflatten(2, (tiles, groups)), weight, by_sum).topk(most, dim=-1)
    # The best of every tile are kept whatever others score.
    scores = torch.cat([torch.full_like(best.values[..., :least], float("inf")), best.values[..., least:]], dim=3)
    chosen = scores.flatten(1).topk(total, dim=1, sorted=False).indices
    kept = torch.zeros_like(scores.flatten(1)).scatter(1, chosen, 1.0).view(batch, heads, tiles, most)
    indices = _after_prefix((best.indices + first).to(torch.int32), first)
    bias = F.pad(torch.where(kept > 0, 0.0, float("-inf")), (first, 0))
    return indices, bias


def screened_keys(
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
    by_sum: bool,
) -> Tensor:
    """``sparsifiner::screened_keys``: the logits of the chosen blocks' keys only."""
    blocks = _Blocks(rows, columns, block_rows, block_columns, prefix, k)
    pooled = pooled * scale
    patches = k[:, :, prefix:]
    in_blocks = blocks.split(patches)
    means = blocks.mean(in_blocks)
    difference = blocks.masked(in_blocks - means[:, :, :, None])
    spread = difference.square().sum((3, 4)) / (blocks.sizes * k.shape[3])
    highest = None
    if weight is not None:
        highest = blocks.split(weight[..., None])[..., 0].amax(-1)  # not negative, so padding of zeros is no maximum
    logits = pooled @ means[:, :, None].mT + pooled.square().sum(-1, keepdim=True) * spread[:, :, None, None]
    best = _merged(logits.softmax(-1), highest, by_sum).topk(num_blocks, dim=-1, sorted=False).indices
    members = blocks.tokens.clamp(min=0).to(best.dtype)
    candidates = F.embedding(best, members).flatten(3) - prefix  # [B, H, T, places], patches
    missing = F.embedding(best, (blocks.tokens < 0).to(best.dtype)).flatten(3) > 0
    candidates = candidates.clamp(min=0)
    logits = pooled @ rows_of(patches, candidates).mT
    logits = logits.masked_fill(missing[:, :, :, None], float("-inf"))
    scores = logits.softmax(-1)
    scores = scores.sum(3) if by_sum else scores.amax(3)
    if weight is not None:
        scores = scores * weight.gather(2, candidates.flatten(2)).view(candidates.shape)
    places = scores.masked_fill(missing, -1.0).topk(count, dim=-1, sorted=False).indices
    return _after_prefix((candidates.gather(3, places) + prefix).to(torch.int32), prefix)


def group_queries(q: Tensor, tile_tokens: Tensor, group_of: Tensor, num_groups: int, steps: int) -> Tensor:
    """``sparsifiner::group_queries``."""
    tokens = filled(tile_tokens)
    queries = q.index_select(2, tokens.flatten()).unflatten(2, tokens.shape)
    numbers = torch.arange(num_groups, device=q.device)
    start = (group_of.long() == numbers[:, None]).to(q.dtype)  # [G, S]
    centres = (start / start.sum(-1, keepdim=True)) @ queries
    if num_groups == tokens.shape[1]:
        return centres
    for _ in range(steps):
        nearness = queries @ centres.mT - (centres.square().sum(-1) / 2)[:, :, :, None]  # [B, H, T, S, G]
        assigned = (nearness.argmax(-1, keepdim=True) == numbers).to(q.dtype)
        sizes = assigned.sum(3)[..., None]
        centres = torch.where(sizes > 0, (assigned.mT @ queries) / sizes.clamp(min=1), centres)
    return centres


def pool_blocks(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """``sparsifiner::pool_blocks``."""
    blocks = _Blocks(rows, columns, block_rows, block_columns, prefix, x)
    return blocks.mean(blocks.split(x[:, :, prefix:]))


def block_distances(x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int) -> Tensor:
    """``sparsifiner::block_distances``."""
    blocks = _Blocks(rows, columns, block_rows, block_columns, prefix, x)
    patches = x[:, :, prefix:]
    means = blocks.mean(blocks.split(patches)).index_select(2, blocks.tile_of_patch)
    return torch.cat([_length(x[:, :, :prefix]), _length(patches - means)], dim=2)


def group_patches(
    x: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``sparsifiner::group_patches``: a patch's group is one of nine places around its block."""
    blocks = _Blocks(rows, columns, block_rows, block_columns, prefix, x)
    patches = x[:, :, prefix:]
    in_blocks = blocks.split(patches)
    centres = blocks.mean(in_blocks)
    assigned = in_blocks
    for step in range(steps):
        if step:
            centres = blocks.means(in_blocks, assigned, centres)
        around = blocks.of_neighbours(centres)
        half = blocks.of_neighbours(centres.square().sum(-1) / 2).masked_fill(blocks.around < 0, float("inf"))
        nearest = (in_blocks @ around.mT - half[:, :, :, None]).argmax(-1)  # [B, H, P, S], places from 0 to 8
        assigned = (nearest[..., None] == blocks.places).to(x.dtype)
        assigned = blocks.masked(assigned)
    means = blocks.means(in_blocks, assigned, centres)
    numbers = blocks.around.clamp(min=0).to(x.dtype)  # exact: far fewer than 2**24 blocks
    member = (assigned * numbers[:, None]).sum(-1).to(torch.int32)
    member = member.flatten(2).index_select(2, blocks.slots)
    distance = torch.cat([_length(x[:, :, :prefix]), _length(patches - rows_of(means, member))], dim=2)
    return member, means, distance


def pool_groups(
    x: Tensor, member: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int
) -> Tensor:
    """``sparsifiner::pool_groups``."""
    blocks = _Blocks(rows, columns, block_rows, block_columns, prefix, x)
    of_places = member.index_select(2, blocks.patch_of_place.flatten()).unflatten(2, blocks.tokens.shape)
    assigned = blocks.masked((of_places[..., None] == blocks.around[:, None]).to(x.dtype))
    in_blocks = blocks.split(x[:, :, prefix:])
    return blocks.means(in_blocks, assigned, None)


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
    """``sparsifiner::count_unkept``."""
    blocks = blocks_of(rows, columns, block_rows, block_columns, prefix)
    number, device = blocks.num_tiles, indices.device
    ones = torch.ones((), device=device)
    if member is None:
        of_token = F.pad(blocks.tile_of_patch(device), (prefix, 0), value=number)
        group = F.embedding(indices, of_token[:, None])[..., 0]
        sizes = blocks.sizes(device)[None, None, None]
    else:
        of_token = F.pad(member.long(), (prefix, 0), value=number)
        group = of_token.gather(2, indices.flatten(2).long()).view(indices.shape)
        sizes = torch.zeros(*member.shape[:2], number, device=device)
        sizes = sizes.scatter_add(2, member.long(), ones.expand(member.shape))[:, :, None]
    if bias is not None:
        group = torch.where(bias == float("-inf"), number, group)
    # Prefix keys and padding are counted in an extra last column, which is cut off.
    kept = torch.zeros(*indices.shape[:3], number + 1, device=device)
    kept = kept.scatter_add(3, group, ones.expand(group.shape))[..., :number]
    return (sizes - kept).clamp(min=0.0).log()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_tokens: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    tail_bias: Tensor | None,
    attn_bias: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
    precision: str,
) -> Tensor:
    """``sparsifiner::attend``: kept and pooled keys of each tile are gathered into one list, then two products.

    The pooled keys are the same for all tiles, but a second list would split the softmax, which costs more.
    """
    batch, heads, num_tokens, _ = q.shape
    prefix, (num_tiles, tile_size) = num_prefix_tokens, tile_tokens.shape
    tokens = filled(tile_tokens)
    queries = (q * scale).index_select(2, tokens.flatten()).unflatten(2, tokens.shape)
    keys, values, added, listed = k, v, bias, indices
    if tail_k is not None and tail_v is not None and tail_bias is not None:
        num_pooled = tail_k.shape[2]
        keys, values = torch.cat([k, tail_k], dim=2), torch.cat([v, tail_v], dim=2)
        pooled = torch.arange(num_tokens, num_tokens + num_pooled, dtype=indices.dtype, device=q.device)
        listed = torch.cat([indices, pooled.expand(batch, heads, num_tiles, num_pooled)], dim=3)
        if bias is None:
            added = F.pad(tail_bias.to(q.dtype), (indices.shape[3], 0))
        else:
            added = torch.cat([bias.to(q.dtype), tail_bias.to(q.dtype)], dim=3)
    logits = queries @ rows_of(keys, listed).mT  # [B, H, T, S, K]
    if added is not None:
        logits = logits + added.to(q.dtype)[:, :, :, None]
    if attn_bias is not None:
        rows = attn_bias.index_select(2, tokens.flatten()).unflatten(2, tokens.shape)
        rows = rows.expand(batch, heads, -1, -1, -1)
        logits = logits + rows.gather(4, listed.long()[:, :, :, None].expand(logits.shape))
    weights = logits.softmax(-1)
    if bias is not None or attn_bias is not None:  # a row without any key attends to nothing
        weights = torch.where(logits.amax(-1, keepdim=True) == float("-inf"), 0.0, weights)
    out = (weights @ rows_of(values, listed)).flatten(2, 3)
    # Each token's place among the tiles; rows of all heads side by side, as merging the heads takes them.
    places = torch.arange(num_tiles * tile_size, device=q.device)
    target = torch.where(tile_tokens >= 0, tile_tokens, num_tokens).flatten().long()
    place = places.new_zeros(num_tokens + 1).scatter(0, target, places)[prefix:num_tokens]
    merged = out.index_select(2, place)
    if not prefix:
        return merged
    dense = (q[:, :, :prefix] * scale) @ k.mT
    if attn_bias is not None:
        dense = dense + attn_bias[:, :, :prefix, :num_tokens]
    return torch.cat([dense.softmax(-1) @ v, merged], dim=2)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` ``[B, H, N, D]`` by number ``[B, H, ...]``, as one gather of whole rows: ``[B, H, ..., D]``."""
    batch, heads, number, _ = x.shape
    first = torch.arange(batch * heads, dtype=index.dtype, device=x.device) * number
    return F.embedding(index + first.view(batch, heads, *[1] * (index.ndim - 2)), x.flatten(0, 2))


def _merged(probabilities: Tensor, weight: Tensor | None, by_sum: bool) -> Tensor:
    """One score per key, ``[B, H, T, N]``, from what each group ``[B, H, T, G, N]`` gives it."""
    scores = probabilities.sum(3) if by_sum else probabilities.amax(3)
    return scores if weight is None else scores * weight[:, :, None].to(scores.dtype)


def _after_prefix(indices: Tensor, first: int) -> Tensor:
    if not first:
        return indices
    kept = torch.arange(first, dtype=indices.dtype, device=indices.device)
    return torch.cat([kept.expand(*indices.shape[:3], first), indices], dim=3)


def _length(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


class _Blocks:
    """Blocks of the patch grid as constant tables, ``P`` blocks of ``S`` places each.

    Args:
        rows, columns, block_rows, block_columns, prefix: as in the operations' schemas.
        like: a tensor whose device the tables are on.
    """

    def __init__(self, rows: int, columns: int, block_rows: int, block_columns: int, prefix: int, like: Tensor) -> None:
        self.blocks = blocks_of(rows, columns, block_rows, block_columns, prefix)
        self.like, self.prefix, self.divides = like, prefix, self.blocks.divides

    # Tables are made when they are asked for: each is traced as arithmetic, and folded into a constant later.

    @cached_property
    def tokens(self) -> Tensor:
        """Token of each place, -1 outside the grid, int32 ``[P, S]``."""
        return self.blocks.tokens(self.like.device)

    @cached_property
    def patch_of_place(self) -> Tensor:
        return (self.tokens - self.prefix).clamp(min=0).long()

    @cached_property
    def sizes(self) -> Tensor:
        return self.blocks.sizes(self.like.device).to(self.like.dtype)

    @cached_property
    def slots(self) -> Tensor:
        return self.blocks.slots(self.like.device)

    @cached_property
    def tile_of_patch(self) -> Tensor:
        return self.blocks.tile_of_patch(self.like.device)

    @cached_property
    def around(self) -> Tensor:
        """Blocks at the nine places around each, -1 beyond the border, ``[P, 9]``."""
        return blocks_around(self.blocks, self.like.device)

    @cached_property
    def places(self) -> Tensor:
        return torch.arange(9, device=self.like.device)

    @cached_property
    def sources(self) -> Tensor:
        """Among the places of all blocks those that stand for each block, ``[P * 9]``.

        Block p's place j is the block whose place 8 - j is p. Beyond the border it is place 0 of block 0, which lies
        beyond the border itself, so that nothing ever is there.
        """
        return torch.where(self.around >= 0, self.around * 9 + (8 - self.places), 0).flatten()

    def of_neighbours(self, x: Tensor) -> Tensor:
        """Rows of the blocks around each block, ``[B, H, P, ...]`` to ``[B, H, P, 9, ...]``; any beyond the border."""
        return x.index_select(2, self.around.clamp(min=0).flatten()).unflatten(2, self.around.shape)

    def split(self, patches: Tensor) -> Tensor:
        """Patches ``[B, H, n, D]`` to ``[B, H, P, S, D]``, zeros where a block sticks out of the grid."""
        return self.masked(patches.index_select(2, self.patch_of_place.flatten()).unflatten(2, self.tokens.shape))

    def masked(self, x: Tensor) -> Tensor:
        """``[B, H, P, S, D]`` with zeros at places outside the grid."""
        return x if self.divides else x * (self.tokens >= 0).to(x.dtype)[..., None]

    def mean(self, in_blocks: Tensor) -> Tensor:
        """Mean over each block's patches, ``[B, H, P, D]``."""
        return in_blocks.sum(3) / self.sizes[:, None]

    def means(self, in_blocks: Tensor, assigned: Tensor, empty: Tensor | None) -> Tensor:
        """Mean of each group ``[B, H, P, D]`` of patches that joined one of the nine groups around their block.

        Args:
            in_blocks: patches ``[B, H, P, S, D]``.
            assigned: 1 at the place of each patch's group, ``[B, H, P, S, 9]``.
            empty: what groups without patches have; zeros if None.
        """
        sums, counts = self._collect(assigned.mT @ in_blocks), self._collect(assigned.sum(3)[..., None])
        means = sums / counts.clamp(min=1)
        return means if empty is None else torch.where(counts > 0, means, empty)

    def _collect(self, given: Tensor) -> Tensor:
        """What the blocks around each block gave it, summed: ``[B, H, P, 9, D]`` to ``[B, H, P, D]``."""
        return given.flatten(2, 3).index_select(2, self.sources).unflatten(2, self.around.shape).sum(3)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attend": attend,
    "block_distances": block_distances,
    "budget_keys": budget_keys,
    "count_unkept": count_unkept,
    "group_patches": group_patches,
    "group_queries": group_queries,
    "pool_blocks": pool_blocks,
    "pool_groups": pool_groups,
    "screened_keys": screened_keys,
    "tile_keys": tile_keys,
    "topk": topk,
}
