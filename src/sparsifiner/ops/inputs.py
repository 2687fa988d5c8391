"""The tensors of one attention call, as predictors, the tail and the operator take them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry.tiling import Tiling


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values of one attention call, and the tiles its queries form.

    Args:
        q: queries ``[B, H, N, D]`` as attention uses them, after norms and rotary embedding.
        k: keys ``[B, H, N, D]``.
        v: values ``[B, H, N, D]``.
        tiling: the query tiles, for the ``N`` tokens.
        scale: factor on the logits.
        attn_bias: added to the logits, ``[1 or B, 1 or H, N, N]``, or None.
        backend: which kernels compute; ``auto`` takes the fastest that can serve, a name never falls back.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tiling: Tiling
    scale: float
    attn_bias: Tensor | None = None
    backend: str = "auto"

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same in another dtype; these themselves where it is theirs already."""
        if self.q.dtype == dtype:
            return self
        bias = None if self.attn_bias is None else self.attn_bias.to(dtype)
        return self.replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), attn_bias=bias)

    def replace(self, **changes: Any) -> AttentionInputs:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
