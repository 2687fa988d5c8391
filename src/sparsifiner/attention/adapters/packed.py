"""Attention with one packed projection, as the repositories of DINOv2, DINOv3, Depth-Anything and VGGT write it.

Their classes are matched by structure, not by name, and checked by numbers before they are converted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import SparsifinerConfig
from ...geometry.conv_grid import GridSource, count_prefix_tokens, find_conv_owner, patch_convolutions
from ...geometry.patch_grid import PatchGrid
from ..layer import SparseAttention, refuse_mask
from ..module_state import move_state, weight_like, why_not_movable
from .refused import Refusal
from .vit import split_qkv

_CHILDREN = {"qkv", "proj", "attn_drop", "proj_drop", "q_norm", "k_norm", "rope"}
_CONTEXT = {"attn_bias", "attn_mask", "is_causal", "rope", "pos"}
"""Arguments of ``forward`` besides the tokens: no bias or mask, but a rotary embedding or the positions for one."""


class SparsePackedAttention(SparseAttention):
    """Any class with ``qkv``, ``proj``, ``num_heads`` and ``scale``, norms of q and k, and a rotary embedding.

    The class it stands in for is that of the instance it was made from.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Module
    tells_grid: ClassVar[str] = "one convolution that makes the patches"
    qkv: nn.Module

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        rate = getattr(dense, "attn_drop", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"it drops attention weights (attn_drop={rate}), which a sparse layer cannot; build it with 0"
        return super().refusal(dense) or why_not_movable(dense) or cls.check(dense)

    @classmethod
    def check(cls, dense: Any) -> str | None:
        """The reason why the layer would not compute what ``dense`` does, or None."""
        return why_not_equal(dense)

    @classmethod
    def find_owner(cls, model: nn.Module, name: str) -> str | None:
        return find_conv_owner(model, name)

    @classmethod
    def follow_grid(cls, owner: nn.Module, dense: nn.Module) -> PatchGrid:
        (path,) = patch_convolutions(owner)
        return GridSource(path).follow(owner, count_prefix_tokens(owner), built_by=getattr(owner, "patch_embed", None))

    def __init__(self, dense: nn.Module, config: SparsifinerConfig, grid: PatchGrid) -> None:
        super().__init__(dense, config, grid)
        self.made_from = type(dense)

    def to_dense(self) -> nn.Module:
        dense = self.made_from.__new__(self.made_from)
        nn.Module.__init__(dense)
        move_state(self, dense, skip=("grid", "config", "override", "observer", "predictor", "made_from"))
        return dense.train(self.training)

    def project(
        self, x: Tensor, *, attn_bias: Any = None, attn_mask: Any = None, is_causal: bool = False, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        refuse_mask(attn_bias if attn_mask is None else attn_mask, is_causal)
        return *project(self, x, **context), None

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        return merge(self, out)

    def forward_list(self, x_list: list[Tensor], attn_bias: Any = None, rope_list: Any = None) -> list[Tensor]:
        """DINOv3's training: crops of one size, one after the other."""
        ropes = [None] * len(x_list) if rope_list is None else rope_list
        return [self(x, attn_bias=attn_bias, rope=rope) for x, rope in zip(x_list, ropes, strict=True)]


def project(layer: Any, x: Tensor, rope: Any = None, pos: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, H, N, D]`` of a layer of this structure."""
    heads = layer.num_heads if hasattr(layer, "num_heads") else layer.num_attention_heads
    q, k, v = split_qkv(layer.qkv(x), heads)
    q, k = (norm(y) if norm is not None else y for norm, y in ((getattr(layer, "q_norm", None), q),
                                                              (getattr(layer, "k_norm", None), k)))  # fmt: skip
    own = getattr(layer, "rope", None)
    if own is not None:
        q, k = own(q, pos), own(k, pos)
    if rope is not None:
        sin, cos = rope
        q, k = _rotate(q, sin, cos), _rotate(k, sin, cos)
    return q, k, v


def merge(layer: Any, out: Tensor) -> Tensor:
    """The layer's output from the attended values ``[B, N, H * D]``."""
    out = layer.proj(out)
    drop = getattr(layer, "proj_drop", None)
    return out if drop is None else drop(out)


def _rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotary embedding of the last tokens of ``[B, H, N, D]`` in halves, all in the dtype of ``sin`` (DINOv3)."""
    y = x.to(sin.dtype)
    prefix, patches = y.split([x.shape[-2] - sin.shape[-2], sin.shape[-2]], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    patches = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, patches], dim=-2).to(x.dtype)


def has_one_qkv(module: nn.Module) -> bool:
    """True for a module with ``qkv``, ``proj``, heads and a scale, and no child that is not known here."""
    children = {name for name, child in module.named_children() if child is not None}
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    heads = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
    return (
        {"qkv", "proj"} <= children <= _CHILDREN
        and isinstance(heads, int)
        and isinstance(getattr(module, "scale", None), float)
        and getattr(qkv, "out_features", 0) == 3 * getattr(proj, "in_features", -1)
    )


def find_packed_adapter(module: nn.Module) -> type[SparsePackedAttention] | Refusal | None:
    """The adapter where ``module`` has this structure and gives these numbers, the reason if not the latter, or None
    for other modules."""
    if module._parameters or not has_one_qkv(module):
        return None
    reason = SparsePackedAttention.refusal(module)
    return SparsePackedAttention if reason is None else Refusal(reason)


def why_not_equal(dense: Any) -> str | None:
    """The reason why projection, dense attention and merging here are not what ``dense`` computes, or None.

    Both run on random tokens, with rotary embeddings where ``dense`` takes them.
    """
    known = inspect.signature(type(dense).forward).parameters
    unknown = [name for name in list(known)[2:] if name not in _CONTEXT]
    if unknown:
        return f"its forward takes {', '.join(unknown)}, which the adapter for attention with one qkv does not know"

    def run(layer: Any, ours: bool) -> Tensor:
        like, tokens, width = weight_like(layer), 10, layer.proj.in_features
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, tokens, width, generator=generator).to(like)
        contexts: list[dict[str, Any]] = [{}]
        if "rope" in known:
            angles = torch.rand(tokens - 1, width // layer.num_heads, generator=generator).to(like)
            for dtype in (x.dtype, torch.bfloat16):
                contexts.append({"rope": (angles.sin().to(dtype), angles.cos().to(dtype))})
        if getattr(layer, "rope", None) is not None:
            places = torch.arange(tokens, device=like.device)
            contexts = [{"pos": torch.stack([places // 3, places % 3], dim=-1).expand(2, -1, -1)}]
        if not ours:
            return torch.stack([layer(x, **context) for context in contexts])
        outputs = []
        for context in contexts:
            q, k, v = project(layer, x, **context)
            out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), scale=layer.scale)
            outputs.append(merge(layer, out.to(v.dtype).transpose(1, 2).flatten(2)))
        return torch.stack(outputs)

    return difference(dense, run)


def difference(dense: nn.Module, run: Callable[[Any, bool], Tensor]) -> str | None:
    """The reason why ``run(layer, True)``, what is computed here, is not ``run(layer, False)``, what ``dense`` does,
    for a copy of ``dense`` whose constant parameters, such as fresh tables of zeros, are random."""
    with torch.no_grad(), torch.device("cpu"):
        try:
            layer = copy.deepcopy(dense).eval()
            generator = torch.Generator().manual_seed(0)
            if weight_like(layer).device.type == "meta":
                layer = layer.to_empty(device="cpu")
                for tensor in (*layer.parameters(), *layer.buffers()):
                    tensor.fill_(1)
            for module in layer.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            for parameter in layer.parameters():
                if (
                    parameter.is_floating_point()
                    and parameter.numel() > 1
                    and (parameter == parameter.flatten()[0]).all()
                ):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            got, want = run(layer, True), run(layer, False)
            error = ((got - want).float().norm() / want.float().norm().clamp(min=1e-30)).item()
        except Exception as failure:
            what = f"{type(failure).__name__}: {failure}".splitlines()[0]
            return f"it looks like attention with one qkv, but could not be run to check that ({what})"
    if error <= 16 * torch.finfo(want.dtype).eps:
        return None
    return (
        f"it looks like attention with one qkv, but on random tokens its output is not that of softmax(q k^T) v "
        f"(relative difference {error:.1e})"
    )
