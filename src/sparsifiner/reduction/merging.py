"""Token merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), written from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .._utils.copying import copy_model
from ..attention.adapters.scored import dense_attention
from ..attention.adapters.vit import DenseVitAttention, gated_projection, project_vit
from ..errors import SparsifinerError
from ..geometry.forward_pass import num_tokens_of
from ..geometry.patch_grid import PatchGrid, follow_grid
from .blocks import ReducingBlock, check_reducible, refuse_maps
from .pruning import take_tokens


class MergingAttention(DenseVitAttention):
    """Attention in which a token counts as often as the patches it stands for; also returns the mean key.

    Proportional attention adds the log of a token's size to its logits (section 3, "tracking token size").
    """

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``[B, N, C]`` and sizes ``[B, N]`` (None: all 1) to the output ``[B, N, C]`` and keys ``[B, N, D]``."""
        q, k, v = project_vit(self, x)
        bias = None if sizes is None else sizes.log().to(q.dtype)[:, None, None].expand(-1, -1, q.shape[2], -1)
        return gated_projection(self, x, dense_attention(self, q, k, v, bias)), k.detach().mean(1)


class MergingBlock(ReducingBlock):
    """A block that merges ``count`` patches into others between attention and MLP.

    Args:
        block: the block to take over; its attention must be a :class:`MergingAttention`.
        count: tokens to merge away, at most half of the patches that are left.
        grid: of the model; its present forward pass holds the sizes of the tokens.
    """

    def __init__(self, block: Block, count: int, grid: PatchGrid) -> None:
        super().__init__(block)
        self.count, self.grid = count, grid

    def own_attributes(self) -> tuple[str, ...]:
        return ("count", "grid")

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn(x, self.grid.current.sizes.get(num_tokens_of(x)))

    def reduce(self, x: Tensor, seen: Tensor) -> Tensor:
        first, known = self.grid.num_prefix_tokens, self.grid.current.sizes
        count = min(self.count, (num_tokens_of(x) - first) // 2)
        if not count:
            return x
        sizes = known.get(num_tokens_of(x))
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
        merged, left, into = match_tokens(seen[:, first:], count)
        x, sizes = merge_matched(x, sizes, first, merged, left, into)
        known[num_tokens_of(x)] = sizes
        return x

    def extra_repr(self) -> str:
        return f"count={self.count}"


@torch.no_grad()
def match_tokens(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching (section 3): every second token looks for the most similar of the others.

    Args:
        keys: ``[B, n, D]``; tokens 0, 2, 4, ... may be merged into tokens 1, 3, 5, ...
        count: how many of the best pairs are merged, at most ``n // 2``.

    Returns:
        Numbers among the even tokens of those that are merged ``[B, count]`` and of those that are left
        ``[B, rest]``, in rising order, and numbers among the odd tokens the former go into ``[B, count]``.
    """
    keys = F.normalize(keys.float(), dim=-1)
    best, partner = (keys[:, ::2] @ keys[:, 1::2].mT).max(dim=-1)
    ranked = best.argsort(dim=1, descending=True, stable=True)
    merged, left = ranked[:, :count], ranked[:, count:].sort(dim=1).values
    return merged, left, partner.gather(1, merged)


def merge_matched(
    x: Tensor, sizes: Tensor, first: int, merged: Tensor, left: Tensor, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Means of matched tokens, weighted by their sizes; the last three arguments as ``match_tokens`` returns them.

    Args:
        x: tokens ``[B, N, C]``.
        sizes: patches each stands for, ``[B, N]``.
        first: number of prefix tokens, which stay.

    Returns:
        Tokens ``[B, N - count, C]`` (prefix, even ones that are left, odd ones) and their sizes.
    """
    even, odd = x[:, first::2], x[:, first + 1 :: 2]
    even_sizes, odd_sizes = sizes[:, first::2], sizes[:, first + 1 :: 2]
    gone_sizes = even_sizes.gather(1, merged)
    gone = take_tokens(even, merged) * gone_sizes[..., None].to(x.dtype)
    total = odd_sizes.scatter_add(1, into, gone_sizes)
    sums = (odd * odd_sizes[..., None].to(x.dtype)).scatter_add(1, into[..., None].expand_as(gone), gone)
    tokens = [x[:, :first], take_tokens(even, left), sums / total[..., None].to(x.dtype)]
    return torch.cat(tokens, dim=1), torch.cat([sizes[:, :first], even_sizes.gather(1, left), total], dim=1)


def merge_tokens(model: nn.Module, per_layer: int | Sequence[int], *, inplace: bool = False) -> nn.Module:
    """Merge similar patches in every block. Norms, LayerScale, gates and stochastic depth stay as they are.

    Args:
        model: a timm ``VisionTransformer`` of standard blocks. It is copied unless ``inplace``.
        per_layer: tokens each block merges away (the paper's ``r``), one number or one per block. No block merges
            more than half of the patches that are left.
        inplace: convert ``model`` itself and return it.

    Raises:
        ValueError: if the model or a number does not allow it; one line says why. ``model`` is unchanged then.
    """
    depth = len(getattr(model, "blocks", ()))
    check_reducible(model, list(range(depth)), (Attention,), "merge tokens of")
    counts = [per_layer] * depth if isinstance(per_layer, int) else list(per_layer)
    if len(counts) != depth or any(not isinstance(count, int) or count < 0 for count in counts):
        raise SparsifinerError(
            f"per_layer must be a whole number, or {depth} of them, each at least 0; got {per_layer!r}"
        )
    if not inplace:
        model = copy_model(model)
    vit: Any = model
    grid = follow_grid(vit)
    for number, block in enumerate(vit.blocks):
        block.attn = MergingAttention(block.attn)
        vit.blocks[number] = MergingBlock(block, counts[number], grid)
    grid.attach(vit, vit.blocks)
    refuse_maps(model)
    return model
