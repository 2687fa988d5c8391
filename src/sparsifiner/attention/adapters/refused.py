"""Attention classes that cannot be made sparse this way, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """The reason why a module stays dense.

    Args:
        reason: in words, for the user.
        costly: dense attention over all tokens goes on, which deserves a warning; what costs O(N) is only listed.
        lacks_grid: only the patch grid was not found, which the caller of ``sparsify`` may know.
    """

    reason: str
    costly: bool = True
    lacks_grid: bool = False


_WINDOWS = Refusal("it already attends inside small windows only, so there is nothing to select")
_CLASS_QUERY = Refusal("a single class query attends to all tokens, which costs O(N) already", costly=False)
_CHANNELS = Refusal("it attends over channels, not over tokens")
_SUBSAMPLED = Refusal("its keys are already subsampled, so they are not the tokens of the patch grid")
_POOLING = Refusal("it pools with a few latent queries, which costs O(N) already", costly=False)
_DIFFERENCE = Refusal("it subtracts two attention maps; a selection for the difference is not defined")

REFUSED: dict[str, Refusal] = {
    "AttentionPoolLatent": _POOLING,
    "AttentionPoolPrr": _POOLING,
    "AttentionPool2d": _POOLING,
    "RotAttentionPool2d": _POOLING,
    "ClassAttention": _CLASS_QUERY,
    "ClassAttentionBlock": _CLASS_QUERY,
    "ClassAttn": _CLASS_QUERY,
    "CrossAttention": _CLASS_QUERY,
    "DiffAttention": _DIFFERENCE,
    "DiffParallelScalingBlock": _DIFFERENCE,
    "FactorAttnConvRelPosEnc": Refusal("it is linear attention without a token-by-token map"),
    "Gemma4Attention": Refusal("its model pads images to a common length, and a mask hides the padding"),
    "GlobalSubSampleAttn": _SUBSAMPLED,
    "HieraMaskUnitAttention": Refusal(
        "its tokens stand in the order of its mask units, and its early blocks attend inside them only"
    ),
    "LinformerAttention": Refusal("its keys are projected already, so they are not the tokens of the patch grid"),
    "LocallyGroupedAttn": _WINDOWS,
    "MaskUnitAttention": _WINDOWS,
    "MergingAttention": Refusal("its tokens are merged, so they no longer form a patch grid"),
    "MultiScaleAttention": _SUBSAMPLED,
    "MultiScaleAttentionPoolFirst": _SUBSAMPLED,
    "OutlookAttention": Refusal("its weights come from a projection of the query alone, without keys"),
    "ParallelScalingBlock": Refusal(
        "its attention is fused with the MLP in one block; there is no attention module to swap"
    ),
    "TalkingHeadAttn": Refusal("it mixes the attention maps of all heads, which needs them dense"),
    "WindowAttention": _WINDOWS,
    "WindowAttentionGlobal": _WINDOWS,
    "WindowMultiHeadAttention": _WINDOWS,
    "XCA": _CHANNELS,
    "ChannelAttention": _CHANNELS,
    "ChannelAttentionV2": _CHANNELS,
}
