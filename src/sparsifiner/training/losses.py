"""The losses of training: those of Wei et al. (CVPR 2023), each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..geometry.tiling import Tiling
from ..predictors import LowRankPredictor

# Score rows held at once, per layer; what is needed of the others is computed again in the backward pass.
CHUNK_BYTES = 64 * 2**20

RowLoss = Callable[[Tensor, int, int], Tensor]
"""The sum of a loss over score rows ``[B, H, R, N]`` of the patches ``start`` to ``stop``; a scalar."""


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the batch.

    Args:
        logits: ``[B, classes]``.
        target: class numbers ``[B]``, or shares ``[B, classes]`` as mixup makes them, smoothed already.
        smoothing: share of a class number spread over all classes.
    """
    if target.is_floating_point():
        return F.cross_entropy(logits.float(), target)
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def logit_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's, mean over the batch.

    ``sum p_t (log p_t - log p_s)``, as the authors compute it.

    Args:
        student: logits ``[B, classes]``.
        teacher: logits ``[B, classes]``.
    """
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of patch tokens after the last layer, both ``[B, P, C]`` and of the same patches."""
    return F.mse_loss(student.float(), teacher.float())


def patch_logit_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the auxiliary heads' logits ``[B, P, classes]``.

    What the code of Wei et al. compares patch by patch with LV-ViT, in the place of the tokens.
    """
    return F.mse_loss(student.float(), teacher.float())


def token_labels(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of every patch with the classes the teacher sees in it, mean over patches and batch.

    The loss on patches of token labeling (Jiang et al., NeurIPS 2021), who weigh it 0.5 and whose labels another
    network has made beforehand. Minus the teacher's entropy, which has no gradient, it is the divergence by which
    the code of DynamicViT (Rao et al., NeurIPS 2021) distils LV-ViT.

    Args:
        student: logits of the auxiliary head ``[B, P, classes]``.
        teacher: logits of the teacher's, for the same patches.
    """
    labels = teacher.float().softmax(-1)
    return F.cross_entropy(student.float().flatten(0, 1), labels.flatten(0, 1))


def attention_reconstruction(
    predictor: LowRankPredictor,
    q: Tensor,
    k: Tensor,
    target_q: Tensor,
    target_k: Tensor,
    tiling: Tiling,
    scale: float,
    target_bias: Tensor | None = None,
) -> Tensor:
    """Squared difference between the predictor's scores and an attention map (Wei et al., section 3.3).

    Summed over heads, patch queries and keys, mean over the batch. Scores are those of the reconstruction
    phase, with the signed basis and all coefficients. No gradient reaches ``q``, ``k`` or the target. No
    ``N x N`` tensor is held where that would exceed :data:`CHUNK_BYTES`: rows come in chunks.

    Args:
        predictor: of the layer.
        q: queries ``[B, H, N, D]`` the predictor sees.
        k: keys ``[B, H, N, D]``.
        target_q: queries ``[B, H, N, D]`` of the attention to imitate: the teacher's, or the layer's own.
        target_k: its keys.
        tiling: the patch grid.
        scale: factor on the logits of that attention.
        target_bias: added to them, ``[1 or B, 1 or H, N, N]``, or None.
    """
    prefix = tiling.num_prefix_tokens
    rows_q, keys = target_q[:, :, prefix:].detach(), target_k.detach().transpose(-1, -2)

    def squared_error(scores: Tensor, start: int, stop: int) -> Tensor:
        logits = (rows_q[:, :, start:stop] @ keys * scale).float()
        if target_bias is not None:
            logits = logits + target_bias[:, :, prefix + start : prefix + stop].detach().float()
        return (scores.float() - logits.softmax(-1)).square().sum()

    return over_score_rows(predictor, q, k, tiling, squared_error) / q.shape[0]


def least_scores(predictor: LowRankPredictor, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
    """Mean absolute score of the candidates a row does not keep; drives them to zero."""
    first = predictor.first_candidate(tiling)
    rest = predictor.num_candidates(tiling) - predictor.num_keep(tiling)
    if rest == 0:
        return q.new_zeros((), dtype=torch.float32)

    def total(scores: Tensor, start: int, stop: int) -> Tensor:
        return scores[..., first:].float().topk(rest, dim=-1, largest=False, sorted=False).values.abs().sum()

    rows = q.shape[0] * q.shape[1] * tiling.num_patches
    return over_score_rows(predictor, q, k, tiling, total) / (rows * rest)


def kept_ratio(predictor: LowRankPredictor, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
    """Squared difference between the share of keys above ``score_threshold`` and ``keep_rate``, mean over rows.

    The step at the threshold is softened to a logistic curve a tenth of the threshold wide, so that a
    gradient reaches the predictor.
    """
    threshold = predictor.settings.score_threshold
    assert threshold is not None
    width = max(abs(threshold) / 10, 1e-6)

    def total(scores: Tensor, start: int, stop: int) -> Tensor:
        share = ((scores.float() - threshold) / width).sigmoid().mean(-1)
        return (share - predictor.keep_rate).square().sum()

    return over_score_rows(predictor, q, k, tiling, total) / (q.shape[0] * q.shape[1] * tiling.num_patches)


def basis_size(predictor: LowRankPredictor) -> Tensor:
    """Mean absolute entry of ``W_up``; makes the basis sparse."""
    weight = predictor.w_down if predictor.w_up is None else predictor.w_up
    return weight.float().abs().mean()


def over_score_rows(predictor: LowRankPredictor, q: Tensor, k: Tensor, tiling: Tiling, loss: RowLoss) -> Tensor:
    """The sum of ``loss`` over the score rows of all patches, a bounded number at a time; q and k get no gradient."""
    coef = predictor.dense_coefficients(q.detach(), k.detach(), tiling)
    basis = predictor.signed_basis(tiling).mT

    def part(rows: Tensor, columns: Tensor, start: int, stop: int) -> Tensor:
        return loss(rows @ columns, start, stop)

    ranges = list(_row_ranges(q.shape[0] * q.shape[1], tiling))
    total = q.new_zeros((), dtype=torch.float32)
    for start, stop in ranges:
        rows = coef[:, :, start:stop]
        if len(ranges) == 1:
            total = total + part(rows, basis, start, stop)
        else:
            total = total + checkpoint(part, rows, basis, start, stop, use_reentrant=False, preserve_rng_state=False)
    return total


def _row_ranges(maps: int, tiling: Tiling) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // (maps * tiling.num_tokens * 4))
    for start in range(0, tiling.num_patches, step):
        yield start, min(start + step, tiling.num_patches)
