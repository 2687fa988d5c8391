"""LV-ViT: the published names, the arithmetic, training with token labels, and conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import lively
from torch import Tensor, nn

import sparsifiner
from sparsifiner import SparsifinerConfig, prune_tokens, sparsify
from sparsifiner.models import token_label_loss
from sparsifiner.models.lvvit import random_box

S = {0.5: 339.7, 0.25: 221.7, 0.1: 149.5}
M = {0.25: 369.0, 0.1: 248.6}


def small(**changes: object) -> nn.Module:
    shape = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    return lively(timm.create_model("lvvit_s", **{**shape, **changes}))


def published_shapes(depth: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dicts at 224 px and 1000 classes."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim)}
    for n, inputs, kernel in ((1, 3, 7), (2, 64, 3), (3, 64, 3)):
        shapes[f"patch_embed.conv{n}.weight"] = (64, inputs, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{n}.{name}"] = (64,)
        shapes[f"patch_embed.bn{n}.num_batches_tracked"] = ()
    shapes |= {"patch_embed.proj.weight": (dim, 64, 8, 8), "patch_embed.proj.bias": (dim,)}
    for n in range(depth):
        block = {"attn.qkv.weight": (3 * dim, dim), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,)}
        block |= {"mlp.fc1.weight": (3 * dim, dim), "mlp.fc1.bias": (3 * dim,)}
        block |= {"mlp.fc2.weight": (dim, 3 * dim), "mlp.fc2.bias": (dim,)}
        block |= {f"{norm}.{name}": (dim,) for norm in ("norm1", "norm2") for name in ("weight", "bias")}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    for head in ("head", "aux_head"):
        shapes |= {f"{head}.weight": (1000, dim), f"{head}.bias": (1000,)}
    return shapes


@pytest.mark.parametrize(("name", "depth", "dim", "millions"), [("lvvit_s", 16, 384, 26.2), ("lvvit_m", 20, 512, 55.8)])
def test_names_shapes_and_size_are_the_published_ones(name, depth, dim, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes(depth, dim)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def by_hand(state: dict[str, Tensor], x: Tensor, depth: int, heads: int) -> tuple[Tensor, Tensor]:
    """Class and patch logits from a state dict, as the paper describes the model; branches are halved."""

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    for n, stride in ((1, 2), (2, 1), (3, 1)):
        weight = state[f"patch_embed.conv{n}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        stats = (state[f"patch_embed.bn{n}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *stats).relu()
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for n in range(depth):
        q, k, v = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + linear(out.transpose(1, 2).flatten(2), f"blocks.{n}.attn.proj") / 2
        hidden = F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{n}.mlp.fc2") / 2
    x = norm(x, "norm")
    return linear(x[:, 0], "head"), linear(x[:, 1:], "aux_head")


def test_the_model_computes_what_the_paper_describes(images):
    model, x = small(), images(2, 3, 64, 64)
    model.train()(x)  # so that the batch norms have statistics of their own
    model.eval()
    logits, patches = by_hand(model.state_dict(), x, 2, 3)
    torch.testing.assert_close(model(x), logits + 0.5 * patches.amax(1), rtol=1e-4, atol=1e-5)
    model.train().set_token_labels()
    model.mix_token = False
    model.patch_embed.eval()
    output = model(x)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.token_logits, patches, rtol=1e-4, atol=1e-5)
    assert output.exchanged == 0


@pytest.mark.parametrize("seed", range(4))
def test_mixed_patches_return_to_their_own_image(images, seed):
    # Without blocks no patch sees another, so each must come out as if nothing had been exchanged.
    model, x = small(), images(3, 3, 64, 64)
    model.blocks = nn.Sequential()
    expected = model.aux_head(model.forward_features(x)[:, 1:])
    model.train().set_token_labels()
    model.patch_embed.eval()
    torch.manual_seed(seed)
    output = model(x)
    torch.testing.assert_close(output.token_logits, expected)
    top, left, bottom, right = output.box
    assert output.exchanged == (bottom - top) * (right - left) / 16
    assert len(model.patch_embed._forward_hooks) == 0


def test_boxes_lie_in_the_grid_and_vary():
    torch.manual_seed(0)
    boxes = [random_box((6, 9)) for _ in range(50)]
    assert all(0 <= t <= b <= 6 and 0 <= left <= right <= 9 for t, left, b, right in boxes)
    assert len(set(boxes)) > 10


def test_token_label_loss(images):
    model, x = small(), images(2, 3, 64, 64)
    model.train().set_token_labels()
    torch.manual_seed(2)
    output = model(x)
    assert output.exchanged > 0
    targets, token_targets = torch.rand(2, 5).softmax(-1), torch.rand(2, 16, 5).softmax(-1)
    loss = token_label_loss(output, targets, token_targets)
    share = output.exchanged
    expected = torch.tensor(0.0)
    for n in range(2):
        mixed = (1 - share) * targets[n] + share * targets[1 - n]
        expected = expected - (mixed * output.logits[n].log_softmax(-1)).sum() / 2
        for t in range(16):
            expected = expected - 0.5 * (token_targets[n, t] * output.token_logits[n, t].log_softmax(-1)).sum() / 32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_checkpoint_file_loads_through_timm_at_its_size_and_another(tmp_path: Path, images):
    model, x = small(), images(1, 3, 64, 64)
    path = tmp_path / "lvvit.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    shape = dict(embed_dim=48, depth=2, num_heads=3, pretrained=True)
    overlay = dict(file=str(path), num_classes=5)
    back = timm.create_model("lvvit_s", img_size=64, num_classes=5, pretrained_cfg_overlay=overlay, **shape).eval()
    assert torch.equal(back(x), model(x))
    wider = timm.create_model("lvvit_s", img_size=96, num_classes=5, pretrained_cfg_overlay=overlay, **shape).eval()
    assert wider(images(1, 3, 96, 96)).shape == (1, 5)
    assert torch.equal(wider.patch_embed.proj.weight, model.patch_embed.proj.weight)
    fewer = timm.create_model("lvvit_s", img_size=64, num_classes=3, pretrained_cfg_overlay=overlay, **shape).eval()
    assert fewer(x).shape == (1, 3)


@pytest.mark.parametrize(("name", "layers", "published"), [("lvvit_s", 16, S), ("lvvit_m", 20, M)])
def test_flops_reproduce_the_published_figures(name, layers, published):
    # All layers are alike, so one is run and multiplied.
    model, x = timm.create_model(name, depth=1).eval(), torch.zeros(1, 3, 224, 224)
    dense = layers * sparsifiner.count_flops(model, x).mhsa_macs
    assert dense == layers * 2 * 197**2 * model.embed_dim
    assert name == "lvvit_m" or f"{dense / 1e6:.1f}" == "476.9"
    for keep_rate, macs in published.items():
        sparse = sparsify(model, SparsifinerConfig.paper(keep_rate=keep_rate))
        assert layers * sparsifiner.count_flops(sparse, x).mhsa_macs / 1e6 == pytest.approx(macs, rel=0.03)


@pytest.mark.parametrize("config", [SparsifinerConfig(mode="sparse"), SparsifinerConfig.paper(n_down=4)])
def test_sparse_and_pruned_models(images, tmp_path: Path, config):
    model, x = small(), images(2, 3, 64, 64)
    sparse = sparsify(model, config, keep_rate=1.0)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)
    pruned = prune_tokens(sparsify(model, config), keep_rate=0.5, layers=(0,), fuse=True)
    assert pruned.forward_features(x).shape == (2, 1 + 1 + 8, 48)
    sparsifiner.save_pretrained(
        pruned, tmp_path, model_args=dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    )
    assert torch.equal(sparsifiner.from_pretrained(tmp_path)(x), pruned(x))
    pruned.train().set_token_labels()
    with pytest.raises(ValueError, match="mix_token=False"):
        [pruned(x) for _ in range(20)]
    pruned.mix_token = False
    assert pruned(x).token_logits.shape == (2, 9, 5)


def test_other_sizes_and_heads(images):
    dynamic = small(dynamic_img_size=True)
    assert dynamic(images(1, 3, 64, 96)).shape == (1, 5)
    with pytest.raises(ValueError, match="multiples of 16"):
        dynamic(images(1, 3, 64, 70))
    model = small()
    with pytest.raises(ValueError, match="64x96 pixels, the model 64x64"):
        model(images(1, 3, 64, 96))
    model.reset_classifier(3)
    assert model(images(1, 3, 64, 64)).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images(1, 3, 64, 64)).shape == (1, 48)
