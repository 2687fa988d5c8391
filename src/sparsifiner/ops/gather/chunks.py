"""The work of this backend in pieces of bounded size: which queries, against which keys, under which mask.

A piece either copies the kept keys of each of its tiles together, or takes all keys of its heads and masks those that
were not kept. Copies move ``K`` keys per tile; a mask wastes arithmetic on the keys that were dropped but needs no
copies and no scattered additions in the backward pass. Both give the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import check_indices

# Gathered keys and values, or masked logits, held at once. On a 2-core CPU with 32 MiB of last-level cache, at 4,096
# tokens: 2 to 32 MiB are equally fast, 1 MiB is 40 % slower for its many steps, 64 MiB 35 % because the copies leave
# the cache.
CHUNK_BYTES = 8 * 2**20

# The same where each step is a launch on a GPU and memory is plenty.
GPU_CHUNK_BYTES = 512 * 2**20

# A GPU's attention kernels take no more batches than this, one per group of queries.
GPU_MOST_GROUPS = 2**15

# Copying a key to a tile costs as much as this many products of one query with one key that is then masked. Measured
# there, forward and backward, at 256 to 4,096 tokens and keep rates of 0.05 to 0.5: equal at 20 for single queries,
# at 30 to 50 for tiles of 16. Single queries at a keep rate of 0.25 gain 5 times by the mask.
COPY_COST = 24


class Inputs(NamedTuple):
    """Arguments of the operator, as in ``sparse_attention``; ``tile_tokens`` ``[T, S]`` has -1 in border tiles."""

    q: Tensor
    k: Tensor
    v: Tensor
    tile_tokens: Tensor
    indices: Tensor
    bias: Tensor | None
    tail_k: Tensor | None
    tail_v: Tensor | None
    tail_bias: Tensor | None
    attn_bias: Tensor | None
    num_prefix_tokens: int

    @property
    def divides(self) -> bool:
        """True where no tile sticks out of the grid."""
        return self.tile_tokens.numel() == self.q.shape[2] - self.num_prefix_tokens

    @property
    def num_pooled(self) -> int:
        """Tokens of the tail."""
        return 0 if self.tail_k is None else self.tail_k.shape[2]


class Gradients(NamedTuple):
    """Tensors that :meth:`GatheredChunk.add_gradients` adds to; without elements where there is no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tail_k: Tensor
    tail_v: Tensor
    tail_bias: Tensor
    attn_bias: Tensor


class _Chunk:
    """Queries of one or several tiles, ``C`` groups of ``S``; each group has keys of its own.

    ``row`` ``[C]`` numbers the (batch, head) pair of a group, ``tokens`` ``[C, S]`` its queries, ``inside`` is False
    where a border tile has none. Subclasses add ``k`` and ``v`` ``[C, M, D]`` and ``mask`` ``[C, 1 or S, M]``.
    """

    k: Tensor
    v: Tensor
    mask: Tensor

    def __init__(self, inputs: Inputs, row: Tensor, tokens: Tensor) -> None:
        self.inputs = inputs
        self.row = row
        self.inside = tokens >= 0
        self.tokens = tokens.clamp(min=0)
        self.q = self.take(inputs.q)
        self.dtype = torch.promote_types(inputs.q.dtype, torch.float32)

    def take(self, x: Tensor) -> Tensor:
        """The chunk's queries out of ``[B, H, N, D]``: ``[C, S, D]``; token 0 where a border tile has none."""
        return take_rows(x, self.row, self.tokens)

    def write(self, out: Tensor, values: Tensor) -> None:
        """Put ``values`` ``[C, S, D]`` into ``out`` ``[B, H, N, D]``, which is laid out as ``[B, N, H, D]``."""
        heads, num_tokens, width = out.shape[1:]
        image, head = self.row // heads, self.row % heads
        rows = (image[:, None] * num_tokens + self.tokens) * heads + head[:, None]
        if not self.inputs.divides:
            rows, values = rows[self.inside], values[self.inside]
        out.transpose(1, 2).view(-1, width).index_copy_(0, rows.flatten(), values.reshape(-1, width))

    def add_query_gradients(self, grads: Gradients, dq: Tensor, dlogits: Tensor) -> None:
        """Of what belongs to the queries: themselves and ``attn_bias``."""
        add_rows(grads.q, self.row, self.tokens, dq)
        if self.inputs.attn_bias is not None:
            grads.attn_bias.index_put_(self.attn_bias_index, dlogits, accumulate=True)

    def attn_bias_of(self, columns: Tensor) -> Tensor:
        """Part of ``attn_bias`` for the logits of keys ``columns`` ``[C or 1, M]``; its index is kept for gradients."""
        attn_bias, heads = self.inputs.attn_bias, self.inputs.q.shape[1]
        assert attn_bias is not None
        image = (self.row // heads).clamp(max=attn_bias.shape[0] - 1)
        head = (self.row % heads).clamp(max=attn_bias.shape[1] - 1)
        self.attn_bias_index = (image[:, None, None], head[:, None, None], self.tokens[:, :, None], columns[:, None, :])
        return attn_bias[self.attn_bias_index].to(self.dtype)


class GatheredChunk(_Chunk):
    """Tiles ``start`` to ``stop``, counted over batch, heads and tiles; a tile's kept keys are copied together."""

    def __init__(self, inputs: Inputs, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        flat = torch.arange(start, stop, device=inputs.q.device)
        num_tokens, num_tiles = inputs.q.shape[2], inputs.tile_tokens.shape[0]
        super().__init__(inputs, flat // num_tiles, inputs.tile_tokens[flat % num_tiles].long())
        self.keys = inputs.indices.flatten(0, 2)[start:stop].long()  # [C, K]
        self.k, self.v = (take_rows(x, self.row, self.keys) for x in (inputs.k, inputs.v))
        mask = self.k.new_zeros(self.keys.shape, dtype=self.dtype)
        if inputs.bias is not None:
            mask = inputs.bias.flatten(0, 2)[start:stop].to(self.dtype)
        columns = self.keys
        if inputs.tail_k is not None and inputs.tail_v is not None and inputs.tail_bias is not None:
            self.k = torch.cat([self.k, inputs.tail_k.flatten(0, 1)[self.row]], dim=1)
            self.v = torch.cat([self.v, inputs.tail_v.flatten(0, 1)[self.row]], dim=1)
            mask = torch.cat([mask, inputs.tail_bias.flatten(0, 2)[start:stop].to(self.dtype)], dim=1)
            pooled = num_tokens + torch.arange(inputs.num_pooled, device=mask.device)
            columns = torch.cat([columns, pooled.expand(len(columns), -1)], dim=1)
        self.mask = mask[:, None]
        if inputs.attn_bias is not None:
            self.mask = self.mask + self.attn_bias_of(columns)

    def add_gradients(self, grads: Gradients, dq: Tensor, dk: Tensor, dv: Tensor, dlogits: Tensor) -> None:
        """Add what the backward pass of attention gave for this chunk."""
        inputs, kept, part = self.inputs, self.keys.shape[-1], slice(self.start, self.stop)
        self.add_query_gradients(grads, dq, dlogits)
        add_rows(grads.k, self.row, self.keys, dk[:, :kept])
        add_rows(grads.v, self.row, self.keys, dv[:, :kept])
        per_key = dlogits.sum(1)
        if inputs.bias is not None:
            grads.bias.flatten(0, 2)[part] = per_key[:, :kept]
        if inputs.tail_k is not None:
            grads.tail_k.flatten(0, 1).index_add_(0, self.row, dk[:, kept:])
            grads.tail_v.flatten(0, 1).index_add_(0, self.row, dv[:, kept:])
            grads.tail_bias.flatten(0, 2)[part] = per_key[:, kept:]


class MaskedChunk(_Chunk):
    """All keys of the (batch, head) pairs ``rows`` for the queries of ``tiles``; what was not kept is masked."""

    def __init__(self, inputs: Inputs, rows: slice, tiles: slice) -> None:
        self.part = (rows, tiles)
        device, num_tokens = inputs.q.device, inputs.q.shape[2]
        row = torch.arange(rows.start, rows.stop, device=device)
        tokens = inputs.tile_tokens[tiles].long()
        super().__init__(inputs, row, tokens.flatten().expand(len(row), -1))
        self.k, self.v = inputs.k.flatten(0, 1)[rows], inputs.v.flatten(0, 1)[rows]
        self.keys = inputs.indices.flatten(0, 1)[self.part].long()  # [C, G, K]
        bias = self.k.new_zeros(self.keys.shape, dtype=self.dtype)
        if inputs.bias is not None:
            bias = inputs.bias.flatten(0, 1)[self.part].to(self.dtype)
        mask = bias.new_full((*self.keys.shape[:2], num_tokens), -math.inf)
        # Padding entries repeat a key with bias -inf; the maximum keeps the entry that counts.
        mask.scatter_reduce_(-1, self.keys, bias, "amax")
        self.padding = bias == -math.inf
        if inputs.tail_k is not None and inputs.tail_v is not None and inputs.tail_bias is not None:
            self.k = torch.cat([self.k, inputs.tail_k.flatten(0, 1)[rows]], dim=1)
            self.v = torch.cat([self.v, inputs.tail_v.flatten(0, 1)[rows]], dim=1)
            mask = torch.cat([mask, inputs.tail_bias.flatten(0, 1)[self.part].to(self.dtype)], dim=-1)
        self.mask = mask.repeat_interleave(tokens.shape[1], dim=1)
        if inputs.attn_bias is not None:
            columns = torch.arange(self.k.shape[1], device=device)[None]
            self.mask = self.mask + self.attn_bias_of(columns)

    def add_gradients(self, grads: Gradients, dq: Tensor, dk: Tensor, dv: Tensor, dlogits: Tensor) -> None:
        """Add what the backward pass of attention gave for this chunk."""
        inputs, num_tokens, (rows, _) = self.inputs, self.inputs.q.shape[2], self.part
        self.add_query_gradients(grads, dq, dlogits)
        grads.k.flatten(0, 1)[rows] += dk[:, :num_tokens]
        grads.v.flatten(0, 1)[rows] += dv[:, :num_tokens]
        per_key = dlogits.unflatten(1, (self.keys.shape[1], -1)).sum(2)  # [C, G, M]
        if inputs.bias is not None:
            per_entry = per_key.gather(-1, self.keys).masked_fill(self.padding, 0.0)
            grads.bias.flatten(0, 1)[self.part] = per_entry
        if inputs.tail_k is not None:
            grads.tail_k.flatten(0, 1)[rows] += dk[:, num_tokens:]
            grads.tail_v.flatten(0, 1)[rows] += dv[:, num_tokens:]
            grads.tail_bias.flatten(0, 1)[self.part] = per_key[..., num_tokens:]


def make_chunks(inputs: Inputs) -> Iterator[GatheredChunk | MaskedChunk]:
    """Every tile once, in chunks of bounded size, by whichever way is cheaper for these sizes.

    Raises:
        IndexError: if an index is negative or not below ``N`` (checked on a CPU only).
    """
    check_indices(inputs.indices, inputs.k.shape[2])
    # Contiguous once, so that each chunk's view of rows is free.
    inputs = inputs._replace(q=inputs.q.contiguous(), k=inputs.k.contiguous(), v=inputs.v.contiguous())
    return _masked(inputs) if masking_pays(inputs) else _gathered(inputs)


def masking_pays(inputs: Inputs) -> bool:
    """True where products with all keys cost less than copies of the kept ones."""
    queries_per_tile = inputs.tile_tokens.shape[1]
    copied = inputs.indices.shape[-1] + inputs.num_pooled
    return queries_per_tile * (inputs.k.shape[2] + inputs.num_pooled) < COPY_COST * copied


def _gathered(inputs: Inputs) -> Iterator[GatheredChunk]:
    keys_per_tile = inputs.indices.shape[-1] + inputs.num_pooled
    step = max(1, _chunk_bytes(inputs) // max(1, 2 * keys_per_tile * inputs.k.shape[-1] * inputs.k.element_size()))
    if inputs.k.is_cuda:
        step = min(step, GPU_MOST_GROUPS)
    total = math.prod(inputs.indices.shape[:3])
    for start in range(0, total, step):
        yield GatheredChunk(inputs, start, min(start + step, total))


def _masked(inputs: Inputs) -> Iterator[MaskedChunk]:
    batch, heads, num_tiles = inputs.indices.shape[:3]
    size = torch.promote_types(inputs.q.dtype, torch.float32).itemsize
    bytes_per_tile = inputs.tile_tokens.shape[1] * (inputs.k.shape[2] + inputs.num_pooled) * size
    tiles_at_once = min(num_tiles, max(1, _chunk_bytes(inputs) // bytes_per_tile))
    rows_at_once = max(1, _chunk_bytes(inputs) // (bytes_per_tile * num_tiles))
    for first in range(0, batch * heads, rows_at_once):
        rows = slice(first, min(first + rows_at_once, batch * heads))
        for tile in range(0, num_tiles, tiles_at_once):
            yield MaskedChunk(inputs, rows, slice(tile, min(tile + tiles_at_once, num_tiles)))


def _chunk_bytes(inputs: Inputs) -> int:
    return GPU_CHUNK_BYTES if inputs.k.is_cuda else CHUNK_BYTES


def take_rows(x: Tensor, row: Tensor, tokens: Tensor) -> Tensor:
    """Tokens ``[C, M]`` of the (batch, head) pairs ``row`` ``[C]`` out of ``[B, H, N, D]``: ``[C, M, D]``."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.index_select(0, _row_numbers(x, row, tokens)).view(*tokens.shape, x.shape[-1])


def add_rows(target: Tensor, row: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add ``values`` ``[C, M, D]`` to where :func:`take_rows` takes them from."""
    target.view(-1, target.shape[-1]).index_add_(0, _row_numbers(target, row, tokens), values.flatten(0, 1))


def _row_numbers(x: Tensor, row: Tensor, tokens: Tensor) -> Tensor:
    return (row[:, None] * x.shape[2] + tokens).flatten()
