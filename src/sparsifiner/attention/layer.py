"""The sparse attention layer: qkv, predictor, connectivity, operator, proj."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SparsifinerConfig
from ..errors import SparsifinerError
from ..geometry.patch_grid import PatchGrid
from ..geometry.tiling import Tiling
from ..ops import sparse_attention
from ..ops.connectivity import Connectivity
from ..ops.tail import tail_groups
from ..predictors import Predictor, build_predictor
from .cost import sparse_pays


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did in the last forward pass.

    Args:
        connectivity: the kept keys; None where the layer ran dense (the reconstruction phase, or a
            size at which sparse attention does not pay; see ``SparsifinerConfig.dense_below``).
        q: queries ``[B, H, N, D]`` as attention used them, or None unless tensors were asked for.
        k: keys, likewise.
        v: values, likewise.
        attn_bias: added to the logits, ``[1 or B, 1 or H, N, N]``, likewise; None also where the layer has no bias.
    """

    connectivity: Connectivity | None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attn_bias: Tensor | None = None


Observer = Callable[["SparseAttention", LayerRecord], None]
"""Called with a layer and what it does, tensors included, before it attends."""


class SparseAttention(nn.Module):
    """An attention layer that has taken over the weights of a dense one.

    Parameters keep their names, so state dicts of the dense model fit; the predictor's own weights are
    under ``predictor.``. Subclasses, one per dense class, say how q, k, v come about and what follows.

    Args:
        dense: the attention layer to take over. It must not be used afterwards: its weights are shared.
        config: settings of this layer (one ``keep_rate``).
        grid: the patch grid of the model the layer sits in.
    """

    dense_class: ClassVar[type[nn.Module]]
    takes_bias: ClassVar[bool] = False  # whether :meth:`project` may return a bias
    num_heads: int
    scale: float
    proj: nn.Linear
    proj_drop: nn.Dropout

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        """Why ``dense``, an instance of ``dense_class``, cannot be converted, or None if it can."""
        dropout = getattr(dense, "attn_drop", None)
        if isinstance(dropout, nn.Dropout) and dropout.p > 0:
            return f"it drops attention weights (attn_drop={dropout.p}), which a sparse layer cannot; build it with 0"
        return None

    def __init__(self, dense: nn.Module, config: SparsifinerConfig, grid: PatchGrid) -> None:
        nn.Module.__init__(self)  # not the dense class's own, which would make new weights
        move_state(dense, self)
        self.grid = grid
        self.config = config
        self.observer: Observer | None = None
        self.reset_predictor(grid.shape)
        self.train(dense.training)

    def reset_predictor(self, grid: tuple[int, int]) -> None:
        """A new predictor for ``config``; a learned basis is made for the patch grid ``grid``."""
        weight = self.proj.weight
        self.predictor: Predictor = build_predictor(
            self.config,
            num_heads=self.num_heads,
            head_dim=self.head_width(),
            grid=grid,
            num_prefix_tokens=self.grid.num_prefix_tokens,
        ).to(device=weight.device, dtype=weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles made while somebody watches are not watched."""
        return {**vars(self), "observer": None}

    def to_dense(self) -> nn.Module:
        """The dense layer back, with the weights of this one; this one must not be used afterwards."""
        dense = self.dense_class.__new__(self.dense_class)
        nn.Module.__init__(dense)
        move_state(self, dense, skip=("grid", "config", "observer", "predictor"))
        return dense.train(self.training)

    def configure(self, config: SparsifinerConfig) -> None:
        """Change settings that need no new weights, such as the keep rate."""
        self.config = config
        self.predictor.config = config

    def head_width(self) -> int:
        """Width of a head, ``D``."""
        return self.proj.in_features // self.num_heads

    def project(self, x: Tensor, **context: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v ``[B, H, N, D]`` and an additive bias ``[1 or B, 1 or H, N, N]`` or None."""
        raise NotImplementedError

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output ``[B, N, C]`` from its input and the attended values ``[B, N, H * D]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **context: Any) -> Tensor:
        """The dense layer's contract: ``[B, N, C]`` to ``[B, N, C]``."""
        q, k, v, attn_bias = self.project(x, *args, **context)
        out = self.attend(q, k, v, attn_bias)
        return self.merge(x, out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Predict the connectivity and attend sparsely, ``[B, H, N, D]`` to ``[B, H, N, D]``."""
        # Autocast leaves what norms and rotations return in float32, and would cast it for dense attention.
        q, k = q.to(v.dtype), k.to(v.dtype)
        tiling = self.tiling(q.shape[2])
        if self.runs_dense(q, tiling, attn_bias):
            self._observe(None, q, k, v, attn_bias)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        groups = tail_groups(self.config, k, v, tiling, attn_bias)
        connectivity = self.predictor(q, k, v, tiling, self.scale, attn_bias, groups)
        self._observe(connectivity, q, k, v, attn_bias)
        tail = None
        if groups is not None:
            tail = groups.tail(connectivity, self.predictor.tail_offset)
            if attn_bias is not None:
                patches = attn_bias[..., tiling.num_prefix_tokens :, None]
                attn_bias = torch.cat([attn_bias, groups.blocks.mean_patches(patches)[..., 0]], dim=-1)
        return sparse_attention(q, k, v, connectivity, tail=tail, attn_bias=attn_bias, scale=self.scale)

    def runs_dense(self, q: Tensor, tiling: Tiling, attn_bias: Tensor | None = None) -> bool:
        """Whether attention of queries ``[B, H, N, D]`` runs dense: in the paper's reconstruction phase, which
        trains the predictor against the undisturbed dense model, and where sparse would be slower
        (``config.dense_below``)."""
        if self.training:
            return self.config.attn_recon
        if self._grid_is_below_a_tile():
            return True
        if self.config.dense_below is not None:
            return tiling.num_tokens < self.config.dense_below
        if self.config.predictor == "oracle":
            return False
        score_macs = self.predictor.score_macs(self.num_heads, self.head_width(), tiling)
        return not sparse_pays(self.config, q, tiling, score_macs, attn_bias)

    def tiling(self, num_tokens: int) -> Tiling:
        """The query tiles of the current input, checked against the length of its sequence.

        Where the patch grid is too small for a tile and attention dense, a tile is a patch.
        """
        tile = (1, 1) if self._grid_is_below_a_tile() else self.config.query_tile
        tiling = self.grid.tiling(tile, num_tokens)
        if tiling.num_tokens != num_tokens:
            raise SparsifinerError(
                f"attention got {num_tokens} tokens, but the image has a {tiling.grid[0]}x{tiling.grid[1]} patch grid "
                f"and {tiling.num_prefix_tokens} prefix tokens; patch dropout and token merging are not supported"
            )
        return tiling

    def _grid_is_below_a_tile(self) -> bool:
        """Whether the patch grid has no room for a tile or a block of the tail, in evaluation mode with
        ``dense_below`` left to us: a thumbnail, or a strip one patch high."""
        if self.training or self.config.dense_below is not None:
            return False
        rows, columns = self.grid.shape
        return any(rows < height or columns < width for height, width in self.config.rectangles)

    def _observe(
        self, connectivity: Connectivity | None, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None
    ) -> None:
        if self.observer is not None:
            self.observer(self, LayerRecord(connectivity, q, k, v, attn_bias))

    def extra_repr(self) -> str:
        settings = self.config
        return f"keep_rate={settings.keep_rate}, query_tile={settings.query_tile}, tail={settings.tail}"


def move_state(source: nn.Module, target: nn.Module, skip: tuple[str, ...] = ()) -> None:
    """Give ``target`` the parameters, buffers, submodules, hooks and attributes of ``source``, by reference."""
    fresh = vars(nn.Module())
    for name, value in vars(source).items():
        if name in skip:
            continue
        if name not in fresh:
            setattr(target, name, value)
        elif isinstance(value, dict):
            vars(target)[name].update({k: v for k, v in value.items() if k not in skip})
        elif isinstance(value, set):
            vars(target)[name].update(value)


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Attention masks come with packed or padded sequences, which have no single patch grid."""
    if attn_mask is not None or is_causal:
        raise SparsifinerError("sparse attention takes no attn_mask and is not causal; use densify() for masked inputs")
