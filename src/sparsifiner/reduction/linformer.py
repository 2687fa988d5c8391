"""Linformer (Wang et al., 2020): keys and values projected to a few rows, the same for every image."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from .._utils.checks import number
from .._utils.copying import copy_model
from .._utils.messages import shown
from ..attention.adapters.scored import dense_attention
from ..attention.adapters.vit import DenseVitAttention, gated_projection, project_vit
from ..attention.layer import refuse_mask
from ..attention.module_state import COMPILED, weight_like
from ..config import check_keep_rate
from ..errors import SparsifinerError
from ..geometry.counting import num_kept
from ..geometry.patch_grid import PatchGrid, follow_grid
from ..geometry.subset import z_order
from .blocks import reduces_tokens


class LinformerAttention(DenseVitAttention):
    """``softmax(q (E k)^T) (F v)`` with learned ``E`` and ``F`` ``[n_down, N]``, shared by the heads of a layer.

    They start as average pooling: prefix tokens by themselves, the patches in compact regions of nearly equal size.

    Args:
        dense: the layer to take over. It must not be used afterwards: its weights are shared.
        start: the pooling matrix ``[n_down, N]``.
    """

    def __init__(self, dense: Attention, start: Tensor) -> None:
        super().__init__(dense)
        start = start.to(weight_like(dense))
        self.key_basis = nn.Parameter(start.clone())
        self.value_basis = nn.Parameter(start.clone())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        refuse_mask(attn_mask, is_causal)
        if x.shape[1] != self.key_basis.shape[1]:
            raise SparsifinerError(
                f"Linformer's projections were made for {self.key_basis.shape[1]} tokens, got {x.shape[1]}; "
                f"convert a model built for this image size"
            )
        q, k, v = project_vit(self, x)
        k = torch.einsum("mn,bhnd->bhmd", self.key_basis, k)
        v = torch.einsum("mn,bhnd->bhmd", self.value_basis, v)
        return gated_projection(self, x, dense_attention(self, q, k, v))


def linformer(
    model: nn.Module, *, keep_rate: float | None = None, n_down: int | None = None, inplace: bool = False
) -> nn.Module:
    """Replace the attention of a timm Vision Transformer by Linformer's, with average pooling to start from.

    Args:
        model: a timm model made of timm's standard attention. It is copied unless ``inplace``.
        keep_rate: rows of the projections over tokens, ``n_down / N``, rounded up; at least one row more than there are
            prefix tokens. At 1 the model stays what it was. Or
        n_down: the number of rows.
        inplace: convert ``model`` itself and return it.

    Raises:
        ValueError: if no layer of ``model`` is timm's standard attention, it prunes or merges tokens, or not exactly
            one size is given, in its range.
    """
    number("n_down", n_down, least=1, integer=True, optional=True)
    if (keep_rate is None) == (n_down is None):
        raise SparsifinerError("linformer needs the rows of its projections: give keep_rate or n_down, one of the two")
    if not isinstance(model, nn.Module):
        raise SparsifinerError(f"linformer takes a model, an nn.Module; got {shown(model)}")
    if reduces_tokens(model):  # the projections serve one number of tokens
        raise SparsifinerError(
            f"linformer cannot convert {type(model).__name__}: tokens are removed or merged in it; start from the "
            f"model as it was"
        )
    names = [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is Attention]
    if not names or getattr(model, "patch_embed", None) is None:
        raise SparsifinerError(f"{type(model).__name__} is no Vision Transformer with timm's standard attention")
    if any(name.endswith("._orig_mod") for name in names):
        raise SparsifinerError(f"linformer cannot convert {type(model).__name__}: of an attention layer, {COMPILED}")
    if not isinstance(getattr(model, "patch_drop", nn.Identity()), nn.Identity):
        raise SparsifinerError(
            f"linformer cannot convert {type(model).__name__}: it drops patches at random in training, and the "
            f"projections serve one number of tokens; build it with patch_drop_rate=0"
        )
    if not inplace:
        model = copy_model(model)
    grid = follow_grid(model)
    if keep_rate is not None:
        n_down = num_kept(check_keep_rate(keep_rate), grid.num_prefix_tokens + grid.num_patches)
    assert n_down is not None
    start = average_pooling(grid, max(grid.num_prefix_tokens + 1, n_down))
    converted: dict[nn.Module, LinformerAttention] = {}
    for name in names:
        dense: Any = model.get_submodule(name)
        if type(dense) is not Attention:  # in a block that stands at several places
            continue
        if dense not in converted:
            converted[dense] = LinformerAttention(dense, start)
        model.set_submodule(name, converted[dense])
    return model


def average_pooling(grid: PatchGrid, n_down: int) -> Tensor:
    """Matrix ``[n_down, N]`` that keeps prefix tokens and averages patches over runs of a Z-order curve.

    Args:
        grid: the patch grid and its prefix tokens.
        n_down: rows, more than there are prefix tokens.
    """
    prefix = grid.num_prefix_tokens
    regions = min(n_down - prefix, grid.num_patches)
    place = z_order(grid.shape, torch.device("cpu")).argsort().argsort()
    member = torch.nn.functional.one_hot(place * regions // grid.num_patches, regions).T.float()
    return torch.block_diag(torch.eye(prefix), member / member.sum(1, keepdim=True))
