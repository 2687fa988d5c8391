"""Vision Transformers of other libraries that use nn.MultiheadAttention: torchvision, open_clip."""

from __future__ import annotations

import pytest
import torch
import torchvision
from conftest import lively
from homes import pixels

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner.errors import SparsifinerError

SPARSE = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(2, 2), tail=(2, 2))


def torchvision_vit():
    return torchvision.models.VisionTransformer(64, 8, 2, 2, 32, 48, num_classes=5)


def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=64)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=2)
    return open_clip.CLIP(16, vision, text)


MODELS = {
    "torchvision": (torchvision_vit, lambda model, x: model(x)),
    "open_clip": (open_clip_model, lambda model, x: model.encode_image(x)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_dense_at_keep_rate_1_and_dense_again(name):
    build, run = MODELS[name]
    model, x = lively(build()), pixels(2, 3, 64, 64)
    with torch.no_grad():
        dense = run(model, x)
        sparse = sparsifiner.sparsify(model, SPARSE)
        assert list(sparse.state_dict()) == list(model.state_dict())
        assert len(sparsifiner.conversion(sparse).swapped) == 2
        with sparsifiner.record(sparse) as seen:
            pruned = run(sparse, x)
        assert all(record.connectivity.tiling.grid == (8, 8) for record in seen.values())
        assert (pruned - dense).norm() > 1e-4 * dense.norm()
        sparsifiner.set_keep_rate(sparse, 1.0)
        assert (run(sparse, x) - dense).norm() < 1e-5 * dense.norm()
        assert torch.equal(run(sparsifiner.densify(sparse), x), dense)


@pytest.mark.filterwarnings("ignore")
def test_the_text_tower_of_open_clip_stays_dense_and_is_listed():
    sparse = sparsifiner.sparsify(open_clip_model(), SPARSE)
    assert all(item.name.startswith("visual.") for item in sparsifiner.conversion(sparse).swapped)
    assert {item.name for item in sparsifiner.conversion(sparse).stayed} == {
        "transformer.resblocks.0.attn",
        "transformer.resblocks.1.attn",
    }


def test_a_training_step():
    sparse = sparsifiner.sparsify(lively(torchvision_vit()), SPARSE).train()
    sparse(pixels(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())


def test_what_is_no_self_attention_of_patches_is_refused():
    with pytest.raises(
        SparsifinerError, match="no module above it has one convolution that makes the patches|nothing to"
    ):
        sparsifiner.sparsify(torch.nn.TransformerEncoderLayer(16, 2))
    with pytest.raises(SparsifinerError, match="dropout=0.1"):
        sparsifiner.sparsify(torchvision.models.VisionTransformer(64, 8, 2, 2, 32, 48, attention_dropout=0.1))
    sparse = sparsifiner.sparsify(lively(torchvision_vit()), SPARSE)
    layer = next(iter(sparsifiner.sparse_layers(sparse).values()))
    x = torch.randn(1, 65, 32)
    with pytest.raises(SparsifinerError, match="must be one tensor"):
        layer(x, x.clone(), x)
    with pytest.raises(SparsifinerError, match="takes no attn_mask"):
        layer(x, x, x, attn_mask=torch.zeros(65, 65))
