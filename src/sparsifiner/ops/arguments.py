"""What the backends share: the tensors they take, the check of their indices, and the layout of what they return."""

from __future__ import annotations

from torch import Tensor

from .connectivity import Connectivity
from .tail import Tail


def tensor_arguments(
    q: Tensor, k: Tensor, v: Tensor, connectivity: Connectivity, tail: Tail | None
) -> tuple[Tensor | None, ...]:
    """q, k, v, tile tokens, indices, bias, tail k, tail v and tail bias, as a ``torch.library`` schema has them."""
    pooled = (None, None, None) if tail is None else (tail.k, tail.v, tail.bias)
    return (q, k, v, connectivity.tiling.tokens(q.device), connectivity.indices, connectivity.bias, *pooled)


def check_indices(indices: Tensor, num_tokens: int) -> None:
    """Raise an IndexError if one is negative or not below ``num_tokens``; on a GPU, which would wait, do not look."""
    if not indices.is_cuda and ((indices < 0) | (indices >= num_tokens)).any():
        raise IndexError(
            f"connectivity.indices must lie in [0, {num_tokens}), the number of keys, "
            f"got values from {indices.min().item()} to {indices.max().item()}"
        )


def empty_output(q: Tensor) -> Tensor:
    """``[B, H, N, D]`` laid out as ``[B, N, H, D]``, so that merging the heads afterwards needs no copy."""
    batch, heads, num_tokens, width = q.shape
    return q.new_empty(batch, num_tokens, heads, width).transpose(1, 2)
