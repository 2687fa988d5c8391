"""timm's attention with relative position biases: BEiT, and ViT with relative positions."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Attention as BeitAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from ..layer import SparseAttention
from .rope import project_without_key_bias
from .vit import split_qkv


class SparseBeitAttention(SparseAttention, BeitAttention):
    """BEiT's own table of biases, the model's shared one, or both."""

    dense_class = BeitAttention
    takes_bias = True

    def project(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = split_qkv(project_without_key_bias(self, x), self.num_heads)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return q, k, v, _four_dimensional(bias)

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out))


class SparseRelPosAttention(SparseAttention, RelPosAttention):
    """A bias from the layer's own relative-position module, or the model's shared one."""

    dense_class = RelPosAttention
    takes_bias = True
    rel_pos: Any
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module

    def project(
        self, x: Tensor, shared_rel_pos: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self.q_norm(q), self.k_norm(k), v, _four_dimensional(bias)

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out))


def _four_dimensional(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.ndim == 4 else bias[None]
