"""A converted model is still the timm model its users know."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import numpy as np
import pytest
import timm
import torch

import sparsifiner
from sparsifiner import (
    SparsifinerConfig,
    conversion,
    densify,
    prune_tokens,
    record,
    set_keep_rate,
    sparse_layers,
    sparsify,
    token_pruning,
)


def test_the_original_stays_dense_and_untouched(tiny_vit, images) -> None:
    model, x = tiny_vit(), images(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        sparse = sparsify(model, SparsifinerConfig(mode="sparse"), keep_rate=0.2)
        for parameter in sparse.parameters():
            parameter.zero_()
        assert torch.equal(model(x), want)
    assert not any(isinstance(module, sparsifiner.attention.layer.SparseAttention) for module in model.modules())


def test_in_place_converts_the_model_itself(tiny_vit) -> None:
    model = tiny_vit()
    assert sparsify(model, inplace=True) is model
    assert len(sparse_layers(model)) == 2
    assert densify(model, inplace=True) is model
    with pytest.raises(ValueError, match="has no sparse attention layer; call sparsify"):
        sparse_layers(model)
    with pytest.raises(ValueError, match="is not the result of sparsify"):
        conversion(model)


def test_sparsify_twice_is_refused(tiny_vit) -> None:
    with pytest.raises(ValueError, match="it is sparse already; change it with set_keep_rate"):
        sparsify(sparsify(tiny_vit()))


def test_state_dicts_fit_both_ways(tiny_vit, images) -> None:
    model, x = tiny_vit(), images(1, 3, 32, 32)
    sparse = sparsify(model, SparsifinerConfig(mode="sparse", predictor="lowrank"))
    names = set(sparse.state_dict()) - set(model.state_dict())
    assert names
    assert all(".attn.predictor." in name for name in names)
    fresh = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse", predictor="lowrank"))
    fresh.load_state_dict(sparse.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), sparse(x))
    result = fresh.load_state_dict(model.state_dict(), strict=False)
    assert set(result.missing_keys) == names
    assert not result.unexpected_keys


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("predictor", ["pooled", "lowrank"])
def test_copies_are_independent(clone, predictor, tiny_vit, images) -> None:
    sparse = sparsify(
        tiny_vit(dynamic_img_size=True), SparsifinerConfig(mode="sparse", predictor=predictor), keep_rate=0.2
    )
    x, wide = images(1, 3, 32, 32), images(1, 3, 32, 64)
    with torch.no_grad():
        want = sparse(x)
        twin = clone(sparse)
        twin(wide)  # the copy has a patch grid of its own
        assert torch.equal(sparse(x), want)
        assert torch.equal(twin(x), want)
    assert str(conversion(twin)) == str(conversion(sparse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("predictor", ["pooled", "lowrank", "local"])
def test_half_precision(dtype, predictor, tiny_vit, images) -> None:
    sparse = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse", predictor=predictor), keep_rate=0.5)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        want = sparse(x)
        half = sparse.half() if dtype == torch.float16 else sparse.to(dtype)
        got = half(x.to(dtype))
    assert got.dtype == dtype
    # Eight bits of mantissa through two layers; a near-tie in the selection may fall the other way.
    assert (got.float() - want).norm() / want.norm() < 0.1


def test_autocast(tiny_vit, images) -> None:
    sparse, x = (
        sparsify(tiny_vit(), SparsifinerConfig(mode="sparse", predictor="lowrank"), keep_rate=0.5),
        images(2, 3, 32, 32),
    )
    with torch.no_grad():
        want = sparse(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = sparse(x)
    assert (got.float() - want).norm() / want.norm() < 0.1


def test_feature_apis(tiny_vit, images) -> None:
    model, x = tiny_vit(), images(2, 3, 32, 32)
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"), keep_rate=1.0)
    with torch.no_grad():
        torch.testing.assert_close(sparse.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-5)
        for got, want in zip(
            sparse.forward_intermediates(x, intermediates_only=True),
            model.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    sparse.set_grad_checkpointing()
    sparse.train()(x).sum().backward()
    sparse.reset_classifier(3)
    assert sparse(x).shape == (2, 3)


def test_forward_hooks_move_along(tiny_vit, images) -> None:
    model, calls = tiny_vit(), []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    sparsify(model, inplace=True)(images(1, 3, 32, 32))
    assert calls == [(1, 65, 48)]


@pytest.mark.parametrize("predictor", ["pooled", "lowrank"])
def test_non_square_and_changing_image_sizes(predictor, tiny_vit, images) -> None:
    model = tiny_vit(dynamic_img_size=True)
    sparse = sparsify(model, SparsifinerConfig(mode="sparse", predictor=predictor), keep_rate=1.0)
    with torch.no_grad(), record(sparse) as seen:
        for size in ((32, 32), (20, 64), (64, 20), (32, 32)):
            x = images(1, 3, *size)
            torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)
            assert seen["blocks.0.attn"].connectivity.tiling.grid == (size[0] // 4, size[1] // 4)
        with pytest.raises(ValueError, match="a 4x4 tile does not fit the 3x16 patch grid"):
            sparse(images(1, 3, 12, 64))


def test_set_input_size(tiny_vit, images) -> None:
    model = tiny_vit()
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"), keep_rate=1.0)
    for either in (model, sparse):
        either.set_input_size(img_size=(24, 40))
    x = images(1, 3, 24, 40)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_beit_window_size(images) -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=80, depth=2, embed_dim=48, num_heads=3).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"), keep_rate=1.0)
    for either in (model, sparse):
        either.set_input_size(img_size=(96, 128))
    x = images(1, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_patch_dropout_is_refused(tiny_vit, images) -> None:
    with pytest.raises(ValueError, match="it drops patches at random in training, .* build it with patch_drop_rate=0"):
        sparsify(tiny_vit(patch_drop_rate=0.5), SparsifinerConfig(mode="sparse"))
    sparse = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse")).train()
    sparse.patch_drop = timm.layers.PatchDropout(0.5)
    with pytest.raises(ValueError, match="patch dropout and token merging are not supported"):
        sparse(images(1, 3, 32, 32))


def test_masks_are_refused(tiny_vit, images) -> None:
    sparse = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse"))
    with pytest.raises(ValueError, match="takes no attn_mask"):
        sparse.blocks[0](torch.zeros(1, 65, 48), attn_mask=torch.zeros(65, 65))


@pytest.mark.parametrize(
    "config",
    [
        SparsifinerConfig(mode="sparse"),
        SparsifinerConfig.paper(),
        SparsifinerConfig(mode="sparse", tail=(3, 3)),
        SparsifinerConfig(),  # asks whether it pays
    ],
)
def test_compiles_into_one_graph(config, tiny_vit, images) -> None:
    sparse, x = sparsify(tiny_vit(depth=1), config, keep_rate=0.3), images(2, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sparse(x), rtol=1e-4, atol=1e-5)
    loss = compiled(x).square().sum()
    loss.backward()
    gradient = sparse.blocks[0].attn.qkv.weight.grad.clone()
    sparse.zero_grad()
    sparse(x).square().sum().backward()
    torch.testing.assert_close(gradient, sparse.blocks[0].attn.qkv.weight.grad, rtol=1e-3, atol=1e-4)


def test_inductor_compiles_it(tiny_vit, images) -> None:
    sparse, x = sparsify(tiny_vit(depth=1), SparsifinerConfig(mode="sparse"), keep_rate=0.3), images(1, 3, 32, 32)
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(sparse, fullgraph=True)(x), sparse(x), rtol=1e-4, atol=1e-5)


def test_training_reaches_every_dense_weight(tiny_vit, images) -> None:
    sparse = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse"), keep_rate=0.2).train()
    sparse(images(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in sparse.parameters())


def test_inference_mode_first_does_not_spoil_training(tiny_vit, images) -> None:
    """Index tensors are cached; made in inference mode they could not be saved for backward."""
    x = images(1, 3, 36, 40)
    sparse = sparsify(tiny_vit(img_size=(36, 40)), keep_rate=0.2)
    with torch.inference_mode():
        sparse(x)
    sparse(x).sum().backward()


def test_set_keep_rate(tiny_vit, images) -> None:
    sparse, x = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse"), keep_rate=0.1), images(1, 3, 32, 32)

    def densities() -> list[float]:
        with torch.no_grad(), record(sparse) as seen:
            sparse(x)
        return [item.connectivity.density() for item in seen.values()]

    low = densities()
    set_keep_rate(sparse, 0.5)
    assert all(new > old + 0.3 for new, old in zip(densities(), low, strict=True))
    set_keep_rate(sparse, [0.1, 0.5])
    assert densities()[1] > densities()[0] + 0.3
    for bad in (0.0, [0.1], [0.1, 2.0]):
        with pytest.raises(ValueError, match="keep_rate"):
            set_keep_rate(sparse, bad)
    assert densities()[1] > densities()[0] + 0.3


@pytest.mark.parametrize(
    "rates",
    [
        np.full(2, 0.5),
        np.float32(0.5),
        torch.tensor(0.5),
        torch.tensor([0.5, 0.5]),
        [np.float64(0.5), torch.tensor(0.5)],
    ],
)
def test_keep_rates_of_numpy_and_torch(rates, tiny_vit) -> None:
    sparse, other = sparsify(tiny_vit(), keep_rate=rates), sparsify(tiny_vit())
    set_keep_rate(other, rates)
    for model in (sparse, other):
        kept = [layer.config.keep_rate for layer in sparse_layers(model).values()]
        assert kept == [0.5, 0.5]
        assert {type(rate) for rate in kept} == {float}
    model = prune_tokens(tiny_vit(), keep_rate=np.float32(0.5), layers=(0,))
    assert json.dumps(token_pruning(model).to_dict())


@pytest.mark.parametrize("config", [0.1, 0, {"keep_rate": 0.1}])
def test_what_is_no_configuration_is_refused(config, tiny_vit) -> None:
    with pytest.raises(
        ValueError, match=f"must be a SparsifinerConfig, got {type(config).__name__}; use keep_rate=0.1"
    ):
        sparsify(tiny_vit(), config)
    with pytest.raises(ValueError, match="got '0.1'"):
        sparsify(tiny_vit(), keep_rate="0.1")


def test_different_images_get_different_keys(tiny_vit, images) -> None:
    sparse = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse"), keep_rate=0.1)
    with torch.no_grad(), record(sparse, tensors=True) as seen:
        sparse(images(2, 3, 32, 32))
    assert list(seen) == ["blocks.0.attn", "blocks.1.attn"]
    first = seen["blocks.0.attn"]
    mask = first.connectivity.to_mask()
    assert not torch.equal(mask[0], mask[1])
    assert first.q.shape == (2, 3, 65, 16)
    with torch.no_grad(), record(sparse) as again:
        sparse(images(1, 3, 32, 32))
    assert again["blocks.0.attn"].q is None
    assert sparse.blocks[0].attn.observer is None


def test_threads_share_a_model(tiny_vit, images) -> None:
    sparse, x = sparsify(tiny_vit(), SparsifinerConfig(mode="sparse"), keep_rate=0.2), images(2, 3, 32, 32)
    with torch.no_grad():
        want = sparse(x)
    wrong = []

    def run() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(5) if not torch.allclose(sparse(x), want, atol=1e-6))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_backbone_inside_another_model(tiny_vit, images) -> None:
    class Segmenter(torch.nn.Module):
        def __init__(self, backbone: torch.nn.Module) -> None:
            super().__init__()
            self.backbone, self.head = backbone, torch.nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone.forward_features(x))

    model = Segmenter(tiny_vit())
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"), keep_rate=1.0)
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)
    assert conversion(sparse).swapped[0].name == "backbone.blocks.0.attn"


def test_a_grid_smaller_than_a_tile_is_refused_and_nothing_changes(tiny_vit) -> None:
    model = tiny_vit(img_size=12)
    with pytest.raises(ValueError, match="a 4x4 tile does not fit the 3x3 patch grid"):
        sparsify(model, SparsifinerConfig(mode="sparse"), inplace=True)
    with pytest.raises(ValueError, match="keep_rate has 3 entries but 2 layers are converted"):
        sparsify(tiny_vit(), SparsifinerConfig(mode="sparse"), keep_rate=[0.1, 0.1, 0.1])
    assert type(model.blocks[0].attn) is timm.layers.Attention


def test_a_sparse_model_exports(tiny_vit, images):
    """``torch.export``, on which compilation ahead of time and deployment stand."""
    sparse = sparsifiner.sparsify(tiny_vit(), SparsifinerConfig(keep_rate=0.3, mode="sparse"))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(sparse, (x,))
        torch.testing.assert_close(program.module()(x), sparse(x))
    assert any("sparsifiner" in str(node.target) for node in program.graph.nodes)


def test_a_copy_made_while_recording_is_not_recorded(tiny_vit, images):
    sparse, x = sparsify(tiny_vit(), keep_rate=0.5), images(1, 3, 32, 32)
    with sparsifiner.record(sparse) as seen:
        twins = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))]
        for twin in twins:
            twin(x)
        assert not seen
        sparse(x)
    assert len(seen) == 2


@pytest.mark.parametrize("size", [(4, 4), (4, 36), (12, 12), (64, 12)])
def test_images_smaller_than_a_tile_are_attended_to_densely(tiny_vit, images, size):
    dense = tiny_vit(dynamic_img_size=True)
    sparse, x = sparsify(dense, keep_rate=0.1), images(2, 3, *size)
    assert torch.allclose(sparse(x), dense(x), atol=1e-6)
    with pytest.raises(ValueError, match="a 4x4 tile does not fit the"):
        sparse.train()(x)
    with pytest.raises(ValueError, match="a 4x4 tile does not fit the"):
        sparsify(dense, SparsifinerConfig(keep_rate=0.1, mode="sparse"))(x)


@pytest.mark.filterwarnings("ignore")
def test_models_quantized_by_pytorch_before_or_after_compute_the_same(tiny_vit, images):
    config, x = SparsifinerConfig(keep_rate=0.2, mode="sparse"), images(2, 3, 32, 32)

    def int8(model):
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})

    sparse, before, after = (
        sparsify(tiny_vit(), config),
        sparsify(int8(tiny_vit()), config),
        int8(sparsify(tiny_vit(), config)),
    )
    assert len(conversion(before).swapped) == 2
    with torch.no_grad():
        torch.testing.assert_close(before(x), after(x))
        assert 0 < (after(x) - sparse(x)).norm() < 0.3 * sparse(x).norm()
