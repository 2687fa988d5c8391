"""``topk``: the best candidates of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from .registry import Operation


def top_keys(scores: Tensor, count: int, backend: str = "auto") -> Tensor:
    """Numbers of the ``count`` best candidates of every row. No gradient flows.

    NaN counts as the highest score, as in ``torch.topk``. Which of several equal scores are taken is the backend's
    choice; the compiled kernels take the lowest numbers.

    Args:
        scores: ``[..., candidates]``.
        count: keys to keep, at most ``candidates``.
        backend: which kernel serves, see :func:`sparsifiner.ops.backends`.

    Returns:
        int32 ``[..., count]``, rising.

    Raises:
        ValueError: if ``count`` is negative or more than there are candidates.
    """
    return TOPK(scores, count, backend=backend)


def check_topk(count: int, columns: int) -> None:
    """Refuse to select fewer than none or more than there are."""
    if not 0 <= count <= columns:
        raise SparsifinerError(f"top-k of {columns} columns needs 0 <= k <= {columns}, got {count}")


def _reference(scores: Tensor, count: int) -> Tensor:
    check_topk(count, scores.shape[-1])
    return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values.to(torch.int32)


def _fake(scores: Tensor, count: int, *_: object) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int32)


TOPK = Operation(
    "topk",
    "(Tensor scores, SymInt count) -> Tensor",
    reference=_reference,
    fake=_fake,
    batched=("scores",),
)
