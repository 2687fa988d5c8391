"""SAM's global attention with a relative position for rows and one for columns: transformers, segment-anything, timm.

The classes are matched by structure, like those with one packed projection, and take and return maps of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import SparsifinerConfig
from ...errors import SparsifinerError
from ...geometry.conv_grid import find_conv_owner
from ...geometry.patch_grid import PatchGrid
from ..decomposed import fold_bias, folded_width
from ..module_state import weight_like
from .packed import SparsePackedAttention, difference, has_one_qkv, merge, project
from .refused import REFUSED, Refusal

_TABLES = ("rel_pos_h", "rel_pos_w")
_WINDOWS = Refusal(REFUSED["WindowAttention"].reason, costly=False)


class SparseDecomposedAttention(SparsePackedAttention):
    """Attention of all patches with decomposed relative positions; the N x N bias is never made.

    transformers' classes return attention weights as well: None here.
    """

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        rate = getattr(dense, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"it drops attention weights ({rate}), which a sparse layer cannot; set that to 0 in its config"
        return super().refusal(dense)

    @classmethod
    def find_owner(cls, model: nn.Module, name: str) -> str | Refusal | None:  # type: ignore[override]
        block: Any = model.get_submodule(name.rpartition(".")[0])
        return _WINDOWS if getattr(block, "window_size", 0) else find_conv_owner(model, name)

    @classmethod
    def check(cls, dense: Any) -> str | None:
        return why_not_equal(dense)

    def __init__(self, dense: nn.Module, config: SparsifinerConfig, grid: PatchGrid) -> None:
        if config.predictor.learned:
            raise SparsifinerError(
                f"predictor {config.predictor.name!r} has weights for heads of one width, but with decomposed relative "
                f"positions the width follows the image; use the default predictor"
            )
        super().__init__(dense, config, grid)

    def __getattr__(self, name: str) -> Any:
        return self.num_attention_heads if name == "num_heads" else super().__getattr__(name)

    def head_width(self) -> int:
        own = self.proj.in_features // self.num_heads
        return folded_width(own, self.grid.shape) if self.use_rel_pos else own

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> Any:
        """A map of tokens ``[B, rows, columns, C]`` to another."""
        x = hidden_states
        grid = (x.shape[1], x.shape[2])
        if grid != self.grid.shape:
            shape = self.grid.shape
            raise SparsifinerError(
                f"attention got a map of {grid[0]}x{grid[1]} tokens, but the image has {shape[0]}x{shape[1]} patches"
            )
        q, k, v = project(self, x.flatten(1, 2))
        width = v.shape[-1]
        if self.use_rel_pos:
            q, k, v = fold_bias(q, k, v, *relative_positions(self, q, grid), self.scale)
        out = merge(self, self.attend(q, k, v)[..., :width].transpose(1, 2).flatten(2))
        out = out.unflatten(1, grid)
        return (out, None) if self.made_from.__module__.startswith("transformers.") else out


def relative_positions(layer: Any, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bias of each query towards the rows and the columns of keys, ``[B, H, N, rows]`` and ``[B, H, N, columns]``."""
    rows, columns = (_by_distance(getattr(layer, name), side) for name, side in zip(_TABLES, grid, strict=True))
    q = q.unflatten(2, grid)
    return (
        torch.einsum("bhrcd,rkd->bhrck", q, rows).flatten(2, 3),
        torch.einsum("bhrcd,ckd->bhrck", q, columns).flatten(2, 3),
    )


def _by_distance(table: Tensor, side: int) -> Tensor:
    """The vector of each pair of places, ``[side, side, D]``, from a table over their distances, resized to fit."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places + side - 1]


def find_decomposed_adapter(module: Any) -> type[SparseDecomposedAttention] | Refusal | None:
    """The adapter where ``module`` has this structure and gives these numbers, the reason if not the latter, or None
    for other modules."""
    tables = set(module._parameters)
    if not isinstance(getattr(module, "use_rel_pos", None), bool) or not has_one_qkv(module):
        return None
    if tables - set(_TABLES) or (module.use_rel_pos and len(tables) < 2) or getattr(module, "rope", None) is not None:
        return None
    reason = SparseDecomposedAttention.refusal(module)
    return SparseDecomposedAttention if reason is None else Refusal(reason)


def why_not_equal(dense: Any) -> str | None:
    """As for attention with one packed projection, on a map of tokens for which the tables have to be resized."""

    def run(layer: Any, ours: bool) -> Tensor:
        grid, generator = (3, 5), torch.Generator().manual_seed(0)
        x = torch.randn(2, *grid, layer.proj.in_features, generator=generator).to(weight_like(layer))
        if not ours:
            out = layer(x)
            return out[0] if isinstance(out, tuple) else out
        q, k, v = project(layer, x.flatten(1, 2))
        width = v.shape[-1]
        if layer.use_rel_pos:
            q, k, v = fold_bias(q, k, v, *relative_positions(layer, q, grid), layer.scale)
        out = F.scaled_dot_product_attention(q, k, v, scale=layer.scale)[..., :width]
        return merge(layer, out.transpose(1, 2).flatten(2)).unflatten(1, grid)

    return difference(dense, run)
