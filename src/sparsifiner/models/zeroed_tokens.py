"""Token pruning as the authors simulate it: pruned tokens are zeroed and masked, but stay in the sequence.

It reproduces their checkpoints. It saves nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..attention.adapters.scored import class_scores
from ..attention.adapters.vit import SparseVitAttention
from ..attention.attend import LayerRecord
from ..convert import sparse_layers
from ..geometry.counting import num_kept
from ..geometry.tiling import Tiling
from ..ops import sparse_attention
from ..ops.connectivity import Connectivity
from ..predictors import LayerShape, LowRankConfig, LowRankPredictor
from ..predictors.base import TileScores


class ZeroedTokensVit(VisionTransformer):
    """A ViT whose blocks pass on which patches are alive; dead ones are zeroed after each block."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        alive: Tensor | None = None
        blocks: Any = self.blocks
        for block in blocks:
            attended, alive = block.attn.attend_alive(block.norm1(x), alive)
            x = x + block.drop_path1(block.ls1(attended))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            if alive is not None:
                x = x * _with_class(alive)[..., None]
        return self.norm(x)


class ZeroedTokensAttention(SparseVitAttention):
    """Sparse attention among the patches that are alive, and the choice of those that stay so."""

    token_keep_rate: float | None = None
    predictor: ZeroedTokensPredictor

    def reset_predictor(self, grid: tuple[int, int]) -> None:
        assert isinstance(self.config.predictor, LowRankConfig)
        assert isinstance(self.config.keep_rate, float)
        layer = LayerShape(self.num_heads, self.head_width(), grid, self.grid.num_prefix_tokens)
        self.predictor = ZeroedTokensPredictor(
            self.config.predictor, layer, keep_rate=self.config.keep_rate, keep_prefix=self.config.keep_prefix
        )

    def attend_alive(self, x: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's output ``[B, N, C]`` and which patches are alive after it, boolean ``[B, num_patches]``."""
        q, k, v, _ = self.project(x)
        if alive is not None:
            q, k, v = (y * _with_class(alive)[:, None, :, None] for y in (q, k, v))
        self.predictor.alive = alive
        connectivity = self.predictor(self.inputs(q, k, v))
        if self.observer is not None:
            self.observer(self, LayerRecord(connectivity, q, k, v))
        out = sparse_attention(q, k, v, connectivity, scale=self.scale)
        if self.token_keep_rate is not None:
            # The class token's attention, mean over heads, ranks the patches (the paper, section 3.5; EViT).
            score = class_scores(q, k, self.scale)[:, 1:]
            if alive is not None:
                score = score.masked_fill(~alive, float("-inf"))
            best = score.topk(num_kept(self.token_keep_rate, score.shape[-1]), sorted=False).indices
            alive = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        return self.merge(x, out.transpose(1, 2).flatten(2)), alive


class ZeroedTokensPredictor(LowRankPredictor):
    """The low-rank predictor with dead patches as no candidates; their query rows are zeroed after the block."""

    alive: Tensor | None = None

    def narrow(self, q: Tensor, k: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
        narrow_q, narrow_k = super().narrow(q, k, tiling)
        if self.alive is None:
            return narrow_q, narrow_k
        return narrow_q * self.alive[:, None, :, None], narrow_k * _with_class(self.alive)[:, None, :, None]

    def select(
        self, scores: TileScores, ranges: list[tuple[int, int]], tiling: Tiling, backend: str = "auto"
    ) -> Connectivity:
        if self.alive is None:
            return super().select(scores, ranges, tiling, backend)
        dead_key = ~_with_class(self.alive)[:, None, None, :]
        budget = min(self.num_keep(tiling), int(self.alive[0].sum()))
        alive_scores = torch.cat([scores(start, stop) for start, stop in ranges], dim=2).masked_fill(
            dead_key, float("-inf")
        )
        indices = alive_scores.topk(budget, dim=-1, sorted=False).indices.to(torch.int32)
        return Connectivity(tiling, indices)


def prune_by_zeroing(model: nn.Module, token_keep_rate: dict[int, float]) -> None:
    """Let the layers of a sparse ``ZeroedTokensVit`` numbered in ``token_keep_rate`` choose the survivors, in place."""
    for number, (name, layer) in enumerate(sparse_layers(model).items()):
        pruning = ZeroedTokensAttention(layer.to_dense(), layer.config, layer.grid)
        pruning.token_keep_rate = token_keep_rate.get(number)
        model.set_submodule(name, pruning)


def _with_class(alive: Tensor) -> Tensor:
    """The class token, always alive, put before the patches: ``[B, 1 + num_patches]``."""
    return F.pad(alive, (1, 0), value=True)
