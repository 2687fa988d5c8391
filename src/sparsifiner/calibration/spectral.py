"""A closed-form start of the low-rank predictor: pooled keys, interpolated scores, principal q/k projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention.layer import SparseAttention
from ..predictors import LowRankPredictor


def second_moments(layer: SparseAttention, q: Tensor, k: Tensor) -> Tensor:
    """Uncentred second moments of the queries and keys of one image, float64 ``[2, H, D, D]``.

    Args:
        layer: says which queries are patches.
        q: queries ``[1, H, N, D]``.
        k: keys ``[1, H, N, D]``.
    """
    patches = q[0, :, layer.grid.num_prefix_tokens :].double()
    keys = k[0].double()
    return torch.stack([patches.mT @ patches / patches.shape[1], keys.mT @ keys / keys.shape[1]]).cpu()


def project_queries_and_keys(moments: Tensor, width: int, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """The two shared projections of rank ``width`` whose product keeps the logits of all heads best.

    Minimises ``sum_h E (q_h^T (A^T B - I) k_h)^2`` over ``A`` and ``B`` ``[width, D]`` by alternating least
    squares from the truncated singular value decomposition for the mean head. At full width it is exact.

    Args:
        moments: from :func:`second_moments`, a sum over images, ``[2, H, D, D]``.
        width: the predictor's width.
        rounds: alternations.

    Returns:
        ``A`` for the queries and ``B`` for the keys, float32.
    """
    head_dim = moments.shape[-1]
    eye = torch.eye(head_dim, dtype=moments.dtype)
    if width >= head_dim:
        return eye[:width].float(), eye[:width].float()
    queries, keys = moments / moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    heads = (moments[0].diagonal(dim1=-2, dim2=-1).sum(-1) * moments[1].diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(
        min=1e-30
    )
    queries = (queries + 1e-6 * eye) * (heads / heads.mean())[:, None, None]
    keys = keys + 1e-6 * eye
    root_q, root_k = _root(queries.mean(0)), _root(keys.mean(0))
    left, values, right = torch.linalg.svd(root_q @ root_k)
    half = values[:width].sqrt()[:, None]
    a = half * (left[:, :width].mT @ torch.linalg.inv(root_q))
    b = half * (right[:width] @ torch.linalg.inv(root_k))
    for _ in range(rounds):
        a = _least_squares(queries, keys, b)
        b = _least_squares(keys, queries, a)
    balance = (b.norm() / a.norm()).sqrt()
    return (a * balance).float(), (b / balance).float()


def _least_squares(ours: Tensor, theirs: Tensor, fixed: Tensor) -> Tensor:
    """``A`` that minimises ``sum_h tr(C_h (A^T B - I) K_h (A^T B - I)^T)`` for given ``B``, ``[width, D]``.

    The condition ``sum_h C_h A^T (B K_h B^T) = sum_h C_h K_h B^T`` is linear in ``A``.
    """
    width, head_dim = fixed.shape
    inner = fixed @ theirs @ fixed.mT  # [H, width, width]
    system = torch.einsum("hij,hab->iajb", ours, inner).reshape(head_dim * width, head_dim * width)
    wanted = (ours @ theirs @ fixed.mT).sum(0).reshape(-1, 1)
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(system)).view(head_dim, width).mT


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values.clamp(min=1e-12).sqrt()[:, None] * vectors.mT)


def regions(grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Cut a patch grid into exactly ``count`` near-square regions, in bands of rows.

    Returns:
        The region of each patch, int64 ``[patches]``, and the centres of the regions, rows and columns in
        patches, float32 ``[count, 2]``.
    """
    rows, columns = grid
    count = min(count, rows * columns)
    bands = min(rows, max(1, -(-count // columns), round(math.sqrt(count * rows / columns))), count)
    region = torch.zeros(rows, columns, dtype=torch.int64)
    first = 0
    for band in range(bands):
        share = (band + 1) * count // bands - band * count // bands
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        region[top:bottom] = first + torch.arange(columns) * share // columns
        first += share
    flat = region.flatten()
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    sums = torch.zeros(count, 2).index_add_(0, flat, places.float())
    return flat, sums / flat.bincount(minlength=count)[:, None]


def pooling_basis(grid: tuple[int, int], num_prefix_tokens: int, n_down: int) -> tuple[Tensor, Tensor]:
    """``W_down`` that averages keys over regions and ``W_up`` that spreads a region's weight over its surroundings.

    Prefix tokens get a row of the basis each where there are enough. Columns of ``W_up`` sum to 1: they hand the
    attention of a region to its keys, by a Gaussian as wide as the region.

    Returns:
        Both ``[N, n_down]``, float32.
    """
    own = num_prefix_tokens if n_down >= 2 * num_prefix_tokens + 1 else 0
    region, centres = regions(grid, n_down - own)
    count = len(centres)
    num_tokens = num_prefix_tokens + len(region)
    down, up = torch.zeros(2, num_tokens, n_down)
    down[:own, :own] = up[:own, :own] = torch.eye(own)
    members = torch.nn.functional.one_hot(region, count).float()
    down[num_prefix_tokens:, own : own + count] = members / members.sum(0)
    rows, columns = grid
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    distance = (places[:, None].float() - centres[None]).square().sum(-1)
    pitch = rows * columns / count
    spread = torch.exp(-distance / (0.5 * pitch))
    up[num_prefix_tokens:, own : own + count] = spread / spread.sum(0)
    return down, up


@torch.no_grad()
def start(predictor: LowRankPredictor, moments: Tensor, scale: float) -> None:
    """Give ``predictor`` the closed-form start for the queries and keys that ``moments`` describes, in place.

    Its coefficients are then the attention to the mean keys of the regions, at the reduced width.

    Args:
        predictor: float32, of one layer.
        moments: from :func:`second_moments`, summed over images.
        scale: factor on the logits of the attention layer.
    """
    width = predictor.q_proj.out_features
    for_queries, for_keys = project_queries_and_keys(moments, width)
    factor = math.sqrt(scale / predictor.scale)
    for linear, weight in ((predictor.q_proj, for_queries), (predictor.k_proj, for_keys)):
        linear.weight.copy_(weight * factor)
        linear.bias.zero_()
    down, up = pooling_basis(predictor.grid, predictor.num_prefix_tokens, predictor.w_down.shape[1])
    predictor.w_down.copy_(down)
    if predictor.w_up is not None:
        # A region of many patches hands each so little that the threshold of the basis would cut it off.
        lowest = 2 * predictor.settings.basis_threshold
        predictor.w_up.copy_(up * max(1.0, lowest / up.amax(0).median().clamp(min=1e-12).item()))
