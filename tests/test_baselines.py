"""Linformer, token merging, and every method by name."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.attention import Attention

import sparsifiner
from sparsifiner import sparsify
from sparsifiner.geometry.patch_grid import PatchGrid
from sparsifiner.methods import METHODS, convert_with
from sparsifiner.reduction import linformer, merge_tokens
from sparsifiner.reduction.linformer import average_pooling
from sparsifiner.reduction.merging import MergingBlock, match_tokens, merge_matched

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ALWAYS_PRUNES = ("paper-evit", "sparsifiner-evit")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_keeping_all_is_dense(tiny_vit, images, name):
    model, x = tiny_vit(depth=4, init_values=0.7), images(2, 3, 32, 32)
    dense = sparsifiner.count_flops(model, x)
    with torch.no_grad():
        whole = METHODS[name].convert(model, 1.0)
        if name not in ALWAYS_PRUNES:
            torch.testing.assert_close(whole(x), model(x), **CLOSE)
        part = convert_with(name, model, 0.25)
        assert part(x).shape == (2, 7)
        assert part.forward_features(x).shape[0] == 2
        # A copy of the converted model gives the same, so it shares no state with the original.
        assert torch.equal(copy.deepcopy(part)(x), part(x))
    counts = sparsifiner.count_flops(part, x)
    if name != "dense":
        assert counts.attention_macs < 0.7 * dense.attention_macs
        assert not torch.equal(part(x), model(x))
    assert sparsifiner.count_flops(model, x) == dense


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_every_method_refuses_what_has_no_attention(name):
    with pytest.raises(ValueError, match="ResNet") as error:
        METHODS[name].convert(timm.create_model("resnet18"), 0.5)
    assert "\n" not in str(error.value)


def test_unknown_methods_and_rates_are_refused(tiny_vit):
    with pytest.raises(ValueError, match="method 'magic' is unknown; choose one of dense"):
        convert_with("magic", tiny_vit(), 0.5)
    with pytest.raises(ValueError, match="must lie in"):
        convert_with("tome", tiny_vit(), 0.0)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), prefix=st.integers(0, 3), share=st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_average_pooling_is_a_partition_of_nearly_equal_regions(rows, columns, prefix, share):
    n_down = max(prefix + 1, math.ceil(share * (prefix + rows * columns)))
    pooling = average_pooling(PatchGrid((rows, columns), (4, 4), prefix), n_down)
    assert pooling.shape == (n_down, prefix + rows * columns)
    torch.testing.assert_close(pooling.sum(1), torch.ones(n_down))
    assert ((pooling > 0).sum(0) == 1).all()
    assert torch.equal(pooling[:prefix, :prefix], torch.eye(prefix))
    sizes = (pooling[prefix:] > 0).sum(1)
    assert sizes.max() - sizes.min() <= 1


def test_linformer_is_its_formula_learned_and_counted(tiny_vit, images):
    model, x = tiny_vit(), images(2, 3, 32, 32)
    converted = linformer(model, keep_rate=0.25)
    layer, n_down = converted.blocks[0].attn, math.ceil(0.25 * 65)
    with torch.no_grad():
        layer.key_basis.normal_()
        layer.value_basis.normal_()
        tokens = torch.randn(1, 65, 48)
        q, k, v = layer.qkv(tokens)[0].unflatten(-1, (3, 3, 16)).unbind(1)
        heads = []
        for h in range(3):
            weights = (q[:, h] @ (layer.key_basis @ k[:, h]).T / 4).softmax(-1)
            heads.append(weights @ (layer.value_basis @ v[:, h]))
        torch.testing.assert_close(layer(tokens)[0], layer.proj(torch.cat(heads, -1)), **CLOSE)
    converted(x).sum().backward()
    assert layer.key_basis.grad.abs().sum() > 0
    assert layer.value_basis.grad.abs().sum() > 0
    counts = sparsifiner.count_flops(converted, x).layers[0]
    assert counts.attention == 2 * (2 * 65 * n_down * 48)
    assert counts.projections == 65 * 4 * 48 * 48


def test_linformer_serves_one_size(tiny_vit, images):
    converted = linformer(tiny_vit(dynamic_img_size=True), keep_rate=0.5)
    with pytest.raises(ValueError, match="made for 65 tokens, got 97"):
        converted(images(1, 3, 48, 32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_rate": 0.0}, "must lie in"),
        ({"keep_rate": 10}, "must lie in"),
        ({"n_down": 0}, "n_down must be a whole number at least 1, got 0"),
        ({"n_down": 2.5}, "n_down must be a whole number at least 1, got 2.5"),
        ({"n_down": 4, "keep_rate": 0.5}, "one of the two"),
    ],
)
def test_linformer_refuses_sizes_that_are_none(tiny_vit, settings, words):
    with pytest.raises(ValueError, match=words):
        linformer(tiny_vit(), **settings)


def test_linformer_refuses_models_whose_tokens_become_fewer(tiny_vit):
    with pytest.raises(ValueError, match="drops patches at random in training"):
        linformer(tiny_vit(patch_drop_rate=0.3), keep_rate=0.5)
    """Its projections would serve the first layers only."""
    for fewer in (sparsifiner.prune_tokens(tiny_vit(), keep_rate=0.5, layers=[1]), merge_tokens(tiny_vit(), 4)):
        with pytest.raises(ValueError, match="cannot convert VisionTransformer: tokens are removed or merged"):
            linformer(fewer, keep_rate=0.5)


@given(n=st.integers(2, 15), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=40, deadline=None)
def test_matching_and_merging_equal_a_loop(n, seed, data):
    count = data.draw(st.integers(1, n // 2))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, n, 3, generator=generator)
    x = torch.randn(2, 2 + n, 4, generator=generator)
    sizes = torch.randint(1, 5, (2, 2 + n), generator=generator).float()
    tokens, merged_sizes = merge_matched(x, sizes, 2, *match_tokens(keys, count))
    for b in range(2):
        pairs = []
        for i in range(0, n, 2):
            cosine = [torch.cosine_similarity(keys[b, i], keys[b, j], dim=0).item() for j in range(1, n, 2)]
            best = max(range(len(cosine)), key=lambda c: cosine[c])
            pairs.append((cosine[best], i, 2 * best + 1))
        gone = {i: j for _, i, j in sorted(pairs, reverse=True)[:count]}
        order = [i for i in range(0, n, 2) if i not in gone] + list(range(1, n, 2))
        expected, total = [x[b, 0], x[b, 1]], [sizes[b, 0], sizes[b, 1]]
        for t in order:
            group = [t, *(i for i, j in gone.items() if j == t)]
            weight = sum(sizes[b, 2 + g] for g in group)
            expected.append(sum(sizes[b, 2 + g] * x[b, 2 + g] for g in group) / weight)
            total.append(weight)
        torch.testing.assert_close(tokens[b], torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(merged_sizes[b], torch.stack(total))


@pytest.mark.parametrize("gated", [False, True])
def test_merging_equal_patches_changes_nothing(tiny_vit, images, gated):
    # Each pair of neighbours is one patch twice; proportional attention must make up for the half that is missing.
    model = tiny_vit(depth=3, init_values=0.5)
    if gated:
        for block in model.blocks:
            dense = block.attn
            block.attn = Attention(48, num_heads=3, qkv_bias=True, gated=True).eval()
            block.attn.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
        columns = images(2, 3, 32, 4, 4).repeat_interleave(2, dim=3)  # [B, 3, height, 8 patches, 4 pixels]
        x = columns.flatten(3)
        merged = merge_tokens(model, [32, 0, 0])
        torch.testing.assert_close(merged(x), model(x), **CLOSE)
    assert merged.forward_features(x).shape[1] == 33
    assert merged.blocks[0].grid.current.sizes[33].unique().tolist() == [1.0, 2.0]


def test_merging_trains_and_recomputed_activations_agree(tiny_vit, images):
    model, x = merge_tokens(tiny_vit(depth=3), 9).train(), images(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    sizes = model.blocks[0].grid.current.sizes
    assert sorted(sizes) == [38, 47, 56]
    assert all((s[:, 1:].sum(1) == 64).all() for s in sizes.values())


def test_merging_keeps_the_distillation_token_and_the_names(tiny_vit, images):
    model = tiny_vit("deit_tiny_distilled_patch16_224", depth=3)
    merged = merge_tokens(model, 8)
    assert merged.forward_features(images(1, 3, 32, 32)).shape[1] == 2 + 64 - 24
    assert set(merged.state_dict()) == set(model.state_dict())
    assert isinstance(merged.blocks[0], MergingBlock)
    plain = merged.blocks[0].to_block()
    assert set(plain.state_dict()) == set(model.blocks[0].state_dict())


def test_merging_compiles_into_one_graph(tiny_vit, images):
    model, x = merge_tokens(tiny_vit(depth=2), 5), images(2, 3, 32, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_merging_and_sparse_attention_exclude_each_other(tiny_vit):
    with pytest.raises(ValueError, match="tokens are merged"):
        sparsify(merge_tokens(tiny_vit(), 4))
    with pytest.raises(ValueError, match="cannot merge tokens of VisionTransformer"):
        merge_tokens(sparsify(tiny_vit()), 4)
    with pytest.raises(ValueError, match="per_layer must be"):
        merge_tokens(tiny_vit(), [1, 2, 3])
