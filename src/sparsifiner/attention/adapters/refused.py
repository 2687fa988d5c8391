"""Attention classes that cannot be made sparse this way, and why."""

from __future__ import annotations

_WINDOWS = "it already attends inside small windows only, so there is nothing to select"
_CLASS_QUERY = "a single class query attends to all tokens, which costs O(N) already"
_CHANNELS = "it attends over channels, not over tokens"
_SUBSAMPLED = "its keys are already subsampled, so they are not the tokens of the patch grid"
_POOLING = "it pools with a few latent queries, which costs O(N) already"

CHEAP = frozenset({_CLASS_QUERY, _POOLING})
"""Reasons that cost nothing: such layers are listed, but leaving them dense deserves no warning."""

REFUSED: dict[str, str] = {
    "AttentionPoolLatent": _POOLING,
    "AttentionPoolPrr": _POOLING,
    "AttentionPool2d": _POOLING,
    "RotAttentionPool2d": _POOLING,
    "ClassAttention": _CLASS_QUERY,
    "ClassAttentionBlock": _CLASS_QUERY,
    "ClassAttn": _CLASS_QUERY,
    "CrossAttention": _CLASS_QUERY,
    "DiffAttention": "it subtracts two attention maps; a selection for the difference is not defined",
    "DiffParallelScalingBlock": "it subtracts two attention maps; a selection for the difference is not defined",
    "FactorAttnConvRelPosEnc": "it is linear attention without a token-by-token map",
    "Gemma4Attention": "its model pads images to a common length, and a mask hides the padding",
    "GlobalSubSampleAttn": _SUBSAMPLED,
    "LinformerAttention": "its keys are projected already, so they are not the tokens of the patch grid",
    "LocallyGroupedAttn": _WINDOWS,
    "MaskUnitAttention": _WINDOWS,
    "MergingAttention": "its tokens are merged, so they no longer form a patch grid",
    "MultiScaleAttention": _SUBSAMPLED,
    "MultiScaleAttentionPoolFirst": _SUBSAMPLED,
    "OutlookAttention": "its weights come from a projection of the query alone, without keys",
    "ParallelScalingBlock": "its attention is fused with the MLP in one block; there is no attention module to swap",
    "TalkingHeadAttn": "it mixes the attention maps of all heads, which needs them dense",
    "WindowAttention": _WINDOWS,
    "WindowAttentionGlobal": _WINDOWS,
    "WindowMultiHeadAttention": _WINDOWS,
    "XCA": _CHANNELS,
    "ChannelAttention": _CHANNELS,
    "ChannelAttentionV2": _CHANNELS,
}
