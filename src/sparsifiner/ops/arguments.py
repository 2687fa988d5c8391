"""What the registered operators share: the tensors they take, and the layout of what they return."""

from __future__ import annotations

from torch import Tensor

from ..connectivity import Connectivity, Tail


def tensor_arguments(
    q: Tensor, k: Tensor, v: Tensor, connectivity: Connectivity, tail: Tail | None
) -> tuple[Tensor | None, ...]:
    """q, k, v, tile tokens, indices, bias, tail k, tail v and tail bias, as a ``torch.library`` schema has them."""
    pooled = (None, None, None) if tail is None else (tail.k, tail.v, tail.bias)
    return (q, k, v, connectivity.tiling.tokens(q.device), connectivity.indices, connectivity.bias, *pooled)


def empty_output(q: Tensor) -> Tensor:
    """``[B, H, N, D]`` laid out as ``[B, N, H, D]``, so that merging the heads afterwards needs no copy."""
    batch, heads, num_tokens, width = q.shape
    return q.new_empty(batch, num_tokens, heads, width).transpose(1, 2)
