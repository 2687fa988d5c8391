"""LV-ViT-S and -M (Jiang et al., "All Tokens Matter", NeurIPS 2021), which timm lacks, registered with timm.

State dicts of the authors load by their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..errors import SparsifinerError


class TokenLabelOutput(NamedTuple):
    """Output of :class:`LvVit` while it trains with token labels.

    Args:
        logits: of the class token, ``[B, classes]``.
        token_logits: of every patch, ``[B, patches, classes]``; each belongs to the image its patch came from.
        box: top, left, bottom, right of the patches that were exchanged with the reversed batch (MixToken).
        exchanged: share of the patches in that box.
    """

    logits: Tensor
    token_logits: Tensor
    box: tuple[int, int, int, int]
    exchanged: float


class ConvStem(PatchEmbed):
    """Patch embedding of three convolutions at half resolution, then a projection of patches of half the size."""

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        **settings: Any,
    ) -> None:
        super().__init__(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **settings)
        width = 64
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, height, width]`` to ``[B, patches, C]``, or ``[B, rows, columns, C]`` for dynamic sizes.

        Raises:
            ValueError: if the image has another size than the model, or one that patches do not divide.
        """
        size = (x.shape[2], x.shape[3])
        if self.strict_img_size and size != self.img_size:
            raise SparsifinerError(
                f"the image has {size[0]}x{size[1]} pixels, the model {self.img_size[0]}x{self.img_size[1]}; resize "
                f"one of them, or build the model with dynamic_img_size=True"
            )
        if size[0] % self.patch_size[0] or size[1] % self.patch_size[1]:
            raise SparsifinerError(f"the image's {size[0]}x{size[1]} pixels must be multiples of {self.patch_size[0]}")
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)


class ResidualScale(nn.Module):
    """Divides what a branch adds to the residual stream by a constant, in the place of LayerScale."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor}"


class LvVit(VisionTransformer):
    """timm's ViT with a convolutional stem, halved residual branches and a second head on the patches.

    Logits are the class token's plus half the largest of the patches' per class, as the authors evaluate. After
    ``set_token_labels(True)`` a model in training mode returns a :class:`TokenLabelOutput` instead.

    Args:
        skip_lam: divisor of both residual branches (the authors' name).
        mix_token: whether training with token labels exchanges a box of patches between the images of a batch.
        **settings: as for timm's ``VisionTransformer``.
    """

    def __init__(self, *, skip_lam: float = 2.0, mix_token: bool = True, **settings: Any) -> None:
        super().__init__(embed_layer=ConvStem, norm_layer=partial(nn.LayerNorm, eps=1e-5), qkv_bias=False, **settings)
        blocks: Any = self.blocks
        for block in blocks:
            block.ls1, block.ls2 = ResidualScale(skip_lam), ResidualScale(skip_lam)
        self.aux_head = self._new_aux_head()
        self.mix_token = mix_token
        self.token_labels = False

    def _new_aux_head(self) -> nn.Module:
        head = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return head.to(self.pos_embed)

    def set_token_labels(self, enable: bool = True) -> None:
        """Train with labels of every patch: ``forward`` in training mode returns a :class:`TokenLabelOutput`."""
        self.token_labels = enable

    def get_classifier(self) -> Any:
        """Both heads: that of the class token and that of the patches."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for class token and patches."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_aux_head()

    def forward_class_token(self, x: Tensor) -> Tensor:
        """Final tokens ``[B, N, C]`` to the logits of the class token alone ``[B, classes]``, for training."""
        return super().forward_head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Final tokens ``[B, N, C]`` to logits ``[B, classes]``; the class feature with ``pre_logits`` or no head."""
        logits = super().forward_head(x, pre_logits=pre_logits)
        if pre_logits or self.num_classes == 0:
            return logits
        return logits + 0.5 * self.aux_head(x[:, self.num_prefix_tokens :]).amax(1)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Images ``[B, 3, height, width]`` to logits ``[B, classes]``, or a :class:`TokenLabelOutput`."""
        if not (self.token_labels and self.training):
            return super().forward(x, attn_mask, is_causal)
        if not self.mix_token:
            return self._token_label_output(self.forward_features(x, attn_mask, is_causal), (0, 0, 0, 0), (1, 1))
        # The box is exchanged between embedding and blocks, so that no convolution sees both images.
        box, grid = (0, 0, 0, 0), (1, 1)

        def exchange(embed: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nonlocal box, grid
            grid = self.patch_embed.dynamic_feat_size(tuple(inputs[0].shape[-2:]))
            box = random_box(grid)
            return _exchange(output, box, grid)

        handle = self.patch_embed.register_forward_hook(exchange)
        try:
            tokens = self.forward_features(x, attn_mask, is_causal)
        finally:
            handle.remove()
        return self._token_label_output(tokens, box, grid)

    def _token_label_output(
        self, tokens: Tensor, box: tuple[int, int, int, int], grid: tuple[int, int]
    ) -> TokenLabelOutput:
        patches = tokens[:, self.num_prefix_tokens :]
        exchanged = (box[2] - box[0]) * (box[3] - box[1]) / (grid[0] * grid[1])
        if exchanged:
            if patches.shape[1] != grid[0] * grid[1]:
                raise SparsifinerError("MixToken needs every patch to its end; set mix_token=False on a pruned model")
            patches = _exchange(patches, box, grid)
        return TokenLabelOutput(self.forward_class_token(tokens), self.aux_head(patches), box, exchanged)


def random_box(grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a CutMix box over patches; its share is Beta(1, 1), that is uniform.

    Drawn from torch's global generator, so that a seed fixes it.
    """
    side = (1 - torch.rand(()).item()) ** 0.5
    centre = torch.rand(2)
    edges = []
    for length, at in zip(grid, centre.tolist(), strict=True):
        half, middle = int(length * side) // 2, int(at * length)
        edges.append((max(0, middle - half), min(length, middle + half)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _exchange(x: Tensor, box: tuple[int, int, int, int], grid: tuple[int, int]) -> Tensor:
    """Patches ``[B, rows * columns, C]`` or ``[B, rows, columns, C]`` with the box taken from the reversed batch."""
    image = x.unflatten(1, grid).clone() if x.ndim == 3 else x.clone()
    part = (slice(None), slice(box[0], box[2]), slice(box[1], box[3]))
    image[part] = image.flip(0)[part]
    return image.flatten(1, 2) if x.ndim == 3 else image


def token_label_loss(
    output: TokenLabelOutput, targets: Tensor, token_targets: Tensor, *, token_weight: float = 0.5
) -> Tensor:
    """Cross-entropy of the class token plus ``token_weight`` times that of the patches (Jiang et al., equation 4).

    Args:
        output: what the model returned in training mode.
        targets: class probabilities of each image, ``[B, classes]``.
        token_targets: class probabilities of each patch, ``[B, patches, classes]``.
        token_weight: the authors' 0.5.
    """
    mixed = targets * (1 - output.exchanged) + targets.flip(0) * output.exchanged
    tokens = F.cross_entropy(output.token_logits.flatten(0, 1), token_targets.flatten(0, 1))
    return F.cross_entropy(output.logits, mixed) + token_weight * tokens


def _filter(state_dict: Mapping[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """The authors' checkpoint for timm's loader: unwrapped, position embeddings resampled where sizes differ."""
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    # timm's filter resamples position embeddings, and would take the stem's smaller projection for another patch size.
    projection = state.pop("patch_embed.proj.weight")
    filtered = checkpoint_filter_fn(state, model)
    return {**filtered, "patch_embed.proj.weight": projection}


def _cfg(crop_pct: float, **settings: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        **settings,
    }


default_cfgs = generate_default_cfgs({"lvvit_s": _cfg(0.9), "lvvit_m": _cfg(1.0)})


def _create(variant: str, pretrained: bool, shape: dict[str, Any], settings: dict[str, Any]) -> LvVit:
    build: Callable[..., LvVit] = build_model_with_cfg
    return build(
        LvVit,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg=dict(out_indices=settings.pop("out_indices", 3), feature_cls="getter"),
        **{"mlp_ratio": 3.0, "patch_size": 16, **shape, **settings},
    )


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LvVit:
    """LV-ViT-S: 26 M parameters, 83.3 % top-1 on ImageNet at 224 px with the authors' weights.

    The authors publish weights where no program can fetch them: load their file with
    ``pretrained=True, pretrained_cfg_overlay=dict(file=...)``, or ``load_state_dict``.
    """
    return _create("lvvit_s", pretrained, dict(embed_dim=384, depth=16, num_heads=6), kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LvVit:
    """LV-ViT-M: 56 M parameters, 84.0 % top-1 on ImageNet at 224 px with the authors' weights, loaded as for -S."""
    return _create("lvvit_m", pretrained, dict(embed_dim=512, depth=20, num_heads=8), kwargs)
