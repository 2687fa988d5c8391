"""``attend``: the one operator of the library, its contract, its checks and its masked dense reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SparsifinerError
from ._common import check_indices
from .connectivity import Connectivity
from .registry import (
    AUTO,
    REFERENCE,
    Operation,
    backends,
    devices_here,
    gradients,
    needs_derivatives,
    refusal,
    serving,
)
from .tail import Tail

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("same", "bfloat16", "int8")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    *,
    tail: Tail | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    precision: str = "same",
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
        precision: what float32 inputs may be rounded to inside by a backend that is faster for it: ``same`` (nothing),
            ``bfloat16`` (queries, keys, values and softmax weights) or ``int8`` (queries and keys, each row to -127 to
            127 times a factor, after a vector near the mean key is taken off the keys, which changes no softmax; Zhang
            et al., SageAttention, 2024). Sums and the result stay float32. ``sparsifiner.ops.cpu.precisions`` names
            those that ``native`` gains by on this machine; elsewhere nothing is rounded.
        backend: ``reference`` (masked dense, the test oracle), ``gather`` (any device, differentiable),
            ``native`` (CPU inference in C++), one added by :func:`sparsifiner.ops.register_backend`, or ``auto``,
            which takes the first one that can serve the call.

    Returns:
        ``[B, H, N, D]`` in the dtype of ``q``.

    Raises:
        ValueError: if a tensor has the wrong shape, dtype or device, or the backend cannot run here;
            the message names the tensor and what was expected.
        IndexError: if an index is negative or not below ``N`` (checked where the tensors are on a CPU).
    """
    _check(q, k, v, connectivity, tail, attn_bias)
    if precision not in PRECISIONS:
        raise SparsifinerError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    tiling = connectivity.tiling
    pooled = (None, None, None) if tail is None else (tail.k, tail.v, tail.bias)
    tensors = (q, k, v, tiling.tokens(q.device), connectivity.indices, connectivity.bias, *pooled, attn_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ATTEND(*tensors, tiling.num_prefix_tokens, scale, precision, backend=backend)


def why_not(backend: str, q: Tensor, *others: Tensor | None, attn_bias: Tensor | None = None) -> str | None:
    """Why ``backend`` cannot run :func:`sparse_attention`, in words, or None if it can.

    Args:
        backend: name of the backend.
        q: queries ``[B, H, N, D]``, or any tensor like them.
        others: further inputs of the call, of which only matters whether gradients are needed.
        attn_bias: as in :func:`sparse_attention`.
    """
    return refusal(ATTEND, backend, needs_derivatives(q, *others), {"q": q, "attn_bias": attn_bias})


def why_never(backend: str, head_dim: int) -> str | None:
    """Why ``backend`` cannot attend here with heads of that width, on any device and in any precision, or None."""
    if backend in (AUTO, REFERENCE):
        return None
    if backend not in backends():
        return f"there is no such backend; choose one of {', '.join((AUTO, *backends()))}"
    devices = devices_here(backend)
    reasons = [
        refusal(ATTEND, backend, False, {"q": torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)})
        for device in devices
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    if None in reasons:
        return None
    return reasons[0] if reasons else "it runs on devices that this machine does not have"


def choose_backend(q: Tensor, *others: Tensor | None, attn_bias: Tensor | None = None) -> tuple[str, str]:
    """The backend ``auto`` takes, and why; arguments as in :func:`why_not`."""
    return serving(ATTEND, "auto", needs_derivatives(q, *others), {"q": q, "attn_bias": attn_bias})


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
        num_columns = num_tokens + num_pooled  # not in place, which would change a size that jit.trace follows
        expected += [
            ("tail.k", tail.k, (batch, heads, num_pooled, width)),
            ("tail.v", tail.v, (batch, heads, num_pooled, width)),
            ("tail.bias", tail.bias, (batch, heads, tiles, num_pooled)),
        ]
    if attn_bias is not None:
        # Compared with the full size first, which holds for a batch of any size: nothing is assumed of it.
        found = attn_bias.shape if attn_bias.ndim == 4 else (batch, heads)
        rows = tuple(
            1 if size != full and size == 1 else full for size, full in zip(found[:2], (batch, heads), strict=True)
        )
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


def empty_output(q: Tensor) -> Tensor:
    """``[B, H, N, D]`` laid out as ``[B, N, H, D]``, so that merging the heads afterwards needs no copy."""
    batch, heads, num_tokens, width = q.shape
    return q.new_empty(batch, num_tokens, heads, width).transpose(1, 2)


def attention_pairs(num_tokens: int, num_prefix_tokens: int, num_keys: int, num_pooled: int) -> int:
    """Query-key pairs of one head of one image: dense prefix rows, ``num_keys + num_pooled`` for each patch row."""
    return num_prefix_tokens * num_tokens + (num_tokens - num_prefix_tokens) * (num_keys + num_pooled)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_tokens: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    tail_bias: Tensor | None,
    attn_bias: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
    precision: str,
) -> Tensor:
    """Softmax over the kept keys by masking a dense score matrix: the oracle of every kernel. O(N^2) by intent.

    Computes in float32, or in float64 where the inputs are float64.
    """
    check_indices(indices, k.shape[2])
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = k, v
    if tail_k is not None and tail_v is not None:
        keys, values = torch.cat([k, tail_k], dim=2), torch.cat([v, tail_v], dim=2)
    mask = _additive_mask(k.shape[2], tile_tokens, indices, bias, tail_bias, num_prefix_tokens, dtype)
    logits = q.to(dtype) @ keys.to(dtype).transpose(-1, -2) * scale + mask
    if attn_bias is not None:
        logits = logits + attn_bias.to(dtype)
    unmasked = logits != float("-inf")
    # A row without any key attends to nothing: its output and its gradients are zero, not NaN.
    logits = torch.where(unmasked.any(-1, keepdim=True), logits, 0.0)
    weights = torch.where(unmasked, logits.softmax(-1), 0.0)
    return (weights @ values.to(dtype)).to(q.dtype)


def _additive_mask(
    num_tokens: int,
    tile_tokens: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    tail_bias: Tensor | None,
    num_prefix_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask of the logits: bias at kept keys and pooled tokens, ``-inf`` elsewhere, ``[B, H, N, N + P]``."""
    batch, heads, num_tiles, _ = indices.shape
    added = torch.zeros(indices.shape, dtype=dtype, device=indices.device) if bias is None else bias.to(dtype)
    rows = torch.full((batch, heads, num_tiles, num_tokens), float("-inf"), dtype=dtype, device=indices.device)
    # Padding entries repeat a key with bias -inf; the maximum keeps the entry that counts.
    rows = rows.scatter_reduce(-1, indices.long(), added, "amax")
    prefix_rows = torch.zeros(batch, heads, num_prefix_tokens, num_tokens, dtype=dtype, device=indices.device)
    if tail_bias is not None:
        rows = torch.cat([rows, tail_bias.to(dtype)], dim=-1)
        prefix_rows = torch.nn.functional.pad(prefix_rows, (0, tail_bias.shape[3]), value=float("-inf"))
    # Places of border tiles outside the grid are written to a token after the last.
    tokens = torch.where(tile_tokens >= 0, tile_tokens, num_tokens).long()
    tiles = torch.arange(num_tiles, device=tokens.device)[:, None].expand(tokens.shape)
    tile_of_token = tiles.new_zeros(num_tokens + 1).scatter(0, tokens.flatten(), tiles.flatten())
    return torch.cat([prefix_rows, rows[:, :, tile_of_token[num_prefix_tokens:num_tokens]]], dim=2)


def _fake(q: Tensor, *_: object) -> Tensor:
    return empty_output(q)


def _flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    tile_tokens: torch.Size,
    indices: torch.Size,
    bias: torch.Size | None,
    tail_k: torch.Size | None,
    tail_v: torch.Size | None,
    tail_bias: torch.Size | None,
    attn_bias: torch.Size | None,
    num_prefix_tokens: int,
    *_: object,
    **__: object,
) -> int:
    """Every query row times every key listed for it: padding included, a border tile's empty places not."""
    batch, heads, num_tokens, width = q
    num_pooled = 0 if tail_k is None else tail_k[2]
    return 2 * 2 * batch * heads * width * attention_pairs(num_tokens, num_prefix_tokens, indices[3], num_pooled)


def _backward_reference(grad: Tensor, *arguments: object) -> list[Tensor]:
    with torch.enable_grad():
        return list(gradients(_reference, arguments, grad))


def _backward_fake(grad: Tensor, *arguments: object) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]


def _backward_flops(grad: torch.Size, *shapes: object, **__: object) -> int:
    """Five products of the forward's size: the weights are computed again."""
    return _flops(*shapes) * 5 // 2  # type: ignore[arg-type]


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor tile_tokens, Tensor indices, Tensor? bias, Tensor? tail_k, Tensor? tail_v, "
    "Tensor? tail_bias, Tensor? attn_bias, SymInt num_prefix_tokens, float scale, str precision"
)
_BATCHED = ("q", "k", "v", "indices", "bias", "tail_k", "tail_v", "tail_bias", "attn_bias")

ATTEND_BACKWARD = Operation(
    "attend_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> Tensor[]",
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
    batched=("grad", *_BATCHED),
    shared=("attn_bias",),
    gradient_of="attend",
)
"""Gradients of those of q, k, v, bias, tail_k, tail_v, tail_bias and attn_bias that there are, in their dtypes."""

ATTEND = Operation(
    "attend",
    f"({_ARGUMENTS}) -> Tensor",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    batched=_BATCHED,
    shared=("attn_bias",),
    differentiable=True,
    backward=ATTEND_BACKWARD,
)
