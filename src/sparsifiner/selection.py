"""The choice of the best-scoring keys: exact top-k, in C++ where that can run."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu


def top_keys(scores: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` best candidates of every row, int32 ``[..., count]``. No gradient flows.

    In C++ they come in rising order, ties go to the lowest number and NaN is refused; ``torch.topk``, which
    serves elsewhere, promises none of that.

    Args:
        scores: ``[..., candidates]``.
        count: keys to keep, at most ``candidates``.
    """
    if cpu.why_not(scores) is None:
        return native_topk(scores.detach(), count)
    return scores.topk(count, dim=-1, sorted=False).indices.to(torch.int32)


@torch.library.custom_op("sparsifiner::native_topk", mutates_args=(), device_types="cpu")
def native_topk(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of each row of ``[..., C]``, int32 ``[..., count]``, rising; lowest first on ties."""
    columns = scores.shape[-1]
    flat = scores.contiguous().view(-1, columns) if columns else scores.reshape(0, 0)
    out = scores.new_empty((*scores.shape[:-1], count), dtype=torch.int32)
    cpu._native.topk(
        flat.data_ptr(),
        scores.dtype == torch.bfloat16,
        flat.shape[0],
        columns,
        columns,
        count,
        out.data_ptr(),
        count,
        0,
        torch.get_num_threads(),
    )
    return out


@native_topk.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int32)
