"""PyTorch's ``nn.MultiheadAttention`` as self-attention of patches: torchvision's ``vit_*``, open_clip's towers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SparsifinerError
from ...geometry.conv_grid import GridSource, count_prefix_tokens, patch_convolutions
from ...geometry.patch_grid import PatchGrid
from ..layer import SparseAttention, refuse_mask
from .refused import REFUSED, Refusal
from .vit import split_qkv


class SparseMultiheadAttention(SparseAttention, nn.MultiheadAttention):
    """Self-attention with one packed projection. It returns no attention weights: its second result is None."""

    dense_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    @classmethod
    def refusal(cls, dense: Any) -> str | None:
        if dense.dropout > 0:
            return f"it drops attention weights (dropout={dense.dropout}), which a sparse layer cannot; build it with 0"
        if dense.in_proj_weight is None or dense.bias_k is not None or dense.add_zero_attn:
            return "its keys or values have widths or tokens of their own"
        return None

    @classmethod
    def find_owner(cls, model: nn.Module, name: str) -> str | Refusal | None:
        if "Pool" in type(model.get_submodule(name.rpartition(".")[0])).__name__:
            return REFUSED["AttentionPoolLatent"]
        while name:
            name = name.rpartition(".")[0]
            owner = model.get_submodule(name)
            convolutions = patch_convolutions(owner)
            if not convolutions:
                continue
            own = [path for path in convolutions if "." not in path]
            if len(convolutions) == len(own) == 1 and count_prefix_tokens(owner) == 1:
                return name
            return Refusal(
                "no module above it has one patch convolution and a class token, so its tokens are unknown",
                lacks_grid=True,
            )
        return None

    @classmethod
    def follow_grid(cls, owner: Any, dense: nn.Module) -> PatchGrid:
        (path,) = patch_convolutions(owner)
        return GridSource(path).follow(owner, count_prefix_tokens(owner))

    def head_width(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Factor on the logits."""
        return self.head_width() ** -0.5

    def project(self, x: Tensor, **context: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return *split_qkv(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads), None

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return self.out_proj(out)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As in ``nn.MultiheadAttention``, for queries, keys and values that are the same tensor."""
        if key is not query or value is not query:
            raise SparsifinerError("sparse attention is self-attention: query, key and value must be one tensor")
        refuse_mask(attn_mask if attn_mask is not None else key_padding_mask, is_causal)
        x = query if self.batch_first else query.transpose(0, 1)
        out = super().forward(x)
        return (out if self.batch_first else out.transpose(0, 1)), None
