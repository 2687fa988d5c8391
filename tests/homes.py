"""Small random models of other libraries, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
IMAGE = dict(image_size=64, patch_size=8)


def pixels(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Home:
    """A family of models.

    Args:
        build: makes a small random model.
        inputs: its keyword arguments.
        swapped: attention layers that can be made sparse.
        flexible: keyword arguments with an image of other sides, where the model takes one.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    swapped: int = 2
    flexible: Callable[[], dict[str, Any]] | None = None


def _image(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": pixels(2, 3, 64, 64), **more}


def _other_image(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": pixels(2, 3, 48, 80), **more}


def _model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **IMAGE, **settings})
        return getattr(transformers, f"{name}Model")(config).eval()

    return build


def _clip() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    text = dict(SIZES, vocab_size=50, max_position_embeddings=16, eos_token_id=1, bos_token_id=0)
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, **IMAGE}, projection_dim=16)
    return transformers.CLIPModel(config).eval()


def _depth_anything() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    stages = dict(out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
    backbone = transformers.Dinov2Config(**{**SIZES, **IMAGE, "num_hidden_layers": 4, **stages})
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, patch_size=8, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_in_index=-1, head_hidden_size=8,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config).eval()


def _vitpose() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.VitPoseBackboneConfig(**{**SIZES, "image_size": [64, 48], "patch_size": [8, 8]})
    return transformers.VitPoseBackbone(config).eval()


def _sam3() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Sam3ViTConfig(
        **{**SIZES, **IMAGE, "num_hidden_layers": 3}, window_size=4, global_attn_indexes=[1, 2], pretrain_image_size=32
    )
    from transformers.models.sam3.modeling_sam3 import Sam3ViTModel

    return Sam3ViTModel(config).eval()


def _siglip2() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**SIZES, num_patches=64, patch_size=4)
    ).eval()


def _qwen2_vl() -> nn.Module:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
    return Qwen2VisionTransformerPretrainedModel(config).eval()


def cut_patches(shapes: list[tuple[int, int]], length: int) -> dict[str, torch.Tensor]:
    """Inputs of SigLIP 2: images of the given rows and columns of patches, padded to ``length`` patches."""
    sizes = torch.tensor(shapes)
    mask = torch.arange(length)[None] < sizes.prod(-1)[:, None]
    return {
        "pixel_values": pixels(len(shapes), length, 48),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": sizes,
    }


def packed_patches(*grids: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Inputs of Qwen2-VL's tower: images of the given frames, rows and columns of patches in one sequence."""
    sizes = torch.tensor(grids)
    return {"hidden_states": pixels(int(sizes.prod(-1).sum()), 96), "grid_thw": sizes}


_TOKENS = dict(input_ids=torch.tensor([[0, 5, 7, 1], [0, 3, 9, 1]]))

TRANSFORMERS: dict[str, Home] = {
    "ViT": Home(_model("ViT"), _image(), flexible=_other_image(interpolate_pos_encoding=True)),
    "DeiT": Home(_model("DeiT"), _image(), flexible=_other_image(interpolate_pos_encoding=True)),
    "DINOv2": Home(_model("Dinov2"), _image(), flexible=_other_image()),
    "DINOv2 with registers": Home(
        _model("Dinov2WithRegisters", num_register_tokens=3), _image(), flexible=_other_image()
    ),
    "DINOv3": Home(_model("DINOv3ViT", num_register_tokens=3), _image(), flexible=_other_image()),
    "SigLIP": Home(_model("SiglipVision"), _image(), flexible=_other_image(interpolate_pos_encoding=True)),
    "CLIP": Home(_clip, _image(**_TOKENS)),
    "BEiT": Home(
        _model("Beit", use_relative_position_bias=True, use_shared_relative_position_bias=False), _image(),
    ),
    "DPT": Home(_model("DPT", backbone_out_indices=[0, 1, 1, 1]), _image()),
    "Depth-Anything": Home(_depth_anything, _image(), swapped=4),
    "YOLOS": Home(_model("Yolos", image_size=[64, 64], num_detection_tokens=5), _image()),
    "VideoMAE": Home(
        _model("VideoMAE", num_frames=4, tubelet_size=2), lambda: {"pixel_values": pixels(1, 4, 3, 64, 64)}
    ),
    "V-JEPA 2": Home(
        _model("VJEPA2", crop_size=64, frames_per_clip=4, tubelet_size=2, pred_hidden_size=24,
               pred_num_attention_heads=2, pred_num_hidden_layers=1, num_pooler_layers=1),
        lambda: {"pixel_values_videos": pixels(1, 4, 3, 64, 64), "skip_predictor": True},
    ),
    "I-JEPA": Home(_model("IJepa"), _image()),
    "ViTPose": Home(_vitpose, lambda: {"pixel_values": pixels(2, 3, 64, 48)}),
    "SigLIP 2": Home(
        _siglip2, lambda: cut_patches([(8, 8), (4, 16)], 64), flexible=lambda: cut_patches([(6, 8), (4, 12)], 48)
    ),
    "Qwen2-VL tower": Home(
        _qwen2_vl, lambda: packed_patches((2, 8, 8), (1, 6, 10)), flexible=lambda: packed_patches((1, 4, 16))
    ),
    "SAM 3": Home(_sam3, _image()),
}  # fmt: skip


def first_tensor(output: Any) -> torch.Tensor:
    """What a forward pass returned, as one tensor."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) or hasattr(output, "to_tuple"):
        for name in ("last_hidden_state", "image_embeds", "predicted_depth", "logits", "feature_maps"):
            found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
            if found is not None:
                return found[-1] if isinstance(found, tuple) else found
    return first_tensor(output[0])
