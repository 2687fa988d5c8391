"""Attention of one layer as a plain function: predict the connectivity, pool the tail, attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SparsifinerConfig, TailConfig
from ..ops import cpu, sparse_attention
from ..ops.connectivity import Connectivity
from ..ops.inputs import AttentionInputs
from ..ops.tail import KeyGroups, group_keys
from ..predictors import Predictor
from .policy import Policy


@dataclass(frozen=True)
class LayerRecord:
    """Connectivity and tensors of one layer in the latest forward pass.

    Args:
        connectivity: the kept keys; None where the layer ran dense (see ``SparsifinerConfig.mode``).
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


def attend(
    inputs: AttentionInputs,
    predictor: Predictor,
    config: SparsifinerConfig,
    *,
    policy: Policy | None = None,
    training: bool = False,
    observe: Callable[[LayerRecord], None] | None = None,
) -> Tensor:
    """Sparse attention of ``inputs``, or dense where the policy says so; ``[B, H, N, D]``.

    Args:
        inputs: queries, keys, values and tiles.
        predictor: chooses the keys of each tile.
        config: settings of the layer, with one keep rate.
        policy: dense or sparse; the one ``config`` asks for if None.
        training: the layer is in training mode.
        observe: called with what the layer does, tensors included, before it attends.
    """
    policy = Policy.of(config) if policy is None else policy
    model_dtype, inputs = inputs.q.dtype, inputs.to(precision_of(config, inputs))
    if policy.runs_dense(inputs, config, predictor, training=training):
        _notify(observe, inputs, None)
        return dense_attention(inputs).to(model_dtype)
    groups = tail_groups(config.tail, inputs)
    connectivity = predictor(inputs, groups)
    _notify(observe, inputs, connectivity)
    tail, attn_bias = None, inputs.attn_bias
    if groups is not None:
        tail = groups.tail(connectivity, predictor.tail_offset, inputs.backend)
        if attn_bias is not None:
            patches = attn_bias[..., inputs.tiling.num_prefix_tokens :, None]
            attn_bias = torch.cat([attn_bias, groups.blocks.mean_patches(patches)[..., 0]], dim=-1)
    out = sparse_attention(
        inputs.q, inputs.k, inputs.v, connectivity,
        tail=tail, attn_bias=attn_bias, scale=inputs.scale, precision=products_of(config, inputs),
        backend=inputs.backend,
    )  # fmt: skip
    return out.to(model_dtype)


def precision_of(config: SparsifinerConfig, inputs: AttentionInputs) -> torch.dtype:
    """The dtype that ``config.attention_dtype`` means for ``inputs`` where they are.

    With an attention bias ``auto`` is the model's own: the kernels take none, and plain PyTorch gains nothing.
    """
    own = inputs.q.dtype
    if config.attention_dtype == "model":
        return own
    if config.attention_dtype == "auto":
        return torch.bfloat16 if "bfloat16" in _gains(inputs) else own
    return torch.bfloat16 if config.attention_dtype == "bfloat16" else torch.float32


def products_of(config: SparsifinerConfig, inputs: AttentionInputs) -> str:
    """What the operator may round ``inputs`` to, already in the dtype of :func:`precision_of`."""
    if config.attention_dtype == "auto":
        return "int8" if "int8" in _gains(inputs) else "same"
    return "int8" if config.attention_dtype == "int8" else "same"


def _gains(inputs: AttentionInputs) -> tuple[str, ...]:
    """What the kernels would gain by rounding ``inputs`` to."""
    served = inputs.q.dtype == torch.float32 and inputs.q.device.type == "cpu" and inputs.attn_bias is None
    return cpu.precisions() if served else ()


def dense_attention(inputs: AttentionInputs) -> Tensor:
    """PyTorch's own dense attention of the same inputs, ``[B, H, N, D]``."""
    return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=inputs.attn_bias, scale=inputs.scale)


def tail_groups(tail: TailConfig | None, inputs: AttentionInputs) -> KeyGroups | None:
    """The groups of keys that the tail pools, or None without one.

    With an attention bias they are the blocks: groups of each image and head would need a bias of their own.
    """
    if tail is None:
        return None
    steps = tail.refine if inputs.attn_bias is None else 0
    return group_keys(inputs.k, inputs.v, inputs.tiling.regions(tail.block), steps, inputs.backend)


def _notify(
    observe: Callable[[LayerRecord], None] | None, inputs: AttentionInputs, connectivity: Connectivity | None
) -> None:
    if observe is not None:
        observe(LayerRecord(connectivity, inputs.q, inputs.k, inputs.v, inputs.attn_bias))
