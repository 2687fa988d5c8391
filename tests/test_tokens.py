"""Token pruning: which tokens go, what stands in for them, and sparse attention among those that stay."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference_checkpoints import build
from torch import Tensor

import sparsifiner
from sparsifiner import SparsifinerConfig, densify, kept_patches, prune_tokens, sparsify, unprune_tokens
from sparsifiner.attention.adapters.scored import class_scores
from sparsifiner.geometry.counting import num_kept
from sparsifiner.geometry.patch_grid import PatchGrid
from sparsifiner.geometry.subset import SubsetTiling, z_order
from sparsifiner.measure.fidelity import measure_fidelity
from sparsifiner.models import from_reference
from sparsifiner.ops import count_unkept
from sparsifiner.reduction import merge_tokens
from sparsifiner.reduction.pruning import PruningBlock, is_pruned
from sparsifiner.report.maps import attention_maps

PAPER = SparsifinerConfig.paper(keep_rate=0.3, n_down=6)
TILES = SparsifinerConfig(keep_rate=0.2, mode="sparse")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 round-off of a few layers on unit scale, summed in another order


def pruning_step(grid: PatchGrid, share: float, fuse: bool) -> PruningBlock:
    block = timm.models.vision_transformer.Block(dim=4, num_heads=2)
    return PruningBlock(block, grid, share, fuse)


def one_image(x: Tensor, score: Tensor, before: list[int], first: int, fused: bool, count: int, places: Tensor):
    """The step for one image, token by token: the new tokens and the raster numbers of the kept patches."""
    start = first + fused
    ranked = sorted(range(len(before)), key=lambda n: -score[start + n])
    kept = sorted(ranked[:count], key=lambda n: places[before[n]])
    gone = [start + n for n in ranked[count:]] + ([first] if fused else [])
    mean = sum(score[n] * x[n] for n in gone) / sum(score[n] for n in gone)
    return [x[n] for n in range(first)], mean, [x[start + n] for n in kept], [before[n] for n in kept]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 6),
    columns=st.integers(2, 6),
    first=st.integers(1, 3),
    batch=st.integers(1, 3),
    share=st.floats(0.2, 0.9),
    fuse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_two_steps_equal_a_loop_over_images(rows, columns, first, batch, share, fuse, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = PatchGrid((rows, columns), (4, 4), first)
    x = torch.randn(batch, first + rows * columns, 4, generator=generator)
    expected = [(x[b], list(range(rows * columns)), False) for b in range(batch)]
    places = z_order((rows, columns), x.device)
    for stage in (1, 2):
        score = torch.rand(batch, x.shape[1], generator=generator)
        count = num_kept(share**stage, rows * columns)
        nothing = first + fuse + count >= x.shape[1]
        x = pruning_step(grid, share**stage, fuse).reduce(x, score)
        for b, (tokens, before, fused) in enumerate(expected):
            if nothing:
                continue
            prefix, mean, kept, numbers = one_image(tokens, score[b], before, first, fused, count, places)
            rows_now = torch.stack([*prefix, *([mean] if fuse else []), *kept])
            expected[b] = (rows_now, numbers, fuse)
        for b, (tokens, numbers, _) in enumerate(expected):
            torch.testing.assert_close(x[b], tokens)
            if not nothing:
                assert grid.kept[x.shape[1]][b].tolist() == numbers


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_published_numbers_of_tokens_are_left(tiny_vit, images, name, fuse):
    model = prune_tokens(tiny_vit(name, depth=5), keep_rate=0.7, layers=(1, 2, 3), fuse=fuse)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    x = images(3, 3, 32, 32)
    features = model.forward_features(x)
    prefix = model.num_prefix_tokens
    counts = [math.ceil(0.7**s * 64) for s in (1, 2, 3)]
    assert seen == [prefix + 64, *(prefix + fuse + n for n in counts), prefix + fuse + counts[-1]]
    kept = kept_patches(model)
    assert features.shape == (3, prefix + fuse + counts[-1], 48)
    assert kept.shape == (3, counts[-1])
    assert not torch.equal(kept[0].sort().values, kept[1].sort().values)
    assert model(x).shape == (3, 7)


def test_the_class_row_of_the_attention_map_ranks_the_patches():
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    whole = (q @ k.mT * 0.3).softmax(-1).mean(1)[:, 0]
    torch.testing.assert_close(class_scores(q, k, 0.3), whole)


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.5}, {"qk_norm": True}, {"reg_tokens": 2}])
def test_keep_one_equals_dense(tiny_vit, images, settings):
    model, x = tiny_vit(**settings), images(2, 3, 32, 32)
    pruned = prune_tokens(model, keep_rate=1.0, layers=(0, 1), fuse=True)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-6, atol=1e-6)
    assert kept_patches(pruned).tolist() == [list(range(64))]
    assert set(pruned.state_dict()) == set(model.state_dict())


CONFIGS = {
    "dense": None,
    "paper": PAPER,
    "tiles and tail": TILES,
    "tiles, no tail": TILES.replace(tail=None, query_tile=(2, 4)),
    "local": TILES.replace(predictor="local"),
    "random": TILES.replace(predictor="random", tail=None),
    "strided": TILES.replace(predictor="strided"),
    "oracle": TILES.replace(predictor="oracle", query_tile=(1, 1)),
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_gives_what_its_images_give_alone(tiny_vit, images, name, fuse):
    model = prune_tokens(tiny_vit(depth=3), keep_rate=0.6, layers=(0, 1), fuse=fuse)
    if CONFIGS[name] is not None:
        model = sparsify(model, CONFIGS[name])
    x = images(3, 3, 32, 32)
    with torch.no_grad():
        together, kept = model(x), kept_patches(model)
        for number in range(3):
            torch.testing.assert_close(model(x[number : number + 1]), together[number : number + 1], **CLOSE)
            assert torch.equal(kept_patches(model)[0], kept[number])


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("name", ["dense", "paper", "tiles and tail"])
def test_compiles_into_one_graph(tiny_vit, images, name):
    model = prune_tokens(tiny_vit(depth=3), keep_rate=0.6, layers=(0, 1), fuse=True)
    if CONFIGS[name] is not None:
        model = sparsify(model, CONFIGS[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = images(4, 3, 32, 32).chunk(2)
    with torch.no_grad():
        for x in (first, second):
            want, kept = model(x), kept_patches(model)
            torch.testing.assert_close(compiled(x), want, **CLOSE)
            assert torch.equal(kept_patches(model), kept)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dense"])
def test_all_keys_kept_is_dense_attention_among_the_survivors(tiny_vit, images, name, fuse):
    pruned = prune_tokens(tiny_vit(depth=3), keep_rate=0.6, layers=(0, 1), fuse=fuse)
    sparse, x = sparsify(pruned, CONFIGS[name], keep_rate=1.0), images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), pruned(x), **CLOSE)


def test_the_budget_stays_a_share_of_the_image_and_the_tail_counts_who_is_there(tiny_vit, images):
    model = sparsify(prune_tokens(tiny_vit(depth=3), keep_rate=0.5, layers=(0, 1)), TILES)
    with sparsifiner.record(model) as seen:
        model(images(2, 3, 32, 32))
    budgets = [seen[f"blocks.{n}.attn"].connectivity.num_keys for n in range(3)]
    assert budgets == [1 + 13, 1 + 13, 1 + 13]  # ceil(0.2 * 64) of 64, 32 and 16 patches, and the class token
    connectivity = seen["blocks.1.attn"].connectivity
    blocks = connectivity.tiling.regions((4, 4))
    dropped = count_unkept(connectivity.indices, connectivity.bias, blocks).exp().sum(-1)
    torch.testing.assert_close(dropped, torch.full_like(dropped, 32 - 13.0))


def test_the_first_survivors_are_those_of_the_simulation():
    # The authors zero what they prune; up to the first pruning layer's output the survivors' features are equal.
    zeroed, expected, _ = build("token_pruning")
    weights = zeroed.state_dict()
    plain = from_reference(
        {key.removeprefix("state."): value for key, value in expected.items() if key.startswith("state.")},
        keep_rate=[0.25, 0.4, 0.1],
    )
    plain.load_state_dict(weights)
    pruned = prune_tokens(plain, keep_rate=0.7, layers=(1,))
    outputs = {}
    for name, model in (("zeroed", zeroed), ("pruned", pruned)):
        # The simulation calls the parts of a block; its features are read where the next block starts.
        model.blocks[2].norm1.register_forward_pre_hook(lambda m, inputs, name=name: outputs.update({name: inputs[0]}))
        with torch.no_grad():
            model(expected["input"])
    kept = kept_patches(pruned)
    survivors = outputs["zeroed"][:, 1:].gather(1, kept[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(outputs["pruned"][:, 1:], survivors, rtol=1e-5, atol=5e-6)
    assert (outputs["zeroed"][:, 1:].abs().sum(-1) > 0).sum(1).tolist() == [kept.shape[1]] * len(kept)


@given(seed=st.integers(0, 50), fused=st.booleans(), total=st.booleans())
@settings(max_examples=20, deadline=None)
def test_rows_of_absent_tokens_are_left_out(seed, fused, total):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(2)])
    tiling = SubsetTiling.of(positions, (3, 4), (2, 2), 1, 1 + fused + 5)
    table = torch.randn(13, 3, generator=generator)
    rows = tiling.rows(table, total=total)
    for image, kept in zip(rows, positions.tolist(), strict=True):
        gone = torch.stack([table[1 + n] for n in range(12) if n not in kept])
        middle = [gone.sum(0) if total else gone.mean(0)] if fused else []
        torch.testing.assert_close(image, torch.stack([table[0], *middle, *(table[1 + n] for n in kept)]))


def test_z_order_runs_are_compact():
    order = z_order((8, 8), torch.device("cpu")).argsort()
    for run in order.view(4, 16):
        assert (run // 8).max() - (run // 8).min() == 3
        assert (run % 8).max() - (run % 8).min() == 3
    assert sorted(z_order((5, 7), torch.device("cpu")).argsort().tolist()) == list(range(35))


@pytest.mark.parametrize(("keep_rate", "published"), [(0.7, 113.3), (0.5, 86.6)])
@pytest.mark.parametrize("fuse", [False, True])
def test_flops_reproduce_the_published_figures(keep_rate, published, fuse):
    model = timm.create_model("deit_small_patch16_224").eval()
    sparse = sparsify(prune_tokens(model, keep_rate=keep_rate, fuse=fuse), SparsifinerConfig.paper(keep_rate=0.25))
    report = sparsifiner.count_flops(sparse, torch.zeros(1, 3, 224, 224))
    assert report.mhsa_macs / 1e6 == pytest.approx(published, rel=0.03)
    assert report.layers[3].token_scores == 384 * 197
    assert report.layers[4].token_scores == 0
    assert [layer.num_tokens for layer in report.layers[2:6]] == [
        197,
        197,
        *[1 + fuse + math.ceil(196 * keep_rate)] * 2,
    ]


def test_every_product_of_a_pruned_model_is_counted(tiny_vit, images):
    from torch.utils.flop_counter import FlopCounterMode

    x = images(2, 3, 32, 32)
    pruned = prune_tokens(tiny_vit(depth=3), layers=(0, 1))
    for model in (pruned, sparsify(pruned, PAPER)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        assert sparsifiner.count_flops(model, x).total_macs * 2 * 2 == counter.get_total_flops()


@pytest.mark.parametrize("config", [None, PAPER, TILES])
def test_save_copy_and_pickle(images, tmp_path: Path, config):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5).eval()
    pruned = prune_tokens(model, keep_rate=0.6, layers=(0, 1), fuse=True)
    if config is not None:
        pruned = sparsify(pruned, config)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        y = pruned(x)
        sparsifiner.save_pretrained(pruned, tmp_path)
        back = sparsifiner.from_pretrained(tmp_path)
        for other in (back, copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
            assert torch.equal(other(x), y)
    assert sparsifiner.token_pruning(back) == sparsifiner.token_pruning(pruned)
    with pytest.raises(ValueError, match="neither sparse nor pruned"):
        sparsifiner.save_pretrained(model, tmp_path)


def test_files_from_before_pruning_load_and_broken_settings_are_refused(images, tmp_path: Path):
    model = sparsify(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval())
    sparsifiner.save_pretrained(model, tmp_path)
    file, x = tmp_path / "sparsifiner.json", images(1, 3, 64, 64)
    written = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in written.items() if k != "token_pruning"} | {"format": 1}))
    assert torch.equal(sparsifiner.from_pretrained(tmp_path)(x), model(x))
    file.write_text(json.dumps(written | {"token_pruning": {"rate": 0.5}}))
    with pytest.raises(ValueError, match="token pruning needs keep_rate, layers and fuse"):
        sparsifiner.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [None, PAPER, TILES])
def test_pruning_can_be_undone_in_either_order(tiny_vit, images, config):
    model, x = tiny_vit(), images(2, 3, 32, 32)
    whole = model if config is None else sparsify(model, config)
    pruned = prune_tokens(whole, layers=(0,))
    with torch.no_grad():
        assert not torch.equal(pruned(x), whole(x))
        assert torch.equal(unprune_tokens(pruned)(x), whole(x))
        if config is not None:
            assert torch.equal(densify(pruned)(x), prune_tokens(model, layers=(0,))(x))
            assert torch.equal(unprune_tokens(densify(pruned))(x), model(x))
    bare = unprune_tokens(pruned) if config is None else densify(unprune_tokens(pruned))
    assert not bare.patch_embed._forward_hooks
    assert [type(module) for module in bare.modules()] == [type(module) for module in model.modules()]


def test_only_pruned_models_are_pruned(tiny_vit):
    dense = tiny_vit()
    pruned = prune_tokens(dense, keep_rate=0.6, layers=(0,))
    for model in (pruned, sparsify(pruned, TILES), densify(sparsify(pruned, TILES)), copy.deepcopy(pruned)):
        assert is_pruned(model)
        assert sparsifiner.token_pruning(model) == sparsifiner.token_pruning(pruned)
    for model in (dense, sparsify(dense, TILES), unprune_tokens(pruned), merge_tokens(dense, 1)):
        assert not is_pruned(model)
        with pytest.raises(ValueError, match="not the result of prune_tokens"):
            sparsifiner.token_pruning(model)


@pytest.mark.parametrize("config", [None, PAPER, TILES])
def test_training_works_and_recomputed_activations_agree(tiny_vit, images, config):
    model = prune_tokens(tiny_vit(depth=4), keep_rate=0.6, layers=(0, 2), fuse=True)
    if config is not None:
        model = sparsify(model, config)
    x = images(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        own = {n: p.grad for n, p in model.named_parameters() if ".predictor." not in n}
        assert all(grad is not None and grad.isfinite().all() for grad in own.values())
        gradients.append(torch.cat([grad.flatten() for grad in own.values()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_other_image_sizes(tiny_vit, images):
    model = sparsify(prune_tokens(tiny_vit(depth=3, dynamic_img_size=True), layers=(0, 1)), PAPER)
    for size in ((32, 32), (48, 32), (32, 32)):
        model(images(1, 3, *size))
        assert kept_patches(model).shape == (1, math.ceil(0.7**2 * size[0] * size[1] / 16))


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "message"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 56}, {}, "Eva: its rotary embedding"),
        ("resnet18", {}, {}, "ResNet: it is no timm VisionTransformer"),
        ("vit_tiny_patch16_224", {"img_size": 64, "class_token": False, "global_pool": "avg"}, {}, "no class token"),
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_drop_rate": 0.1}, {}, "patch_drop_rate=0"),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4}, {}, "no block 6"),
        ("vit_tiny_patch16_224", {"img_size": 64}, {"layers": (6, 3)}, "rising block numbers"),
        ("vit_tiny_patch16_224", {"img_size": 64}, {"layers": 2}, "rising block numbers such as .*, got 2"),
        ("vit_tiny_patch16_224", {"img_size": 64}, {"keep_rate": 1.5}, "must lie in"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(name, changes, arguments, message):
    model = timm.create_model(name, **changes)
    with pytest.raises(ValueError, match=message) as error:
        prune_tokens(model, **arguments)
    assert "\n" not in str(error.value)


def test_pruning_twice_and_missing_pruning_are_refused(tiny_vit):
    model = tiny_vit()
    with pytest.raises(ValueError, match="not the result of prune_tokens"):
        unprune_tokens(model)
    with pytest.raises(ValueError, match="removed or merged in it already"):
        prune_tokens(prune_tokens(model, layers=(0,)), layers=(1,))


def test_comparisons_patch_by_patch_refuse_a_pruned_model(tiny_vit, images):
    pruned, x = prune_tokens(tiny_vit(), layers=(0,)), images(1, 3, 32, 32)
    with pytest.raises(ValueError, match="fidelity figures compare patch by patch"):
        measure_fidelity(pruned, sparsify(pruned), [x])
    with pytest.raises(ValueError, match="attention maps compare patch by patch"):
        attention_maps(pruned, sparsify(pruned), x)


def test_maps_of_blocks_that_have_lost_tokens_are_refused(tiny_vit, images):
    model, x = tiny_vit(depth=3), images(1, 3, 32, 32)
    # timm would reshape 32 tokens of width 48 to the grid of 64 patches, to a width of 24.
    pruned = prune_tokens(model, keep_rate=0.5, layers=(1,))
    copies = copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))
    with torch.no_grad():
        for reduced in (pruned, *copies, sparsify(pruned, TILES), merge_tokens(model, [0, 32, 0])):
            for call in (
                lambda reduced=reduced: reduced.forward_intermediates(x),
                lambda reduced=reduced: reduced.forward_intermediates(x, [0, -2]),
                lambda reduced=reduced: reduced.get_intermediate_layers(x, reshape=True),
            ):
                with pytest.raises(ValueError, match='has no map of all patches; use output_fmt="NLC"'):
                    call()
            lists = reduced.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
            assert [tuple(tokens.shape) for tokens in lists[1:]] == [(1, 32, 48)] * 2
            assert reduced.get_intermediate_layers(x)[0].shape == (1, 32, 48)
        for whole in (pruned, *copies):
            torch.testing.assert_close(
                whole.forward_intermediates(x, [0])[1][0], model.forward_intermediates(x, [0])[1][0]
            )
        assert unprune_tokens(pruned).forward_intermediates(x)[1][2].shape == (1, 48, 8, 8)


def test_a_wrong_number_of_tokens_is_refused():
    step = pruning_step(PatchGrid((4, 4), (4, 4), 1), 0.5, False)
    with pytest.raises(ValueError, match="token pruning got 12 tokens"):
        step.reduce(torch.zeros(1, 12, 4), torch.zeros(1, 12))


@pytest.mark.parametrize("convert", [prune_tokens, merge_tokens])
def test_a_model_is_its_own_after_an_export(tiny_vit, images, convert):
    settings = {"layers": (0, 1)} if convert is prune_tokens else {"per_layer": 8}
    model, x = convert(tiny_vit(), **settings), images(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.export.export(model, (x,))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # what tracing left behind is no part
            assert torch.equal(twin(x), expected)


def test_a_pruned_model_that_lost_blocks_comes_back(tiny_vit, images, tmp_path):
    x = images(2, 3, 32, 32)
    for cut, left in ((1, (0, 1)), (0, (0,))):
        model = prune_tokens(tiny_vit(depth=3), layers=(0, 1, 2))
        model.prune_intermediate_layers([cut], prune_norm=False, prune_head=False)
        sparsifiner.save_pretrained(model, tmp_path / str(cut))
        back = sparsifiner.from_pretrained(tmp_path / str(cut))
        assert sparsifiner.token_pruning(back).layers == left
        assert torch.equal(back(x), model(x))


def test_block_numbers_may_be_numpys(tiny_vit):
    numpy = pytest.importorskip("numpy")
    assert sparsifiner.token_pruning(prune_tokens(tiny_vit(), layers=numpy.arange(2))).layers == (0, 1)
