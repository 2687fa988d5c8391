"""Hugging Face transformers: vision towers whose attention calls the function that ``AttentionInterface`` names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from ...config import SparsifinerConfig
from ...errors import SparsifinerError
from ...geometry.conv_grid import GridSource, find_conv_owner, patch_convolutions
from ...geometry.patch_grid import PatchGrid
from ...geometry.told_grid import ToldGrid, find_told_grid
from ..layer import SparseAttention
from ..markers import NAME, settings_of
from ..module_state import weight_like
from .refused import REFUSED, Refusal

_DENSE_BEFORE = "_dense_attn_implementation"
_CONVERTED = "_sparsifiner_converted"


@dataclass(frozen=True)
class Family:
    """Attention classes of one ``model_type``.

    Args:
        attention: name of the class that calls the interface.
        num_prefix_tokens: tokens before the patches, from the tower's configuration.
        num_suffix_tokens: tokens after the patches.
    """

    attention: str
    num_prefix_tokens: Callable[[Any], int] = lambda config: 0
    num_suffix_tokens: Callable[[Any], int] = lambda config: 0


def _class_token(config: Any) -> int:
    return 1


def _with_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


FAMILIES: dict[str, Family] = {
    "beit": Family("BeitAttention", _class_token),
    "clip_vision_model": Family("CLIPAttention", _class_token),
    "deit": Family("DeiTAttention", lambda config: 2),
    "dinov2": Family("Dinov2Attention", _class_token),
    "dinov2_with_registers": Family("Dinov2WithRegistersAttention", _with_registers),
    "dinov3_vit": Family("DINOv3ViTAttention", _with_registers),
    "dpt": Family("DPTSelfAttention", _class_token),
    "ijepa": Family("IJepaAttention"),
    "sam3_vit_model": Family("Sam3ViTRoPEAttention"),
    "qwen2_vl": Family("VisionAttention"),
    "qwen2_vl_vision": Family("VisionAttention"),
    "siglip2_vision_model": Family("Siglip2Attention"),
    "siglip_vision_model": Family("SiglipAttention"),
    "videomae": Family("VideoMAESelfAttention"),
    "vit": Family("ViTAttention", _class_token),
    "vit_msn": Family("ViTMSNAttention", _class_token),
    "vitpose_backbone": Family("VitPoseBackboneSelfAttention"),
    "vjepa2": Family("VJEPA2RopeAttention"),
    "yolos": Family("YolosSelfAttention", _class_token, lambda config: config.num_detection_tokens),
}
"""By ``model_type`` of the configuration that the attention module holds."""

_TOLD = ("qwen2_vl", "qwen2_vl_vision", "siglip2_vision_model")
"""Those whose patches come cut, with the grid of each image as an argument."""

_TEXT = Refusal("its tokens are text, which has no patch grid", costly=False)
_PACKED = Refusal("its model reorders patches into windows, so they form no patch grid in the sequence")
_REFUSED = {
    "qwen2_5_vl_vision": _PACKED,
    "qwen2_5_vl": _PACKED,
    "vit_mae": Refusal("its model drops patches at random, which leaves no patch grid"),
}


class InterfaceAttention(SparseAttention):
    """Sparse attention inside an attention module of transformers, which keeps its class, weights and ``forward``.

    Args:
        dense: the attention module. It is not changed.
        config: settings of this layer (one ``keep_rate``).
        grid: the patch grid of the tower.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Module
    takes_bias: ClassVar[bool] = True
    child: ClassVar[str | None] = NAME
    tells_grid: ClassVar[str] = "one convolution that makes the patches"

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        rate = next((getattr(dense, name) for name in ("attention_dropout", "dropout_prob", "dropout")
                     if isinstance(getattr(dense, name, None), float)), 0.0)  # fmt: skip
        if rate > 0:
            return (
                f"it drops attention weights ({rate}), which a sparse layer cannot; set the dropout in its config to 0"
            )
        if getattr(dense, "is_causal", False):
            return "it is causal"
        return None

    @classmethod
    def find_owner(cls, model: nn.Module, name: str) -> str | Refusal | None:
        if any(part in name for part in ("decoder", "predictor")):
            return Refusal("its tokens are those of a decoder or predictor, which form no patch grid")
        block = model.get_submodule(name.rpartition(".")[0])
        if isinstance(getattr(block, "window_size", None), int) and block.window_size > 0:  # type: ignore[operator]
            return REFUSED["WindowAttention"]
        return find_conv_owner(model, name)

    @classmethod
    def follow_grid(cls, owner: Any, dense: nn.Module) -> PatchGrid:
        (path,) = patch_convolutions(owner)
        config: Any = dense.config
        family = FAMILIES[config.model_type]
        tokens = family.num_prefix_tokens(config), family.num_suffix_tokens(config)
        return GridSource(path).follow(owner, *tokens, built_by=config)

    def __init__(self, dense: nn.Module, config: SparsifinerConfig, grid: PatchGrid) -> None:
        nn.Module.__init__(self)
        source: Any = dense
        self.num_heads = int(getattr(source, "num_attention_heads", None) or source.num_heads)
        self.head_dim = int(getattr(source, "head_dim", None) or source.attention_head_size)
        self.scale = float(source.scaling if hasattr(source, "scaling") else source.scale)
        self._like = torch.empty(0, dtype=weight_like(dense).dtype, device=weight_like(dense).device)
        self.grid = grid
        self.config = config
        self.override = None
        self.observer = None
        self.reset_predictor(grid.shape)
        self.train(dense.training)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> Tensor:
        """Attention of ``[B, H, N, D]`` in the order of the model's sequence."""
        return self.attend(q, k, v, attn_bias)


def converted(model: nn.Module) -> None:
    """Let every tower with sparse layers call :func:`sparse_attention_forward`, and say so in its configuration."""
    copies: dict[int, Any] = {}
    towers: dict[int, Any] = {id(m.config): m.config for m in model.modules() if NAME in m._modules}
    if any(config._attn_implementation != NAME for config in towers.values()):
        # Another model may have been made from the same configuration.
        for module in model.modules():
            own = vars(module).get("config")
            if isinstance(own, PretrainedConfig):
                vars(module)["config"] = copy.deepcopy(own, copies)
    for module in model.modules():
        own = vars(module).get("config")
        if isinstance(own, PretrainedConfig):
            vars(module)[_CONVERTED] = True
            if NAME in module._modules and own._attn_implementation != NAME:
                vars(module)[_DENSE_BEFORE] = own._attn_implementation
    for module in model.modules():
        if NAME in module._modules:
            module.config._attn_implementation_internal = NAME  # type: ignore[union-attr]
    _write_settings(model)


def restored(model: nn.Module) -> None:
    """The inverse of :func:`converted`."""
    for module in model.modules():
        own = vars(module).get("config")
        vars(module).pop(_CONVERTED, None)
        if isinstance(own, PretrainedConfig):
            for name in (NAME, "attn_implementation"):
                vars(own).pop(name, None)
            before = vars(module).pop(_DENSE_BEFORE, None)
            if own._attn_implementation == NAME:
                own._attn_implementation_internal = before or "sdpa"


class PackedInterfaceAttention(InterfaceAttention):
    """The same where images of several sizes are packed into a batch, padded to one length (SigLIP 2), or into one
    sequence, each frame attending to itself (Qwen2-VL). Rows of padding are zeros."""

    tells_grid: ClassVar[str] = "spatial_shapes or grid_thw"
    takes_bias: ClassVar[bool] = False
    grid: ToldGrid

    @classmethod
    def find_owner(cls, model: nn.Module, name: str) -> str | Refusal | None:
        while name:
            name = name.rpartition(".")[0]
            module: Any = model.get_submodule(name)
            if type(getattr(module, "embeddings", None)).__name__ == "Siglip2VisionEmbeddings":
                return name
            if hasattr(module, "spatial_merge_size") and hasattr(module, "blocks"):
                if module.spatial_merge_size != 2:
                    return Refusal(f"its patches come in blocks of {module.spatial_merge_size}, not of 2x2")
                return name
        return None

    @classmethod
    def follow_grid(cls, owner: Any, dense: nn.Module) -> PatchGrid:
        by_batch = hasattr(owner, "embeddings")
        told = "embeddings" if by_batch else ""
        side = int(dense.config.patch_size)  # type: ignore[union-attr,arg-type]
        known = find_told_grid(owner.get_submodule(told))
        if known is not None:
            return known
        if by_batch:
            return ToldGrid((16, 16), (side, side), "spatial_shapes", 1, told, "raster")
        return ToldGrid((16, 16), (side, side), "grid_thw", 1, told, "merge2x2")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> Tensor:
        if self.grid.order == "merge2x2":
            self.grid.shape = self.grid.of_length(q.shape[2])
            return self.attend(q, k, v)
        shapes = self.grid.shapes
        if len(shapes) != len(q):
            raise SparsifinerError(f"attention got {len(q)} images, but spatial_shapes names {len(shapes)}")
        if len(set(shapes)) == 1 and shapes[0][0] * shapes[0][1] == q.shape[2]:
            self.grid.shape = shapes[0]
            return self.attend(q, k, v)
        outputs = []
        for number, shape in enumerate(shapes):
            self.grid.shape = shape
            image, patches = slice(number, number + 1), slice(0, shape[0] * shape[1])
            out = self.attend(*(x[image, :, patches] for x in (q, k, v)))
            outputs.append(F.pad(out, (0, 0, 0, q.shape[2] - out.shape[2])))
        return torch.cat(outputs)


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with ``AttentionInterface`` as ``sparsifiner``.

    Modules that were left dense (text towers) run PyTorch's dense attention.

    Args:
        module: the attention module.
        query: ``[B, H, N, D]``.
        key: ``[B, H or fewer, N, D]``.
        value: like ``key``.
        attention_mask: added to the logits, or True where a query may attend to a key; broadcasts to ``[B, H, N, N]``.
        scaling: factor on the logits.
        dropout: of attention weights, which a sparse layer cannot do.

    Returns:
        ``[B, N, H, D]``, and None in place of attention weights.

    Raises:
        SparsifinerError: if ``module`` belongs to no converted model.
    """
    sparse = module._modules.get(NAME)
    if sparse is None:
        if _CONVERTED not in vars(module):
            raise SparsifinerError(
                f"{type(module).__name__} was asked for sparse attention, but its model was not converted; call "
                f"sparsifiner.sparsify(model)"
            )
        dense = AttentionInterface()["sdpa"]
        return dense(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    assert isinstance(sparse, InterfaceAttention)
    if scaling is not None and abs(scaling - sparse.scale) > 1e-6 * abs(sparse.scale):
        raise SparsifinerError(f"{type(module).__name__} changed its scaling from {sparse.scale} to {scaling}")
    if kwargs.get("position_bias") is not None:
        bias = kwargs["position_bias"]
        attention_mask = bias if attention_mask is None else _additive(attention_mask, query) + bias
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = sparse(query, key, value, _additive(attention_mask, query))
    return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.to(query.dtype).expand(*mask.shape[:2], query.shape[2], query.shape[2])


def find_interface_adapter(module: nn.Module) -> type[InterfaceAttention] | Refusal | None:
    """The adapter for an attention module of transformers, the reason why there is none, or None for other modules."""
    name = type(module).__name__
    config = getattr(module, "config", None)
    kind = getattr(config, "model_type", "")
    if not name.endswith("Attention") or NAME in module._modules:
        return None
    if any(find_interface_adapter(child) is not None for child in module.children()):
        return None  # only a wrapper around the attention
    family = FAMILIES.get(kind)
    if family is not None and family.attention == name:
        adapter = PackedInterfaceAttention if kind in _TOLD else InterfaceAttention
        reason = adapter.refusal(module)
        return adapter if reason is None else Refusal(reason)
    if "text" in kind:
        return _TEXT
    return (
        _REFUSED.get(kind)
        or REFUSED.get(name)
        or Refusal(f"there is no adapter for {name} of {kind or 'this configuration'}")
    )


def _write_settings(model: nn.Module) -> None:
    """Write the settings into the configuration of the outermost models, so that ``save_pretrained`` of transformers
    keeps them: ``from_pretrained`` makes the model sparse again, and fails where sparsifiner is not imported."""
    inner: set[int] = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or id(module) in inner:
            continue
        inner.update(id(part) for part in module.modules())
        settings = settings_of(module)
        if settings is not None:
            vars(module.config)[NAME] = settings.to_dict()
            vars(module.config)["attn_implementation"] = NAME
