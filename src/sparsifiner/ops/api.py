"""The one operator of the library: its contract, its checks, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SparsifinerError
from . import native
from .connectivity import Connectivity
from .gather import gather_attention
from .reference import reference_attention
from .tail import Tail

_Run = Callable[[Tensor, Tensor, Tensor, Connectivity, "Tail | None", "Tensor | None", float], Tensor]
_RUN: dict[str, _Run] = {
    "reference": reference_attention,
    "gather": gather_attention,
    "native": native.native_attention,
}
BACKENDS: tuple[str, ...] = tuple(_RUN)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    *,
    tail: Tail | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Full-rank attention of each query to the keys its tile keeps (Wei et al., section 3.4).

    ``softmax(scale * q k^T + bias) v`` over the kept keys and, with a tail, over the pooled tokens that
    stand in for the others. Prefix tokens' query rows are dense. A row whose keys are all masked gives zeros.

    Args:
        q: queries ``[B, H, N, D]``, float64, float32, bfloat16 or float16.
        k: keys ``[B, H, N, D]``.
        v: values ``[B, H, N, D]``.
        connectivity: the kept keys, for the ``N`` tokens of its tiling.
        tail: pooled keys and values ``[B, H, P, D]`` with a bias ``[B, H, T, P]``.
        attn_bias: added to the logits per query and key, ``[1 or B, 1 or H, N, N + P]``; the last ``P``
            columns belong to the tail.
        scale: factor on the logits; ``D ** -0.5`` if None.
        backend: ``reference`` (masked dense, the test oracle), ``gather`` (any device, differentiable),
            ``native`` (CPU inference in C++), or ``auto``, which takes ``native`` where it can run.

    Returns:
        ``[B, H, N, D]`` in the dtype of ``q``.

    Raises:
        ValueError: if a tensor has the wrong shape, dtype or device, or the backend cannot run here;
            the message names the tensor and what was expected.
        IndexError: if an index is negative or not below ``N`` (checked where the tensors are on a CPU).
    """
    _check(q, k, v, connectivity, tail, attn_bias)
    others = (k, v, connectivity.bias, *((tail.k, tail.v, tail.bias) if tail is not None else ()))
    if backend == "auto":
        backend = choose_backend(q, *others, attn_bias=attn_bias)[0]
    elif (reason := why_not(backend, q, *others, attn_bias=attn_bias)) is not None:
        raise SparsifinerError(f"backend {backend!r} cannot run here: {reason}")
    return _RUN[backend](q, k, v, connectivity, tail, attn_bias, q.shape[-1] ** -0.5 if scale is None else scale)


def why_not(backend: str, q: Tensor, *others: Tensor | None, attn_bias: Tensor | None = None) -> str | None:
    """Why ``backend`` cannot run, in words, or None if it can.

    Args:
        backend: name of the backend.
        q: queries ``[B, H, N, D]``, or any tensor like them.
        others: further inputs of the call, of which only matters whether gradients are needed.
        attn_bias: as in ``sparse_attention``.
    """
    if backend not in _RUN:
        return f"there is no such backend; choose one of auto, {', '.join(_RUN)}"
    if backend == "native":
        return native.why_not(q, *others, attn_bias=attn_bias)
    return None


def choose_backend(q: Tensor, *others: Tensor | None, attn_bias: Tensor | None = None) -> tuple[str, str]:
    """The backend ``auto`` takes, and why; arguments as in ``why_not``."""
    reason = native.why_not(q, *others, attn_bias=attn_bias)
    if reason is None:
        return "native", "the compiled CPU kernels serve this call"
    return "gather", f"native cannot run here: {reason}"


def _check(
    q: Tensor, k: Tensor, v: Tensor, connectivity: Connectivity, tail: Tail | None, attn_bias: Tensor | None
) -> None:
    if q.ndim != 4:
        raise SparsifinerError(f"q must have shape [B, H, N, D], got {list(q.shape)}")
    if q.dtype not in DTYPES:
        raise SparsifinerError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}")
    batch, heads, num_tokens, width = q.shape
    tiling = connectivity.tiling
    if num_tokens != tiling.num_tokens:
        raise SparsifinerError(
            f"q must have {tiling.num_tokens} tokens, {tiling.num_prefix_tokens} prefix tokens and a "
            f"{tiling.grid[0]}x{tiling.grid[1]} patch grid, got {list(q.shape)}"
        )
    tiles = tiling.num_tiles
    expected: list[tuple[str, Tensor, tuple[int | None, ...]]] = [
        ("k", k, (batch, heads, num_tokens, width)),
        ("v", v, (batch, heads, num_tokens, width)),
        ("connectivity.indices", connectivity.indices, (batch, heads, tiles, None)),
    ]
    if connectivity.bias is not None:
        expected.append(("connectivity.bias", connectivity.bias, tuple(connectivity.indices.shape)))
    num_columns = num_tokens
    if tail is not None:
        num_pooled = tail.k.shape[2] if tail.k.ndim == 4 else 0
        num_columns += num_pooled
        expected += [
            ("tail.k", tail.k, (batch, heads, num_pooled, width)),
            ("tail.v", tail.v, (batch, heads, num_pooled, width)),
            ("tail.bias", tail.bias, (batch, heads, tiles, num_pooled)),
        ]
    if attn_bias is not None:
        shared = attn_bias.shape if attn_bias.ndim == 4 else (batch, heads)
        rows = (1 if shared[0] == 1 else batch, 1 if shared[1] == 1 else heads)
        expected.append(("attn_bias", attn_bias, (*rows, num_tokens, num_columns)))
    for name, tensor, shape in expected:
        _check_shape(name, tensor, shape)
        if tensor.device != q.device:
            raise SparsifinerError(f"{name} is on {tensor.device} but q is on {q.device}; move them to one device")
    for name, tensor, _ in expected:
        if name in ("k", "v", "tail.k", "tail.v") and tensor.dtype != q.dtype:
            raise SparsifinerError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if connectivity.indices.dtype != torch.int32:
        raise SparsifinerError(f"connectivity.indices must be int32, got {connectivity.indices.dtype}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if tensor.ndim != len(shape) or any(
        want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        want = ", ".join("K" if size is None else str(size) for size in shape)
        raise SparsifinerError(f"{name} must have shape [{want}], got {list(tensor.shape)}")
