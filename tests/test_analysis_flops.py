"""FLOP counts: the published figures, PyTorch's own counter, and what does not fit either."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparsifiner
from sparsifiner import SparsifinerConfig, sparse_attention
from sparsifiner.geometry.tiling import Tiling
from sparsifiner.measure import count_flops
from sparsifiner.ops.connectivity import Connectivity
from sparsifiner.ops.tail import group_keys
from sparsifiner.predictors import PooledConfig

PUBLISHED = {1.0: 431, 0.9: 396.8, 0.8: 360.6, 0.7: 324.6, 0.6: 290.3, 0.5: 254.2, 0.4: 218.0}
PUBLISHED |= {0.3: 183.6, 0.2: 147.5, 0.1: 111.4, 0.05: 93.3, 0.01: 78.9}
PUBLISHED_LVVIT = {0.5: 339.7, 0.25: 221.7, 0.1: 149.5}


def tiny(name: str = "vit_tiny_patch16_224", **settings: object) -> torch.nn.Module:
    return timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 3, **settings}).eval()


@pytest.fixture(scope="module")
def one_layer_of_deit() -> torch.nn.Module:
    # All layers of DeiT-S and of LV-ViT-S's shape are alike, so one is run and multiplied.
    return timm.create_model("deit_small_patch16_224", depth=1).eval()


@pytest.mark.parametrize(("layers", "published"), [(12, "357.7"), (16, "476.9")])
def test_dense_figures_are_the_published_ones_exactly(one_layer_of_deit, layers, published):
    report = count_flops(one_layer_of_deit, torch.zeros(1, 3, 224, 224))
    assert report.mhsa_macs == 2 * 197**2 * 384
    assert f"{layers * report.mhsa_macs / 1e6:.1f}" == published


@pytest.mark.parametrize(("keep_rate", "published"), PUBLISHED.items())
def test_sparse_figures_reproduce_table_1(one_layer_of_deit, keep_rate, published):
    sparse = sparsifiner.sparsify(one_layer_of_deit, SparsifinerConfig.paper(keep_rate=keep_rate))
    report = count_flops(sparse, torch.zeros(1, 3, 224, 224))
    assert 12 * report.mhsa_macs / 1e6 == pytest.approx(published, rel=0.015)
    assert "score product" in report.note
    assert report.mhsa_full_macs > report.mhsa_macs


@pytest.mark.parametrize(("keep_rate", "published"), PUBLISHED_LVVIT.items())
def test_sparse_figures_reproduce_lv_vit_s(one_layer_of_deit, keep_rate, published):
    sparse = sparsifiner.sparsify(one_layer_of_deit, SparsifinerConfig.paper(keep_rate=keep_rate))
    report = count_flops(sparse, torch.zeros(1, 3, 224, 224))
    assert 16 * report.mhsa_macs / 1e6 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        None,
        SparsifinerConfig(mode="sparse", keep_rate=0.3, query_tile=(2, 2), tail=(2, 2)),
        SparsifinerConfig(mode="sparse", keep_rate=0.3, query_tile=(3, 2), keep_prefix=False, tail=None),
        SparsifinerConfig.paper(keep_rate=0.3, n_down=4),
        SparsifinerConfig(mode="sparse", predictor="local", tail=None),
        SparsifinerConfig(mode="sparse", query_tile=(4, 4), predictor="oracle", tail=None),
    ],
    ids=["dense", "pooled", "borders", "paper", "local", "oracle"],
)
def test_total_agrees_with_the_counter_of_pytorch(config, batch):
    model, x = tiny(), torch.zeros(batch, 3, 64, 64)
    if config is not None:
        model = sparsifiner.sparsify(model, config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    report = count_flops(model, x)
    # The counter sees matrix products; pooling is additions, and regrouping runs in a kernel: it counts neither.
    pooling = sum(layer.predictor.get("values", 0) for layer in report.layers)
    if config is not None and config.tail is not None:
        pooling += (2 * 192 * 16 + 2 * 192 * (16 * 4 + 16)) * len(report.layers)  # 4 blocks around each of 16 patches
    assert (report.total_macs - pooling) * batch * 2 == counter.get_total_flops()


def test_the_terms_of_a_layer_are_what_the_formulas_say():
    config = SparsifinerConfig(
        mode="sparse",
        keep_rate=0.5,
        query_tile=(2, 2),
        predictor=PooledConfig(query_pool=(2, 2), query_refine=0),
        tail=(2, 2),
    )
    report = count_flops(sparsifiner.sparsify(tiny(), config), torch.zeros(1, 3, 64, 64))
    layer, width = report.layers[0], 192
    assert layer.num_tokens == 17
    assert layer.projections == 17 * width * 4 * width
    assert layer.mlp == 2 * 17 * width * 4 * width
    assert layer.attention == 2 * width * (17 + 16 * (1 + 8))
    regrouped = 2 * width * (16 * 4 + 16)  # in two steps: products with the 4 blocks around, and means
    assert layer.tail == 2 * width * (16 * 4 + 16) + regrouped
    assert layer.predictor == {"products": width * 4 * 16 + width * 16, "values": 2 * width * 16}
    assert report.patch_embed == 16 * 3 * 16 * 16 * width
    assert report.other == 3 * width
    terms = report.projection_macs + report.attention_macs + report.tail_macs + report.predictor_macs + report.mlp_macs
    assert report.total_macs == terms + report.patch_embed + report.other
    assert report.to_dict()["total_macs"] == report.total_macs


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_that_is_not_fused_or_projected_by_hand_is_told_apart(name):
    size = 56 if "patch14" in name else 64
    model = tiny(name, img_size=size)
    report = count_flops(model, torch.zeros(1, 3, size, size))
    tokens, width = report.layers[0].num_tokens, model.embed_dim
    assert len(report.layers) == 2
    assert report.layers[0].attention == 2 * tokens**2 * width
    assert report.layers[0].projections >= 4 * tokens * width**2


def test_the_model_keeps_its_mode():
    model = tiny().train()
    model.blocks[0].eval()
    count_flops(model, torch.zeros(1, 3, 64, 64))
    assert model.training
    assert not model.blocks[0].training


def test_attention_pooling_counts_as_the_head_and_gradients_stay_asked_for():
    model = tiny("vit_base_patch16_siglip_224", num_classes=0, embed_dim=96, num_heads=3)
    report = count_flops(model, torch.zeros(1, 3, 64, 64))
    assert len(report.layers) == 2
    assert report.other > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention layer"):
        count_flops(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_the_counter_sees_the_operator_forward_and_backward():
    tiling = Tiling((5, 4), (2, 2), num_prefix_tokens=1)
    q, k, v = (torch.randn(2, 3, 21, 8, requires_grad=True) for _ in range(3))
    indices = torch.arange(5, dtype=torch.int32).expand(2, 3, tiling.num_tiles, 5).contiguous()
    connectivity = Connectivity(tiling, indices)
    tail = group_keys(k.detach(), v.detach(), tiling.regions((2, 2))).tail(connectivity)
    with FlopCounterMode(display=False) as counter:
        out = sparse_attention(q, k, v, connectivity, tail=tail, backend="gather")
    forward = counter.get_total_flops()
    assert forward == 2 * 2 * 2 * 3 * 8 * (21 + 20 * (5 + 6))
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2


def test_a_batch_without_images_is_refused(tiny_vit, images):
    with pytest.raises(ValueError, match=r"at least one image, got a batch of shape \[0, 3, 32, 32\]"):
        count_flops(tiny_vit(), images(1, 3, 32, 32)[:0])
