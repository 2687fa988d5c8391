"""Import the authors' checkpoints: their state dict, our model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .._utils.messages import one_line
from ..config import SparsifinerConfig
from ..convert import sparsify
from ..errors import SparsifinerError
from ..predictors import LowRankConfig
from .zeroed_tokens import ZeroedTokensVit, prune_by_zeroing

_RENAMED = {
    "mask_predictor.proj_c_q.": "predictor.q_proj.",
    "mask_predictor.proj_c_k.": "predictor.k_proj.",
    "mask_predictor.proj_n": "predictor.w_down",
    "mask_predictor.proj_back_n": "predictor.w_up",
}


def from_reference(
    state_dict: Mapping[str, Any],
    *,
    keep_rate: float | list[float] | tuple[float, ...] = 0.25,
    img_size: tuple[int, int] | None = None,
    token_keep_rate: list[float] | tuple[float, ...] | None = None,
    token_pruning_layers: list[int] | tuple[int, ...] = (),
    **settings: Any,
) -> nn.Module:
    """The model that a checkpoint of the reference implementation describes.

    All sizes are read off the state dict. What it does not hold is given here: the keep rate (per layer if
    it varies), and ``coef_topk``, ``coef_threshold``, ``basis_threshold``, ``score_threshold``,
    ``attn_recon`` or ``share_basis`` where they differ from the published configuration.

    Args:
        state_dict: the authors' state dict, or their checkpoint with it under ``"model"``.
        keep_rate: share of the tokens each query keeps.
        img_size: height and width in pixels; needed only where the patch grid is not square.
        token_keep_rate: per layer, the share of the patches that survive it, with their simulated token
            pruning (pruned tokens are zeroed, not removed); None without pruning.
        token_pruning_layers: numbers of the layers that choose the survivors.
        **settings: changes to ``SparsifinerConfig.paper``.

    Returns:
        A timm ``VisionTransformer`` with sparse attention, in evaluation mode.

    Raises:
        ValueError: if the state dict is not one of the reference implementation, or does not fit.
    """
    state = _clean(state_dict)
    first = "blocks.0.attn.mask_predictor."
    if f"{first}proj_c_q.weight" not in state:
        raise SparsifinerError(
            f"not a checkpoint of the Sparsifiner reference: {first}proj_c_q.weight is missing; "
            f"for plain timm weights use timm.create_model and sparsify"
        )
    width, head_dim = state[f"{first}proj_c_q.weight"].shape
    w_down, w_up = state[f"{first}proj_n"], state[f"{first}proj_back_n"]
    patch = state["patch_embed.proj.weight"]
    embed_dim, in_chans, patch_height, patch_width = patch.shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    side = math.isqrt(len(w_down) - 1)
    if img_size is None:
        if side * side != len(w_down) - 1:
            raise SparsifinerError(
                f"the checkpoint has {len(w_down) - 1} patches, not a square; give img_size=(height, width)"
            )
        img_size = (side * patch_height, side * patch_width)
    head = state.get("head.weight")
    dense = (VisionTransformer if token_keep_rate is None else ZeroedTokensVit)(
        img_size=img_size,
        patch_size=(patch_height, patch_width),
        in_chans=in_chans,
        num_classes=0 if head is None else len(head),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dim,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / embed_dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )
    config = SparsifinerConfig.paper(
        keep_rate=keep_rate if isinstance(keep_rate, (int, float)) else tuple(keep_rate),
        n_down=w_down.shape[1],
        reduce_c_factor=head_dim // width,
        share_basis=settings.pop("share_basis", torch.equal(w_down, w_up)),
        **settings,
    )
    assert isinstance(config.predictor, LowRankConfig)
    model = sparsify(dense, config, inplace=True)
    if token_keep_rate is not None:
        if len(token_keep_rate) != depth or config.predictor.attn_recon:
            raise SparsifinerError(
                f"token_keep_rate needs one rate for each of the {depth} layers, and attn_recon=False"
            )
        prune_by_zeroing(model, {layer: token_keep_rate[layer] for layer in token_pruning_layers})
    _load(model, state, config.predictor.share_basis)
    return model.eval()


def _clean(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwrap a training checkpoint and the prefix that data-parallel training leaves."""
    nested = state_dict.get("model")
    state = nested if isinstance(nested, Mapping) else state_dict
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _load(model: nn.Module, state: dict[str, Tensor], share_basis: bool) -> None:
    renamed = {}
    for name, tensor in state.items():
        if share_basis and name.endswith("mask_predictor.proj_back_n"):
            continue
        for theirs, ours in _RENAMED.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise SparsifinerError(f"the checkpoint does not fit the model it describes: {one_line(error)}") from error
