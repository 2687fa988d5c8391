"""timm's standard attention that also tells what the class token attends to, dense and sparse."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from ..module_state import move_state
from .vit import DenseVitAttention, SparseVitAttention, gated_projection, project_vit


@torch.no_grad()
def class_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The class token's attention, mean over heads, float32 ``[B, N]`` (Liang et al., EViT, 2022, section 3.1).

    One row of the attention map; the others are not computed. No gradient flows, as in EViT.

    Args:
        q: queries ``[B, H, N, D]``, the class token first.
        k: keys ``[B, H, N, D]``.
        scale: factor on the logits.
    """
    logits = q[:, :, :1] @ k.transpose(-1, -2)
    return (logits[:, :, 0].float() * scale).softmax(-1).mean(1)


def dense_attention(layer: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Dense attention of a timm ``Attention`` with its own dropout, heads merged: ``[B, N, H * D]``."""
    dropout = layer.attn_drop.p if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=layer.scale)
    return out.transpose(1, 2).flatten(2)


class ScoredAttention(DenseVitAttention):
    """A dense layer whose forward returns its output ``[B, N, C]`` and :func:`class_scores` ``[B, N]``."""

    def to_plain(self) -> Attention:
        """timm's layer back, with the weights of this one; this one must not be used afterwards."""
        plain = Attention.__new__(Attention)
        nn.Module.__init__(plain)
        move_state(self, plain)
        return plain.train(self.training)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = project_vit(self, x)
        out = gated_projection(self, x, dense_attention(self, q, k, v))
        return out, class_scores(q, k, self.scale)


class SparseScoredAttention(SparseVitAttention):
    """The same with sparse attention, whose class row is dense as well."""

    dense_class: ClassVar[type[nn.Module]] = ScoredAttention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v, _ = self.project(x)
        out = self.merge(x, self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out, class_scores(q, k, self.scale)
