"""At keep rate 1 the sparse model is the dense model, on every timm ViT family that can be converted."""

import itertools

import pytest
import timm
import torch
from conftest import lively

from sparsifiner import SparsifinerConfig, conversion, densify, sparsify
from sparsifiner.predictors import predictor_names

# One model for each combination of attention class, prefix tokens, norms, gates, biases and pooling in timm.
FAMILIES = [
    "aimv2_1b_patch14_224",
    "beit3_base_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "deepseek_vit_412m_enc",
    "deit3_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_small_patch16_224",
    "eva02_base_patch14_224",
    "eva02_enormous_patch14_clip_224",
    "eva_giant_patch14_224",
    "test_vit3",
    "test_vit4",
    "vit_base_patch14_reg4_dinov2",
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_dinov3",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch16_rope_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_dinov2",
    "vit_pe_core_base_patch16_224",
    "vit_pe_core_gigantic_patch14_448",
    "vit_relpos_base_patch16_cls_224",
    "vit_relpos_base_patch16_rpn_224",
    "vit_so150m_patch16_reg4_map_256",
    "vit_srelpos_small_patch16_224",
]
REFUSED = {
    "cait_xxs24_224": "TalkingHeadAttn: it mixes the attention maps of all heads",
    "gemma4_vit_167m": "Gemma4Attention: its model pads images",
    "hiera_tiny_224": "MaskUnitAttention: it already attends inside small windows",
    "naflexvit_base_patch16_gap": "the patch grid is unknown",
    "resnet18": "no attention layer that timm ViTs use",
    "swin_tiny_patch4_window7_224": "WindowAttention: it already attends inside small windows",
    "vit_base_patch16_xp_224": "ParallelScalingBlock: its attention is fused with the MLP",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention: it subtracts two attention maps",
    "volo_d1_224": "OutlookAttention: its weights come from a projection of the query alone",
    "xcit_nano_12_p16_224": "XCA: it attends over channels",
}


def small(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Two layers, width 48, on a 5x6 patch grid that 4x4 tiles do not divide."""
    with torch.device("meta"):
        patch = timm.create_model(name).patch_embed.patch_size[0]
    size = (patch * 5, patch * 6)
    settings = dict(img_size=size, depth=2, num_classes=7, embed_dim=48, num_heads=3)
    try:
        model = timm.create_model(name, **settings)
    except TypeError:  # a few entry points fix the width
        model = timm.create_model(name, img_size=size, depth=2)
    return lively(model), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_rate_one_is_dense(name: str) -> None:
    model, x = small(name)
    with torch.no_grad():
        want = model.forward_features(x)
        for predictor, tail in itertools.product(predictor_names(), ((4, 4), None)):
            sparse = sparsify(model, SparsifinerConfig(mode="sparse", predictor=predictor, tail=tail), keep_rate=1.0)
            # Float32 round-off through two layers of width 48.
            assert error(sparse.forward_features(x), want) < 2e-5, (predictor, tail)
        reduced = sparsify(model, SparsifinerConfig(mode="sparse", tail=None), keep_rate=0.2)
        assert error(reduced.forward_features(x), want) > 1e-4, "attention does not show, so the test proves nothing"
        assert torch.equal(densify(reduced).forward_features(x), want)
    swapped, left = conversion(sparse).swapped, conversion(sparse).stayed
    assert len(swapped) == (4 if "18x2" in name else 2)
    assert {item.dense_class for item in left} <= {"AttentionPoolLatent"}


@pytest.mark.parametrize("predictor", ["pooled", "lowrank", "oracle", "local", "strided", "random"])
@pytest.mark.parametrize("query_tile", [(1, 1), (4, 4), (2, 3)])
@pytest.mark.parametrize("keep_prefix", [True, False])
def test_keep_rate_one_is_dense_with_every_predictor(predictor, query_tile, keep_prefix, tiny_vit, images) -> None:
    model, x = tiny_vit(), images(2, 3, 32, 32)
    config = SparsifinerConfig(
        mode="sparse", query_tile=query_tile, keep_prefix=keep_prefix, predictor=predictor, tail=(3, 3)
    )
    with torch.no_grad():
        assert error(sparsify(model, config, keep_rate=1.0)(x), model(x)) < 2e-5


@pytest.mark.parametrize(
    "name",
    ["eva02_base_patch14_224", "vit_base_patch16_224", "vit_base_patch16_rope_224", "vit_relpos_base_patch16_cls_224"],
)
def test_queries_and_keys_that_norms_leave_in_float32_under_autocast(name: str) -> None:
    """On a GPU autocast runs layer norm in float32; a hook does the same here."""
    model, x = small(name)
    normed = [module for path, module in model.named_modules() if path.endswith(("q_norm", "k_norm"))]
    assert len(normed) == 4
    for module in normed:
        module.register_forward_hook(lambda module, inputs, output: output.float())
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"), keep_rate=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(sparse.forward_features(x).detach(), model.forward_features(x).detach()) < 3e-2
        out = sparse.train()(x).float()
    out.sum().backward()
    assert all(torch.isfinite(layer.attn.proj.weight.grad).all() for layer in sparse.blocks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = {key: type(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match="nothing to convert in") as refusal:
        sparsify(model, inplace=True)
    assert REFUSED[name] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {key: type(module) for key, module in model.named_modules()} == before


def test_attention_dropout_is_refused(tiny_vit) -> None:
    with pytest.raises(ValueError, match="attn_drop=0.1"):
        sparsify(tiny_vit(attn_drop_rate=0.1))


def test_a_partly_convertible_model_warns_and_lists_the_rest(tiny_vit) -> None:
    both = torch.nn.ModuleDict({"vit": tiny_vit(), "other": torch.nn.MultiheadAttention(8, 2)})
    with pytest.warns(UserWarning, match="1 MultiheadAttention left dense: no module above it"):
        sparse = sparsify(both, SparsifinerConfig(mode="sparse"))
    assert [item.name for item in conversion(sparse).swapped] == ["vit.blocks.0.attn", "vit.blocks.1.attn"]
    assert [item.name for item in conversion(sparse).stayed] == ["other"]
