"""timm's standard attention: ViT, DeiT, DINOv2, CLIP and SigLIP towers."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers.attention import Attention
from torch import Tensor, nn

from ..layer import SparseAttention, refuse_mask
from ..module_state import LEAF, move_state


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, N, H * D]`` to ``[B, H, N, D]``, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The packed projection ``[B, N, 3 * H * D]`` to three views ``[B, H, N, D]``."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def project_vit(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, H, N, D]`` of timm's ``Attention``, normed where it has norms."""
    q, k, v = split_qkv(layer.qkv(x), layer.num_heads)
    return layer.q_norm(q), layer.k_norm(k), v


class DenseVitAttention(Attention):
    """Base of layers that do more than timm's ``Attention`` with its own weights.

    Args:
        dense: the layer to take over. It must not be used afterwards: its weights are shared.
    """

    def __init__(self, dense: Attention) -> None:
        nn.Module.__init__(self)
        move_state(dense, self)
        vars(self)["__module__"] = LEAF
        self.train(dense.training)


class SparseVitAttention(SparseAttention, Attention):
    """q/k norm, output norm, output gate and projection as in timm's ``Attention``."""

    dense_class: ClassVar[type[nn.Module]] = Attention
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module

    def project(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        refuse_mask(attn_mask, is_causal)
        return *project_vit(self, x), None

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return gated_projection(self, x, out)


def gated_projection(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """Output norm, then the sigmoid gate where there is one, then the projection."""
    out = layer.norm(out)
    if layer.gate is not None:
        out = out * layer.gate(x).sigmoid()
    return layer.proj_drop(layer.proj(out))
