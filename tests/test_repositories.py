"""Models of repositories of their own: attention matched by structure, checked by numbers, or named by its user."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import lively
from homes import pixels
from repositories import Block, Embed, HalvesAttention, MultiView, PackedAttention, PackedViT, RotatedViT
from torch import nn

import sparsifiner
from sparsifiner import GridSource, SparsifinerConfig
from sparsifiner.attention.adapters import registry
from sparsifiner.errors import SparsifinerError

SPARSE = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(2, 2), tail=(2, 2))
MODELS = {
    "block chunks": (lambda: PackedViT(2), (2, 3, 48, 80), 4),
    "registers": (lambda: PackedViT(1, 3), (2, 3, 48, 80), 4),
    "rotated": (RotatedViT, (2, 3, 48, 80), 2),
    "several views": (MultiView, (2, 3, 3, 48, 80), 8),
    "one view": (MultiView, (2, 1, 3, 48, 80), 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_dense_at_keep_rate_1_and_dense_again(name):
    build, size, layers = MODELS[name]
    model, x = lively(build()), pixels(*size)
    with torch.no_grad():
        dense = model(x)
        sparse = sparsifiner.sparsify(model, SPARSE)
        assert list(sparse.state_dict()) == list(model.state_dict())
        assert len(sparsifiner.conversion(sparse).swapped) == layers
        with sparsifiner.record(sparse) as seen:
            pruned = sparse(x)
        assert all(record.connectivity.tiling.image_grid == (6, 10) for record in seen.values())
        assert (pruned - dense).norm() > 1e-4 * dense.norm()
        sparsifiner.set_keep_rate(sparse, 1.0)
        assert (sparse(x) - dense).norm() < 1e-5 * dense.norm()
        back = sparsifiner.densify(copy.deepcopy(sparse))
        assert torch.equal(back(x), dense)
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert str(back) == str(model)


def test_tiles_of_several_views_cross_none():
    sparse = sparsifiner.sparsify(lively(MultiView()), SPARSE)
    with torch.no_grad(), sparsifiner.record(sparse) as seen:
        sparse(pixels(1, 3, 3, 48, 80))
    across = seen["global_blocks.0.attn"].connectivity.tiling
    assert (across.num_frames, across.num_prefix_tokens) == (3, 12)
    assert seen["frame_blocks.0.attn"].connectivity.tiling.num_prefix_tokens == 4
    assert seen["patch_embed.blocks.0.0.attn"].connectivity.tiling.num_prefix_tokens == 3


def test_a_training_step_and_a_compiled_pass():
    sparse = sparsifiner.sparsify(lively(RotatedViT()), SPARSE)
    x = pixels(2, 3, 48, 80)
    torch._dynamo.reset()
    with torch.no_grad():
        assert (torch.compile(sparse, backend="aot_eager")(x) - sparse(x)).abs().max() < 1e-4
    sparse.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())


class ScaledAttention(PackedAttention):
    """Looks like attention with one qkv, and is something else."""

    def forward(self, x, attn_bias=None):
        return super().forward(x) * 1.01


class MaskedAttention(PackedAttention):
    def forward(self, x, key_lengths=None):
        return super().forward(x)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda: ScaledAttention(32, 2), r"on random tokens its output is not that of softmax\(q k\^T\) v \(relative"),
        (lambda: PackedAttention(32, 2, causal=True), r"on random tokens its output is not"),
        (lambda: MaskedAttention(32, 2), "its forward takes key_lengths"),
    ],
)
def test_what_only_looks_alike_is_refused_with_the_reason(attention, reason):
    model = PackedViT(1)
    for block in model.blocks[0]:
        block.attn = lively(attention())
    with pytest.raises(SparsifinerError, match=f"nothing to convert in PackedViT: 4 .*{reason}"):
        sparsifiner.sparsify(model, SPARSE)


def test_the_check_leaves_modes_and_random_numbers_alone():
    model = lively(PackedViT(1)).train()
    model.blocks[0][1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sparsifiner.sparsify(model, SPARSE)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes


class Tokens(nn.Module):
    """A model without any name that is known: two convolutions that could make patches, five learned tokens."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.conv_proj, self.preview = Embed(32).proj, nn.Conv2d(3, 4, 16, stride=16)
        self.query = nn.Parameter(torch.zeros(1, 5, 32))
        self.layers = nn.ModuleList([Block(32, attention)])

    def forward(self, x):
        x = torch.cat([self.query.expand(len(x), -1, -1), self.conv_proj(x).flatten(2).mT], 1)
        return self.layers[0](x)


def test_the_grid_from_a_convolution_that_the_user_names():
    model, x = lively(Tokens(HalvesAttention(32, 2))), pixels(2, 3, 48, 80)
    with pytest.raises(SparsifinerError, match=r"the patch grid is unknown; pass grid=GridSource.from_conv\("):
        sparsifiner.sparsify(model, SPARSE)
    sparse = sparsifiner.sparsify(model, SPARSE, grid=GridSource.from_conv("conv_proj"), num_prefix_tokens=5)
    sparsifiner.set_keep_rate(sparse, 1.0)
    with torch.no_grad():
        assert (sparse(x) - model(x)).norm() < 1e-5 * model(x).norm()
    wrong = sparsifiner.sparsify(model, SPARSE, grid=GridSource.from_conv("conv_proj"))
    with pytest.raises(SparsifinerError, match="got 65 tokens, .* 6x10 .* 0 prefix tokens.*pass num_prefix_tokens"):
        wrong(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(grid="conv_proj"), "grid must be a GridSource, such as"),
        (dict(grid=GridSource("stem")), "'stem' is not there, its patch convolutions are: conv_proj, preview"),
        (dict(grid=GridSource("layers")), "'layers' is a ModuleList, its patch"),
        (dict(num_prefix_tokens=5), "num_prefix_tokens goes with grid="),
        (dict(grid=GridSource("conv_proj"), num_prefix_tokens=-1), "num_prefix_tokens must be"),
    ],
)
def test_a_wrong_grid_is_one_line(arguments, message):
    with pytest.raises(SparsifinerError, match=message):
        sparsifiner.sparsify(Tokens(HalvesAttention(32, 2)), SPARSE, **arguments)


class GatedAttention(nn.Module):
    """No structure that is known: separate projections of unlike names, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.to_q, self.to_kv, self.gate = 2, nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * self.gate(x).sigmoid()


def test_an_attention_class_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    @sparsifiner.register_attention(GatedAttention)
    class SparseGatedAttention:
        head_dim, scale = 16, 0.25

        def project(self, x):
            return (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))

        def merge(self, x, out):
            return out * self.gate(x).sigmoid()

    model, x = lively(Tokens(GatedAttention())), pixels(2, 3, 64, 64)
    source = dict(grid=GridSource.from_conv("conv_proj"), num_prefix_tokens=5)
    sparse = sparsifiner.sparsify(model, SPARSE.replace(keep_rate=1.0), **source)
    assert isinstance(sparse.layers[0].attn, (SparseGatedAttention, GatedAttention))
    with torch.no_grad():
        assert (sparse(x) - model(x)).norm() < 1e-5 * model(x).norm()
        assert torch.equal(sparsifiner.densify(sparse)(x), model(x))


def test_register_attention_says_what_it_needs():
    with pytest.raises(SparsifinerError, match="Half needs the methods project .* it lacks merge"):

        @sparsifiner.register_attention(GatedAttention)
        class Half:
            def project(self, x): ...

    class Whole:
        def project(self, x): ...
        def merge(self, x, out): ...

    with pytest.raises(SparsifinerError, match="needs the class of a module, got 'GatedAttention'"):
        sparsifiner.register_attention("GatedAttention")(Whole)
