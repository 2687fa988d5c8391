"""timm's attention with rotary position embedding: EVA-02, DINOv3, Perception Encoder, RoPE-ViT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from ..layer import SparseAttention, refuse_mask
from .vit import gated_projection, split_heads, split_qkv


class SparseRopeAttention(SparseAttention, AttentionRope):
    """Fused or separate projections, grouped key/value heads, rotary embedding of the patches."""

    dense_class = AttentionRope

    def project(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **context: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        refuse_mask(attn_mask, is_causal)
        if self.qkv is not None:
            q, k, v = split_qkv(self.qkv(x), self.num_heads)
        else:
            q = split_heads(self.q_proj(x), self.num_heads)
            k, v = (split_heads(proj(x), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        q, k = rotate(self, self.q_norm(q), self.k_norm(k), rope)
        if self.num_kv_groups > 1:
            k, v = (y.repeat_interleave(self.num_kv_groups, dim=1) for y in (k, v))
        return q, k, v, None

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return gated_projection(self, x, out)


class SparseEvaAttention(SparseAttention, EvaAttention):
    """As above with EVA's projection: a bias for q and v but none for k."""

    dense_class = EvaAttention

    def project(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **context: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        refuse_mask(attn_mask, is_causal)
        if self.qkv is not None:
            q, k, v = split_qkv(project_without_key_bias(self, x), self.num_heads)
        else:
            q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self, self.q_norm(q), self.k_norm(k), rope)
        return q, k, v, None

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return gated_projection(self, x, out)


def project_without_key_bias(layer: Any, x: Tensor) -> Tensor:
    """The packed projection of EVA and BEiT, whose bias is stored for q and v only."""
    if layer.q_bias is None:
        return layer.qkv(x)
    bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    if layer.qkv_bias_separate:
        return layer.qkv(x) + bias
    return F.linear(x, layer.qkv.weight, bias)


def rotate(layer: Any, q: Tensor, k: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the patch tokens of q and k; prefix tokens stay."""
    if rope is None:
        return q, k
    prefix = layer.num_prefix_tokens

    def rotated(y: Tensor) -> Tensor:
        patches = apply_rot_embed_cat(y[:, :, prefix:], rope, half=layer.rotate_half)
        return torch.cat([y[:, :, :prefix], patches], dim=2)

    return rotated(q), rotated(k)
