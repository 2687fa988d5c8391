"""Sparse attention of plain queries, keys and values: for any model that has a patch grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._utils.checks import choose, number
from .attention.attend import LayerRecord, attend
from .attention.decomposed import fold_bias
from .attention.policy import Policy
from .config import SparsifinerConfig
from .errors import SparsifinerError
from .geometry.frames import Order, TokenLayout
from .ops.attend import DTYPES
from .ops.connectivity import Connectivity
from .ops.inputs import AttentionInputs
from .predictors import LayerShape, Predictor
from .predictors.registry import predictor_class

Grid = tuple[int, int] | tuple[int, int, int]
_DEFAULT = SparsifinerConfig()


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    num_prefix_tokens: int = ...,
    prefix_per_frame: int = ...,
    num_suffix_tokens: int = ...,
    order: Order = ...,
    tile_frames: int = ...,
    keep_rate: float | None = ...,
    config: SparsifinerConfig | None = ...,
    predictor: Predictor | None = ...,
    attn_bias: Tensor | tuple[Tensor, Tensor] | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    backend: str | None = ...,
    return_connectivity: Literal[False] = ...,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    num_prefix_tokens: int = ...,
    prefix_per_frame: int = ...,
    num_suffix_tokens: int = ...,
    order: Order = ...,
    tile_frames: int = ...,
    keep_rate: float | None = ...,
    config: SparsifinerConfig | None = ...,
    predictor: Predictor | None = ...,
    attn_bias: Tensor | tuple[Tensor, Tensor] | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    backend: str | None = ...,
    return_connectivity: Literal[True],
) -> tuple[Tensor, Connectivity | None]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    num_prefix_tokens: int = 0,
    prefix_per_frame: int = 0,
    num_suffix_tokens: int = 0,
    order: Order = "raster",
    tile_frames: int = 1,
    keep_rate: float | None = None,
    config: SparsifinerConfig | None = None,
    predictor: Predictor | None = None,
    attn_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
    return_connectivity: bool = False,
) -> Tensor | tuple[Tensor, Connectivity | None]:
    """Sparse, instance-dependent ``torch.nn.functional.scaled_dot_product_attention`` of image tokens.

    A pure function, differentiable in query, key, value and bias; no gradient flows through the choice of keys. Where
    sparse attention is expected to be slower, for the given shapes, dtype and settings, it is dense, with the same
    result as PyTorch's (``SparsifinerConfig(mode="sparse")`` is always sparse).

    The patches of a sequence lie frame by frame, row by row. Sequences laid out otherwise (``prefix_per_frame``,
    ``num_suffix_tokens``, ``order``) are sorted where attention is sparse, which copies query, key, value and result.

    Args:
        query: ``[B, H, N, D]`` as attention uses them, after norms and rotary embedding.
        key: ``[B, H, N, D]``; with ``enable_gqa`` of fewer heads, each for several of the query's.
        value: like ``key``.
        grid: rows and columns of the patch grid, or frames, rows and columns.
        num_prefix_tokens: tokens before all patches (class, registers). Their rows are dense and every tile keeps them.
        prefix_per_frame: such tokens before the patches of each frame, in models of several views.
        num_suffix_tokens: such tokens after all patches.
        order: of the patches of a frame, ``raster``, or ``merge2x2`` where the four patches of each 2x2 block are
            neighbours in the sequence (the Qwen-VL towers).
        tile_frames: frames that a query tile spans. Blocks of the tail, and with 1 tiles, cross no frame.
        keep_rate: share of the keys each query tile keeps; overrides the one in ``config``.
        config: all settings; the training-free default if None.
        predictor: chooses the keys, with weights of its own; the one that ``config`` names if None.
        attn_bias: mask that is True where a query may attend to a key, or numbers added to the logits, of a shape that
            broadcasts to ``[B, H, N, N]``. Padded keys are a mask ``[B, 1, 1, N]``. Two tensors are a bias decomposed
            as in SAM, towards the keys of each row ``[B, H, N, rows]`` and of each column ``[B, H, N, columns]`` of one
            frame; they become further columns of query and key, and no ``[N, N]`` is made.
        scale: factor on the logits; ``D ** -0.5`` if None.
        enable_gqa: the heads of key and value may be fewer than those of the query.
        backend: which kernels compute (see :func:`sparsifiner.sparse_attention`); the one in ``config`` if None.
        return_connectivity: return the kept keys as well. Their token numbers count the tokens that are no patches
            first, then the patches frame by frame, row by row.

    Returns:
        ``[B, H, N, D]``; with ``return_connectivity`` also the connectivity, None where attention was dense.

    Raises:
        SparsifinerError: if the grid, a shape, a dtype or a setting does not fit; the message says what was expected.
    """
    config = _DEFAULT if config is None else config
    if not isinstance(config, SparsifinerConfig):
        raise SparsifinerError(f"config must be a SparsifinerConfig, got {type(config).__name__}")
    changes = {"keep_rate": keep_rate, "backend": backend}
    changes = {name: given for name, given in changes.items() if given is not None}
    config = config.replace(**changes) if changes else config
    if not isinstance(config.keep_rate, float):
        raise SparsifinerError("this is the attention of one layer: give one keep_rate, not one per layer")
    layout = _layout(grid, num_prefix_tokens, prefix_per_frame, num_suffix_tokens, order)
    _check(query, key, value, layout, enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width = query.shape[-1]
    if isinstance(attn_bias, tuple):
        query, key, value = _fold(attn_bias, query, key, value, layout, scale)
        attn_bias = None
    bias = _additive(attn_bias, query)
    if predictor is None:
        predictor = _weightless(config, query, layout)
    policy = Policy.of(config)
    tile = policy.query_tile(layout.grid[1:], config, training=False)
    tiling = layout.tiling(tile, min(tile_frames, layout.grid[0]))
    inputs = AttentionInputs(query, key, value, tiling, scale, bias, config.backend)
    if policy.runs_dense(inputs, config, predictor, training=False):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=enable_gqa)
        out = out[..., :width]
        return (out, None) if return_connectivity else out
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if bias is not None:
        bias = bias.expand(*bias.shape[:2], layout.num_tokens, layout.num_tokens)
        bias = layout.sort(layout.sort(bias, 2), 3)
    query, key, value = (layout.sort(x, 2) for x in (query, key, value))
    seen: list[LayerRecord] = []
    out = attend(
        AttentionInputs(query, key, value, tiling, scale, bias, config.backend),
        predictor, config, policy=Policy("sparse"), observe=seen.append if return_connectivity else None,
    )  # fmt: skip
    out = layout.unsort(out, 2)[..., :width]
    return (out, seen[0].connectivity) if return_connectivity else out


def _layout(
    grid: Sequence[int], num_prefix_tokens: int, prefix_per_frame: int, num_suffix_tokens: int, order: Order
) -> TokenLayout:
    try:
        sizes = tuple(int(size) for size in grid)
    except TypeError:
        sizes = ()
    if len(sizes) not in (2, 3) or any(size < 1 for size in sizes):
        raise SparsifinerError(
            f"grid must be the rows and columns of the patch grid, or frames, rows and columns, such as (37, 37); "
            f"got {grid!r}"
        )
    for name, count in (
        ("num_prefix_tokens", num_prefix_tokens),
        ("prefix_per_frame", prefix_per_frame),
        ("num_suffix_tokens", num_suffix_tokens),
    ):
        number(name, count, least=0, integer=True)
    choose("order", order, get_args(Order))
    frames, rows, columns = sizes if len(sizes) == 3 else (1, *sizes)
    return TokenLayout((frames, rows, columns), num_prefix_tokens, prefix_per_frame, num_suffix_tokens, order)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, enable_gqa: bool) -> None:
    if query.ndim != 4:
        raise SparsifinerError(f"query must have shape [B, H, N, D], got {list(query.shape)}")
    if query.dtype not in DTYPES:
        raise SparsifinerError(f"query must be float64, float32, bfloat16 or float16, got {query.dtype}")
    batch, heads, num_tokens, width = query.shape
    if num_tokens != layout.num_tokens:
        sizes = "x".join(str(size) for size in (layout.grid if layout.grid[0] > 1 else layout.grid[1:]))
        raise SparsifinerError(
            f"query has {num_tokens} tokens, but a {sizes} grid and {layout.num_front_tokens} other tokens are "
            f"{layout.num_tokens}; give the grid of this input and its num_prefix_tokens (class and register tokens)"
        )
    for name, tensor in (("key", key), ("value", value)):
        fits = tensor.ndim == 4 and (tensor.shape[0], *tensor.shape[2:]) == (batch, num_tokens, width)
        if not fits:
            raise SparsifinerError(
                f"{name} must have shape [{batch}, H, {num_tokens}, {width}] like query, got {list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise SparsifinerError(
                f"{name} must be {query.dtype} on {query.device} like query, got {tensor.dtype} on {tensor.device}"
            )
    if key.shape[1] != value.shape[1]:
        raise SparsifinerError(f"key has {key.shape[1]} heads and value {value.shape[1]}; they must have equally many")
    if key.shape[1] != heads and not enable_gqa:
        raise SparsifinerError(
            f"query has {heads} heads and key {key.shape[1]}; enable_gqa=True shares a key head among several"
        )
    if heads % key.shape[1]:
        raise SparsifinerError(f"query has {heads} heads, which must be a multiple of the {key.shape[1]} of key")


def _fold(
    biases: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value whose attention without a bias is that with the decomposed one."""
    frames, rows, columns = layout.grid
    if frames > 1 or not layout.is_sorted:
        raise SparsifinerError("a decomposed attn_bias is for the patches of one frame, row by row, without a suffix")
    for what, size, bias in zip(("rows", "columns"), (rows, columns), biases, strict=True):
        want = [*query.shape[:3], size]
        if list(bias.shape) != want or bias.device != query.device or not bias.is_floating_point():
            raise SparsifinerError(
                f"a decomposed attn_bias is two floating-point tensors on {query.device}; that of {what} must have "
                f"shape {want}, got {list(bias.shape)}, {bias.dtype} on {bias.device}"
            )
    return fold_bias(query, key, value, *biases, scale, layout.num_front_tokens)


def _additive(attn_bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The bias in the dtype of the query, four-dimensional, ``-inf`` where a mask is False."""
    if attn_bias is None:
        return None
    full = (*query.shape[:2], query.shape[2], query.shape[2])
    shape = (1,) * (4 - attn_bias.ndim) + tuple(attn_bias.shape)
    if attn_bias.ndim > 4 or any(size not in (1, want) for size, want in zip(shape, full, strict=True)):
        raise SparsifinerError(
            f"attn_bias must have a shape that broadcasts to {list(full)}, got {list(attn_bias.shape)}"
        )
    if attn_bias.device != query.device:
        raise SparsifinerError(f"attn_bias is on {attn_bias.device} but query is on {query.device}")
    attn_bias = attn_bias.reshape(shape)
    if attn_bias.dtype == torch.bool:
        return torch.zeros_like(attn_bias, dtype=query.dtype).masked_fill(~attn_bias, -math.inf)
    if not attn_bias.is_floating_point():
        raise SparsifinerError(
            f"attn_bias must be a boolean mask or numbers added to the logits, got {attn_bias.dtype}"
        )
    return attn_bias.to(query.dtype)


def _weightless(config: SparsifinerConfig, query: Tensor, layout: TokenLayout) -> Predictor:
    """The predictor that ``config`` names, which must be one without weights: a fresh one's say nothing."""
    if config.predictor.learned or (config.tail is not None and config.tail.offset):
        what = f"predictor {config.predictor.name!r}" if config.predictor.learned else "an offset of the tail"
        raise SparsifinerError(
            f"{what} has weights, which a function does not keep; make one with "
            f"sparsifiner.predictors.build_predictor, train it, and pass predictor=..."
        )
    if config.predictor.name == "local" and layout.grid[0] > 1:
        raise SparsifinerError("the local window is defined in one frame only; use another predictor")
    assert isinstance(config.keep_rate, float)
    layer = LayerShape(query.shape[1], query.shape[3], layout.grid[1:], layout.num_front_tokens)
    build = predictor_class(config.predictor.name)
    return build(config.predictor, layer, keep_rate=config.keep_rate, keep_prefix=config.keep_prefix)
