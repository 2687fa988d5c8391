"""The paper's learned predictor: a low-rank estimate of the attention map (Wei et al., section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.checks import choose, flag, number
from ..errors import SparsifinerError
from ..geometry.subset import SubsetTiling
from ..geometry.tiling import Tiling
from ..ops.connectivity import Connectivity
from ..ops.inputs import AttentionInputs
from ..ops.tail import KeyGroups
from .base import LayerShape, Predictor, PredictorConfig, TileScores, value_distance_macs
from .registry import register_predictor

Reduction = Literal["max", "sum"]
LARGEST = 1e6  # of thresholds and factors; whole numbers beyond 64 bits are none that torch takes


@dataclass(frozen=True)
class LowRankConfig(PredictorConfig):
    """Settings of the paper's predictor (Wei et al., section 3.3); ``SparsifinerConfig.paper`` has the published ones.

    Args:
        reduce_n_factor: ``n_down = num_tokens // reduce_n_factor``.
        n_down: number of basis rows, instead of ``reduce_n_factor``.
        reduce_c_factor: head width divided by the predictor's width.
        scale: factor on the predictor's logits; ``"head_dim"`` is ``(head_dim / reduce_c_factor) ** -0.5``,
            ``"num_heads"`` the authors' ``num_heads ** -0.5``.
        coef_topk: coefficients kept per row, or all with None. The paper keeps 8, which leaves most keys of a tile
            without a score; nothing computes less for it.
        coef_threshold: coefficients at or below it become zero, or None.
        basis_threshold: entries of ``|W_up|`` at or below it become zero; 0.02 in the paper.
        score_threshold: keep every key that scores above it, instead of the top ``keep_rate``.
        share_basis: one matrix serves as ``W_down`` and ``W_up``.
        reduction: how the queries of a tile are merged into one score per key, ``max`` or ``sum``.
        attn_recon: the paper's attention-reconstruction phase. In training mode attention runs dense and scores use
            the signed basis and all coefficients.
    """

    learned = True

    reduce_n_factor: int = 6
    n_down: int | None = None
    reduce_c_factor: int = 1
    scale: float | Literal["head_dim", "num_heads"] = "head_dim"
    coef_topk: int | None = None
    coef_threshold: float | None = None
    basis_threshold: float = 0.0
    score_threshold: float | None = None
    share_basis: bool = False
    reduction: Reduction = "max"
    attn_recon: bool = False

    def __post_init__(self) -> None:
        for name in ("reduce_n_factor", "reduce_c_factor", "n_down", "coef_topk"):
            number(name, getattr(self, name), least=1, integer=True, optional=name in ("n_down", "coef_topk"))
        if self.coef_topk is not None and self.coef_threshold is not None:
            raise SparsifinerError("coef_topk and coef_threshold exclude each other; set one of them to None")
        for name in ("basis_threshold", "coef_threshold", "score_threshold"):
            number(name, getattr(self, name), least=0, most=LARGEST, optional=name != "basis_threshold")
        if self.scale not in ("head_dim", "num_heads"):
            number("scale (head_dim, num_heads or a number)", self.scale, above=0, most=LARGEST)
        choose("reduction", self.reduction, get_args(Reduction))
        for name in ("share_basis", "attn_recon"):
            flag(name, getattr(self, name))

    @property
    def keeps_any_number(self) -> bool:
        return self.score_threshold is not None

    def with_reconstruction(self, on: bool) -> LowRankConfig:
        return self.replace(attn_recon=on)


@register_predictor("lowrank", LowRankConfig)
class LowRankPredictor(Predictor):
    """Sparse coefficients times a sparse basis, shared by the heads of a layer.

    ``coef = softmax(q' (W_down^T k')^T * scale)`` and ``score = coef |W_up|^T`` with ``q'`` and ``k'``
    of reduced width; 1x1 tiles are the paper's. A larger tile weighs each basis row as the query does that needs
    it most (``reduction="max"``) or as all of them together (``"sum"``). With a tail, the estimated attention counts
    times the distance of the key's value from the pooled value that would stand in for it, as in the training-free
    predictor.

    Args:
        settings: of the predictor.
        layer: the attention layer; other patch grids than its use a resampled basis.
        keep_rate, keep_prefix: as in ``Predictor``.

    Raises:
        ValueError: if the reduced width or number of basis rows would be zero.
    """

    note = (
        "The low-rank predictor was not trained: it starts from random weights, so the keys it keeps say nothing "
        "about the method. Calibrate or train it, save the model, and give its folder as the model."
    )

    settings: LowRankConfig

    def __init__(
        self, settings: LowRankConfig, layer: LayerShape, *, keep_rate: float, keep_prefix: bool = True
    ) -> None:
        super().__init__(settings, layer, keep_rate=keep_rate, keep_prefix=keep_prefix)
        grid, head_dim, num_prefix_tokens = layer.grid, layer.head_dim, layer.num_prefix_tokens
        num_tokens = num_prefix_tokens + grid[0] * grid[1]
        n_down = settings.n_down or num_tokens // settings.reduce_n_factor
        width = head_dim // settings.reduce_c_factor
        if not n_down or not width:
            raise SparsifinerError(
                f"the low-rank predictor would have {n_down} basis rows of width {width} for {num_tokens} tokens "
                f"and head width {head_dim}; lower reduce_n_factor or reduce_c_factor, or set n_down"
            )
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        named = {"head_dim": width**-0.5, "num_heads": layer.num_heads**-0.5}
        self.scale = named.get(str(settings.scale)) or float(settings.scale)
        self.q_proj = nn.Linear(head_dim, width)
        self.k_proj = nn.Linear(head_dim, width)
        self.w_down = nn.Parameter(torch.empty(num_tokens, n_down))
        self.w_up = None if settings.share_basis else nn.Parameter(torch.empty(num_tokens, n_down))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random start, standard deviation 0.02 as in the authors' code; calibration or training follows."""
        for linear in (self.q_proj, self.k_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.w_down, std=0.02)
        if self.w_up is not None:
            nn.init.trunc_normal_(self.w_up, std=0.02)

    @property
    def basis_grid(self) -> tuple[int, int]:
        return self.grid

    @property
    def reconstructing(self) -> bool:
        """The paper's first phase: scores imitate attention, with the signed dense basis and all coefficients."""
        return self.training and self.settings.attn_recon

    def narrow(self, q: Tensor, k: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
        """Patch queries and all keys at the reduced width, ``[B, H, num_patches, d]`` and ``[B, H, N, d]``."""
        dtype = self.q_proj.weight.dtype  # the model's; attention may have another
        return self.q_proj(q[:, :, tiling.num_prefix_tokens :].to(dtype)), self.k_proj(k.to(dtype))

    def dense_coefficients(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        """Weights of all basis rows for every patch query, ``[B, H, num_patches, n_down]``; differentiable.

        Args:
            q: queries ``[B, H, N, D]``.
            k: keys ``[B, H, N, D]``.
            tiling: the patch grid of this input.
        """
        return self.coefficients_of(*self.narrow(q, k, tiling), tiling)

    def coefficients_of(self, narrow_q: Tensor, narrow_k: Tensor, tiling: Tiling) -> Tensor:
        """The same from any queries ``[B, H, Q, d]`` and all keys ``[B, H, N, d]`` at the reduced width."""
        k_down = narrow_k.transpose(-1, -2) @ self.resampled(self.w_down, tiling, total=True)
        return (narrow_q @ k_down * self.scale).softmax(-1)

    def coefficients(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        """:meth:`dense_coefficients` made sparse, but while reconstructing."""
        coef = self.dense_coefficients(q, k, tiling)
        if self.reconstructing:
            return coef
        if self.settings.coef_topk is not None and self.settings.coef_topk < coef.shape[-1]:
            top = coef.topk(self.settings.coef_topk, dim=-1, sorted=False)
            return torch.zeros_like(coef).scatter_(-1, top.indices, top.values)
        if self.settings.coef_threshold is not None:
            return F.threshold(coef, self.settings.coef_threshold, 0.0)
        return coef

    def signed_basis(self, tiling: Tiling) -> Tensor:
        """``W_up`` as it was learned, ``[N, n_down]``; ``[B, 1, N, n_down]`` where tokens were pruned."""
        return self.resampled(self.w_down if self.w_up is None else self.w_up, tiling, total=False)

    def basis(self, tiling: Tiling) -> Tensor:
        """``W_up`` as the scores use it: absolute and thresholded but while reconstructing.

        ``[N, n_down]``, or ``[B, 1, N, n_down]`` where tokens were pruned and each image keeps other rows.
        """
        w_up = self.signed_basis(tiling)
        return w_up if self.reconstructing else F.threshold(w_up.abs(), self.settings.basis_threshold, 0.0)

    def token_scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        """Estimated attention of every patch query to every token, ``[B, H, num_patches, N]``; differentiable."""
        return self.coefficients(q, k, tiling) @ self.basis(tiling).mT

    def tile_scores(self, inputs: AttentionInputs, value_distance: Tensor | None) -> tuple[TileScores, int]:
        q, k, tiling = inputs.q, inputs.k, inputs.tiling
        coef = self.coefficients(q, k, tiling)
        coef = tiling.max_patches(coef) if self.settings.reduction == "max" else tiling.sum_patches(coef)
        basis = self.basis(tiling)[..., self.first_candidate(tiling) :, :].mT
        batch, heads, num_tokens, _ = q.shape
        weights_of_keys = None if value_distance is None else value_distance[:, :, None].to(coef.dtype)

        def scores(start: int, stop: int) -> Tensor:
            attention = coef[:, :, start:stop] @ basis
            return attention if weights_of_keys is None else attention * weights_of_keys

        return scores, 2 * batch * heads * num_tokens * q.element_size()

    def value_distances(self, groups: KeyGroups | None, tiling: Tiling) -> Tensor | None:
        """None with a threshold on the scores, which is one on estimated attention, as in the paper."""
        return None if self.settings.score_threshold is not None else super().value_distances(groups, tiling)

    def score_macs(self, num_heads: int, head_dim: int, tiling: Tiling) -> int:
        width, n_down = self.q_proj.out_features, self.w_down.shape[1]
        per_token = 2 * head_dim * width + 2 * width * n_down
        return num_heads * n_down * tiling.num_tiles * self.num_candidates(tiling) + (
            num_heads * tiling.num_tokens * per_token
        )

    def mac_terms(
        self, counted: Callable[[str], int], layer: LayerShape, tiling: Tiling, has_tail: bool
    ) -> tuple[dict[str, int], int]:
        narrow, n_down = self.q_proj.out_features, self.w_down.shape[1]
        projections = counted("q_proj") + counted("k_proj")
        down = layer.num_heads * tiling.num_tokens * narrow * n_down
        coefficients = layer.num_heads * tiling.num_patches * narrow * n_down
        terms = {"q', k' projections": projections, "k_down": down, "coefficients": coefficients}
        terms["scores"] = counted("") - sum(terms.values())
        if has_tail:
            terms["values"] = value_distance_macs(layer, tiling)
        return terms, projections + down

    def select(
        self, scores: TileScores, ranges: list[tuple[int, int]], tiling: Tiling, backend: str = "auto"
    ) -> Connectivity:
        """The top ``keep_rate``, or every key above ``score_threshold``, padded to the longest list."""
        threshold = self.settings.score_threshold
        if threshold is None:
            return super().select(scores, ranges, tiling, backend)
        # A compiled graph needs a fixed width: there every candidate is listed and the bias drops the rest.
        longest = self.num_candidates(tiling)
        if not torch.compiler.is_compiling():
            # Scores are computed twice: all of them at once would be tokens by tokens.
            longest = max(1, max(int((scores(start, stop) > threshold).sum(-1).max()) for start, stop in ranges))
        top = [scores(start, stop).topk(longest, dim=-1) for start, stop in ranges]
        above = torch.cat([part.values for part in top], dim=2) > threshold
        indices = self.with_prefix(torch.cat([part.indices for part in top], dim=2).to(torch.int32), tiling)
        kept = F.pad(above, (indices.shape[-1] - above.shape[-1], 0), value=True)
        bias = torch.zeros(kept.shape, device=kept.device).masked_fill(~kept, float("-inf"))
        return Connectivity(tiling, indices, bias)

    def resampled(self, weight: Tensor, tiling: Tiling, *, total: bool) -> Tensor:
        """``weight`` ``[N, n_down]`` for the grid of ``tiling``, interpolated like position embeddings.

        Prefix rows stay. With ``total`` the weights of the patches are scaled so that a sum over the
        keys keeps its size. Where tokens were pruned, their rows are left out: ``[B, 1, N, n_down]``.
        """
        if tiling.num_image_prefix_tokens != self.num_prefix_tokens:
            raise SparsifinerError(
                f"the predictor was made for {self.num_prefix_tokens} prefix tokens, "
                f"got {tiling.num_image_prefix_tokens}"
            )
        if tiling.image_grid != self.grid:
            prefix, patches = weight[: self.num_prefix_tokens], weight[self.num_prefix_tokens :]
            image = patches.transpose(0, 1).unflatten(1, self.grid)[None].float()
            resized = F.interpolate(image, size=tiling.image_grid, mode="bicubic", antialias=True)[0].flatten(1).mT
            if total:
                resized = resized * (len(patches) / len(resized))
            weight = torch.cat([prefix, resized.to(weight.dtype)])
        return tiling.rows(weight, total=total)[:, None] if isinstance(tiling, SubsetTiling) else weight
