"""The groups of the tail: Lloyd's algorithm from blocks of the grid, in torch and in the compiled kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import EXACT_LEVELS, LEVELS
from torch import Tensor

import sparsifiner
from sparsifiner import Connectivity, SparsifinerConfig, Tiling, sparse_attention
from sparsifiner.attention import AttentionInputs, tail_groups
from sparsifiner.config import TailConfig
from sparsifiner.convert import always_sparse
from sparsifiner.ops import count_unkept, cpu, group_patches, pool_groups
from sparsifiner.ops.group_patches import blocks_around, grouping_macs
from sparsifiner.ops.tail import group_keys

pytestmark = pytest.mark.usefixtures("two_threads")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)

block_grids = st.builds(
    lambda rows, columns, block, prefix: Tiling((rows, columns), (min(block[0], rows), min(block[1], columns)), prefix),
    rows=st.integers(1, 13),
    columns=st.integers(1, 13),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    prefix=st.integers(0, 5),
)


def lloyd(patches: Tensor, blocks: Tiling, steps: int) -> tuple[Tensor, Tensor]:
    """Groups ``[n]`` and means ``[P, D]`` of one head ``[n, D]``, by loops."""
    own = blocks.tile_of_patch(CPU).tolist()
    around = blocks_around(blocks, CPU).tolist()
    member = list(own)
    means = [patches[[i for i, m in enumerate(member) if m == number]].mean(0) for number in range(blocks.num_tiles)]
    for _ in range(steps):
        for i, start in enumerate(own):
            near = [number for number in around[start] if number >= 0]
            member[i] = min(near, key=lambda number: (patches[i] - means[number]).square().sum().item())
        for number in range(blocks.num_tiles):
            members = [i for i, m in enumerate(member) if m == number]
            if members:
                means[number] = patches[members].mean(0)
    return torch.tensor(member), torch.stack(means)


@given(blocks=block_grids, steps=st.integers(1, 3), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_groups_are_those_of_lloyds_algorithm(blocks: Tiling, steps: int, seed: int) -> None:
    x = torch.randn(2, 2, blocks.num_tokens, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    member, means, distance = group_patches(x, blocks, steps)
    prefix = blocks.num_prefix_tokens
    for b in range(2):
        for h in range(2):
            patches = x[b, h, prefix:]
            want_member, want_means = lloyd(patches, blocks, steps)
            assert torch.equal(member[b, h].long(), want_member)
            torch.testing.assert_close(means[b, h], want_means)
            torch.testing.assert_close(distance[b, h, prefix:], (patches - want_means[want_member]).norm(dim=-1))
    torch.testing.assert_close(distance[:, :, :prefix], x[:, :, :prefix].norm(dim=-1))
    pooled, filled = pool_groups(x, member, blocks), F.one_hot(member.long(), blocks.num_tiles).any(2)
    torch.testing.assert_close(pooled[filled], means[filled])
    assert not pooled[~filled].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "block", "prefix"),
    [((16, 16), (4, 4), 1), ((13, 18), (4, 8), 5), ((1, 37), (1, 16), 2), ((7, 9), (1, 1), 0), ((5, 5), (5, 5), 1)],
)
def test_kernels_find_the_groups_of_torch(
    level: str, dtype: torch.dtype, grid: tuple[int, int], block: tuple[int, int], prefix: int
) -> None:
    blocks = Tiling(grid, block, prefix)
    packed = torch.randn(2, blocks.num_tokens, 2, 3, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    x, other = packed.permute(2, 0, 3, 1, 4).unbind(0)  # rows of a packed projection
    with cpu.force_level(level):
        member, means, distance = group_patches(x, blocks, 1)
        pooled = pool_groups(other, member, blocks)
    exact = x.double()
    want = group_patches(exact, blocks, 1)
    # A patch between two means may join either, to within the rounding of float32 sums.
    start = blocks.mean_patches(exact[:, :, prefix:])
    gap = (_square(exact, start, member, prefix) - _square(exact, start, want[0], prefix)).abs()
    assert gap.max() < 1e-4
    assert (member == want[0]).double().mean() > 0.999
    exact_means = pool_groups(exact, member, blocks)
    filled = F.one_hot(member.long(), blocks.num_tiles).any(2)
    rounding = 4 * torch.finfo(dtype).eps
    assert (means.double() - exact_means)[filled].abs().max() <= rounding * exact.abs().max()
    assert (pooled.double() - pool_groups(other.double(), member, blocks)).abs().max() <= rounding * other.abs().max()
    rows = exact_means.gather(2, member.long()[..., None].expand(-1, -1, -1, 48))
    torch.testing.assert_close(
        distance[:, :, prefix:].double(), (exact[:, :, prefix:] - rows).norm(dim=-1), rtol=1e-4, atol=1e-4
    )
    for steps in (0, 1, 4):
        with cpu.force_level(level):
            groups = group_keys(x, x, blocks, steps)
        assert groups.distance.isfinite().all()
        assert groups.k.isfinite().all()


def _square(x: Tensor, means: Tensor, member: Tensor, prefix: int) -> Tensor:
    rows = means.gather(2, member.long()[..., None].expand(-1, -1, -1, x.shape[3]))
    return (x[:, :, prefix:] - rows).square().sum(-1)


@pytest.mark.parametrize("native", [True, False])
def test_log_counts_of_groups(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(cpu.binding, "_missing", "left out by a test")
    elif cpu.why_missing() is not None:
        pytest.skip(str(cpu.why_missing()))
    tiling = Tiling((9, 10), (4, 4), 2)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 92, 16, generator=g)
    indices = torch.rand(2, 3, tiling.num_tiles, 92, generator=g).argsort(-1)[..., :30].to(torch.int32)
    bias = torch.zeros(indices.shape).masked_fill(torch.rand(indices.shape, generator=g) < 0.4, float("-inf"))
    groups = group_keys(x, x, tiling.regions((3, 4)), 2)
    counts = groups.log_counts(Connectivity(tiling, indices, bias)).exp()
    listed = torch.zeros(2, 3, tiling.num_tiles, 92).scatter_(-1, indices.long(), (bias == 0).float())
    left = (1 - listed[..., 2:]) @ F.one_hot(groups.member.long(), groups.blocks.num_tiles).float()
    torch.testing.assert_close(counts, left)
    with pytest.raises(ValueError, match="member must"):
        count_unkept(indices, None, groups.blocks, groups.member[:, :2])


@pytest.mark.parametrize("autocast", [False, True])
def test_training_groups_as_inference_does(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 also under autocast, in torch and, where they are, by the kernels, which know no gradients."""
    blocks = Tiling((9, 10), (4, 4), 1)
    x = torch.randn(2, 3, 91, 16, generator=torch.Generator().manual_seed(0))
    want = group_patches(x, blocks, 2)
    for native in (True, False):
        if not native:
            monkeypatch.setattr(cpu.binding, "_missing", "left out by a test")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            member, means, distance = group_patches(x.clone().requires_grad_(), blocks, 2)
        assert torch.equal(member, want[0])
        assert means.requires_grad
        assert not distance.requires_grad
        torch.testing.assert_close(means, want[1])
        torch.testing.assert_close(distance, want[2])


def test_tensors_without_data_have_groups_of_the_right_shape() -> None:
    blocks = Tiling((9, 10), (4, 4), 1)
    shapes = [list(found.shape) for found in group_patches(torch.empty(2, 3, 91, 16, device="meta"), blocks, 2)]
    assert shapes == [[2, 3, 90], [2, 3, 9, 16], [2, 3, 91]]


def test_gradients_flow_through_the_means_of_groups() -> None:
    blocks = Tiling((5, 6), (2, 3), 1)
    k, v = torch.randn(2, 1, 2, 31, 4, dtype=torch.float64, requires_grad=True).unbind(0)

    def pooled(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        groups = group_keys(k, v, blocks, 2)
        assert not groups.distance.requires_grad
        return groups.k, groups.v

    assert torch.autograd.gradcheck(pooled, (k.detach().requires_grad_(), v.detach().requires_grad_()))


def test_an_edge_inside_a_block_is_followed() -> None:
    # Two flat regions whose border crosses blocks: regrouped, every group lies on one side and the tail is exact.
    tiling = Tiling((8, 8), (4, 4))
    side = (torch.arange(8) >= 3).repeat(8)
    v = torch.where(side[:, None], 1.0, -1.0).expand(1, 1, 64, 16).clone()
    q, k = torch.zeros(2, 1, 1, 64, 16).unbind(0)
    blocks = tiling.regions((4, 2))
    connectivity = Connectivity(tiling, torch.zeros(1, 1, 4, 1, dtype=torch.int32))
    whole = group_keys(k, v, blocks)
    assert whole.distance.max() > 1
    regrouped = group_keys(k, v, blocks, 2)
    assert regrouped.distance.max() == 0
    out = sparse_attention(q, k, v, connectivity, tail=regrouped.tail(connectivity))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_multiply_adds_of_the_groups_are_counted() -> None:
    blocks = Tiling((9, 10), (4, 4), 1)
    pairs = (blocks_around(blocks, CPU) >= 0).sum(1)[blocks.tile_of_patch(CPU)].sum().item()
    assert grouping_macs(blocks, 32, 3) == 3 * 32 * (pairs + 90)
    assert grouping_macs(blocks, 32, 0) == 0


def test_layers_with_an_attention_bias_pool_whole_blocks() -> None:
    k = torch.randn(1, 2, 17, 16)
    config, tiling = SparsifinerConfig(tail=(2, 2)), Tiling((4, 4), (4, 4), 1)
    inputs = AttentionInputs(k, k, k, tiling, 0.25)
    assert tail_groups(config.tail, inputs).member is not None
    assert tail_groups(config.tail, inputs.replace(attn_bias=torch.zeros(1, 2, 17, 17))).member is None
    assert tail_groups(None, inputs) is None


def test_regrouping_brings_a_real_model_closer() -> None:
    # The built-in model on a bundled photograph: a quarter less error at the same number of keys.
    from sparsifiner._utils.photos import bundled_photos, preprocess
    from sparsifiner.measure.fidelity import compare_features, final_features
    from sparsifiner.models import load_model

    model = load_model("builtin", img_size=(336, 336))
    x = preprocess(model, (336, 336))(bundled_photos(1).photos[0].image)[None]
    dense = final_features(model, x)
    errors = []
    for steps in (0, 2):
        sparse = sparsifiner.sparsify(model, SparsifinerConfig(keep_rate=0.1, tail=TailConfig(refine=steps)))
        with always_sparse(sparse):
            errors.append(compare_features("", dense, final_features(sparse, x)).patch_l2)
    assert errors[1] < 0.85 * errors[0]


def test_the_torch_path_and_the_kernels_agree_on_a_model(tiny_vit, images, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.why_missing() is not None:
        pytest.skip(str(cpu.why_missing()))
    sparse = sparsifiner.sparsify(tiny_vit(), SparsifinerConfig(keep_rate=0.2, mode="sparse")).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad(), cpu.force_level(EXACT_LEVELS[-1]):  # elsewhere scores are rounded, and keys with them
        want = sparse(x)
        monkeypatch.setattr(cpu.binding, "_missing", "left out by a test")
        torch.testing.assert_close(sparse(x), want, rtol=1e-3, atol=1e-4)


def test_library_contracts() -> None:
    if cpu.why_missing() is not None:
        pytest.skip(str(cpu.why_missing()))
    ops, checks = torch.ops.sparsifiner, ("test_schema", "test_faketensor")
    x = torch.randn(1, 2, 91, 32)
    member, _, _ = ops.group_patches(x, 9, 10, 4, 4, 1, 2, "native")
    torch.library.opcheck(ops.group_patches, (x, 9, 10, 4, 4, 1, 2, "native"), test_utils=checks)
    torch.library.opcheck(ops.pool_groups, (x, member, 9, 10, 4, 4, 1, "native"), test_utils=checks)
    indices = torch.zeros(1, 2, 9, 3, dtype=torch.int32)
    torch.library.opcheck(ops.count_unkept, (indices, None, member, 9, 10, 4, 4, 1, "native"), test_utils=checks)
    with pytest.raises(ValueError, match="x must have 91 tokens"):
        ops.group_patches(x[:, :, :80], 9, 10, 4, 4, 1, 2, "native")
    with pytest.raises(ValueError, match="member must be int32"):
        ops.pool_groups(x, member.long(), 9, 10, 4, 4, 1, "native")
    member[0, 1, 89] = 0  # the last patch, in the group of the first block
    with pytest.raises(IndexError, match="member: patch 89 is in group 0, which is none of those around its block"):
        ops.pool_groups(x, member, 9, 10, 4, 4, 1, "native")
    assert count_unkept(indices, None, Tiling((9, 10), (4, 4), 1)).isfinite().all()
