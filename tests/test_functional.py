"""Attention of plain q, k, v: equal to PyTorch's at keep rate 1, pure, differentiable, for every layout of tokens."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from sparsifiner import SparsifinerConfig
from sparsifiner.attention import build_predictor
from sparsifiner.errors import SparsifinerError
from sparsifiner.functional import scaled_dot_product_attention
from sparsifiner.geometry.frames import FrameTiling, TokenLayout
from sparsifiner.geometry.tiling import Tiling
from sparsifiner.ops.connectivity import Connectivity
from sparsifiner.ops.tail import group_keys
from sparsifiner.predictors import LowRankConfig, RandomConfig

SPARSE = SparsifinerConfig(mode="sparse")


def tensors(*shape: int, dtype: torch.dtype = torch.float32, number: int = 3) -> tuple[torch.Tensor, ...]:
    return torch.randn(number, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind(0)


layouts = st.builds(
    TokenLayout,
    grid=st.tuples(st.integers(1, 3), st.sampled_from([4, 6, 8, 10]), st.sampled_from([4, 6, 10])),
    num_prefix_tokens=st.integers(0, 2),
    prefix_per_frame=st.integers(0, 2),
    num_suffix_tokens=st.integers(0, 2),
    order=st.sampled_from(["raster", "merge2x2"]),
)


def attention_of(layout: TokenLayout, *qkv: torch.Tensor, **changes):
    return scaled_dot_product_attention(
        *qkv, grid=layout.grid, num_prefix_tokens=layout.num_prefix_tokens, prefix_per_frame=layout.prefix_per_frame,
        num_suffix_tokens=layout.num_suffix_tokens, order=layout.order, **{"config": SPARSE, **changes},
    )  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(layouts, st.sampled_from([1, 2]), st.sampled_from([None, "mask", "bias", "keys"]), st.booleans())
def test_equal_to_pytorchs_at_keep_rate_1(layout, key_heads, kind, spans_frames):
    number = layout.num_tokens
    q, k, v = tensors(2, 2, number, 16, dtype=torch.float64)
    k, v = k[:, :key_heads], v[:, :key_heads]
    generator = torch.Generator().manual_seed(1)
    bias = {
        None: None,
        "mask": torch.rand(2, 1, number, number, generator=generator) < 0.7,
        "bias": torch.randn(2, number, number, generator=generator),
        "keys": torch.rand(2, 1, 1, number, generator=generator) < 0.7,
    }[kind]
    got = attention_of(
        layout, q, k, v, keep_rate=1.0, attn_bias=bias, enable_gqa=True, tile_frames=2 if spans_frames else 1
    )
    mask = bias if bias is None or bias.dtype == torch.bool else bias.double()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert (got - want).abs().max() < 1e-13


@settings(deadline=None, max_examples=15)
@given(layouts)
def test_any_layout_gives_what_the_sorted_tokens_give(layout):
    qkv = tensors(1, 2, layout.num_tokens, 16)
    got, connectivity = attention_of(layout, *qkv, keep_rate=0.2, return_connectivity=True)
    ordered = TokenLayout(layout.grid, layout.num_front_tokens)
    want, other = attention_of(ordered, *(layout.sort(x, 2) for x in qkv), keep_rate=0.2, return_connectivity=True)
    assert torch.equal(got, layout.unsort(want, 2))
    assert torch.equal(connectivity.indices, other.indices)


def test_the_order_of_the_qwen_towers():
    grid = torch.arange(16).view(4, 4)
    tokens = torch.stack([grid[:2, :2], grid[:2, 2:], grid[2:, :2], grid[2:, 2:]]).flatten()
    layout = TokenLayout((1, 4, 4), order="merge2x2")
    assert torch.equal(layout.sort(tokens, 0), torch.arange(16))
    assert torch.equal(layout.unsort(torch.arange(16), 0), tokens)


def test_prefix_tokens_of_every_frame_are_sorted_to_the_front():
    layout = TokenLayout((2, 1, 3), prefix_per_frame=2, num_suffix_tokens=1)
    names = ["a", "b", "0", "1", "2", "c", "d", "3", "4", "5", "z"]
    order = layout.sort(torch.arange(11), 0)
    assert [names[i] for i in order] == ["a", "b", "c", "d", "z", "0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 5, 7), (4, 8, 8)])
@pytest.mark.parametrize("tile_frames", [1, 2])
def test_boxes_hold_every_patch_once_and_cross_no_frame_unasked(grid, tile_frames):
    if tile_frames > grid[0]:
        with pytest.raises(SparsifinerError, match="tiles of 2 frames do not fit into 1"):
            FrameTiling.of(grid, (4, 4), 2, tile_frames)
        return
    tiling = FrameTiling.of(grid, (4, 4), 2, tile_frames)
    tokens = tiling.tokens(torch.device("cpu"))
    inside = tokens >= 0
    assert tokens[inside].sort().values.tolist() == list(range(2, tiling.num_tokens))
    frame, place = (tokens - 2) // (grid[1] * grid[2]), (tokens - 2) % (grid[1] * grid[2])
    for members, which, where in zip(inside, frame, place, strict=True):
        assert len(which[members].unique()) <= tile_frames
        rows, columns = where[members] // grid[2], where[members] % grid[2]
        assert rows.max() // 4 == rows.min() // 4
        assert columns.max() // 4 == columns.min() // 4
    patches = torch.arange(tiling.num_patches)
    assert torch.equal(tokens.flatten()[tiling.slots(tokens.device)], patches + 2)
    assert torch.equal(tiling.slots(tokens.device) // tokens.shape[1], tiling.tile_of_patch(tokens.device))
    values = torch.randn(tiling.num_patches, 3)
    sums = torch.zeros(tiling.num_tiles, 3).index_add(0, tiling.tile_of_patch(tokens.device), values)
    assert torch.allclose(tiling.sum_patches(values), sums, atol=1e-5)
    assert torch.allclose(tiling.mean_patches(values), sums / tiling.sizes(tokens.device)[:, None], atol=1e-5)


def test_one_frame_of_boxes_is_the_tiling_of_an_image():
    boxes, tiles = FrameTiling.of((1, 6, 9), (4, 4), 3), Tiling((6, 9), (4, 4), 3)
    device = torch.device("cpu")
    for name in ("tokens", "tile_of_patch", "sizes", "slots"):
        assert torch.equal(getattr(boxes, name)(device), getattr(tiles, name)(device))


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_groups_of_the_tail_stay_within_a_frame_and_count_every_key_that_was_not_kept(refine, backend):
    blocks = FrameTiling.of((3, 5, 6), (4, 4), 2)
    k, v = tensors(2, 2, 92, 16, number=2)
    groups = group_keys(k, v, blocks, refine, backend)
    frame = (groups.member // 4).unflatten(2, (3, 30))
    assert torch.equal(frame, torch.arange(3, dtype=torch.int32)[:, None].expand_as(frame))
    kept = torch.rand(2, 2, 7, 92, generator=torch.Generator().manual_seed(2)).argsort(-1)[..., :20].to(torch.int32)
    counts = groups.log_counts(Connectivity(Tiling((15, 6), (1, 1), 2), kept), backend).exp()
    for image, head, tile in itertools.product(range(2), range(2), range(7)):
        unkept = set(range(90)) - {token - 2 for token in kept[image, head, tile].tolist()}
        members = groups.member[image, head][sorted(unkept)]
        want = torch.bincount(members, minlength=blocks.num_tiles)
        assert torch.equal(counts[image, head, tile].round().long(), want)
    one_frame = group_keys(k[:, :, 32:62], v[:, :, 32:62], Tiling((5, 6), (4, 4)), refine, backend)
    assert torch.equal(groups.k[:, :, 4:8], one_frame.k)
    assert torch.equal(groups.v[:, :, 4:8], one_frame.v)
    assert torch.equal(groups.distance[:, :, 32:62], one_frame.distance)
    assert torch.allclose(groups.distance[:, :, :2], v[:, :, :2].norm(dim=-1))


def test_frames_and_their_backends_agree():
    qkv = tensors(2, 2, 3 * (40 + 2), 16)
    native, reference, gather = (
        scaled_dot_product_attention(
            *qkv, grid=(3, 5, 8), prefix_per_frame=2, config=SPARSE, keep_rate=0.2, backend=backend
        )
        for backend in ("auto", "reference", "gather")
    )
    assert (gather - reference).abs().max() < 1e-5
    # Some levels of the compiled kernels round the scores, and keep another of two nearly equal keys.
    assert (native - reference).norm() < 0.1 * reference.norm()


def test_an_image_does_not_depend_on_its_neighbours():
    qkv = tensors(3, 2, 2 * 40, 16)
    both = scaled_dot_product_attention(*qkv, grid=(2, 5, 8), config=SPARSE)
    alone = scaled_dot_product_attention(*(x[1:2] for x in qkv), grid=(2, 5, 8), config=SPARSE)
    assert torch.equal(both[1:2], alone)


@pytest.mark.parametrize("layout", [TokenLayout((1, 4, 5), 1), TokenLayout((2, 4, 4), prefix_per_frame=1)])
def test_gradients(layout):
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, layout.num_tokens, 4, dtype=torch.float64))
    bias = torch.randn(1, 1, layout.num_tokens, layout.num_tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_of(layout, q, k, v, keep_rate=0.5), (q, k, v), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda v, bias: attention_of(layout, q, k, v, keep_rate=1.0, attn_bias=bias), (v, bias), fast_mode=True
    )


@pytest.mark.parametrize("layout", [TokenLayout((1, 6, 6), 1), TokenLayout((2, 4, 6), prefix_per_frame=1)])
def test_compiles_into_one_graph(layout):
    qkv = tensors(2, 2, layout.num_tokens, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *qkv: attention_of(layout, *qkv, keep_rate=0.2), fullgraph=True)
    with torch.no_grad():
        assert (compiled(*qkv) - attention_of(layout, *qkv, keep_rate=0.2)).abs().max() < 1e-5


def test_dense_where_that_is_faster_and_says_so():
    q, k, v = tensors(1, 2, 65, 16)
    asked = dict(num_prefix_tokens=1, return_connectivity=True)
    out, connectivity = scaled_dot_product_attention(q, k, v, grid=(8, 8), **asked)
    assert connectivity is None
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    thin, nothing = scaled_dot_product_attention(q, k, v, grid=(1, 64), **asked)
    assert nothing is None
    assert torch.equal(thin, out)


def test_masked_keys_get_no_weight():
    q, k, v = tensors(1, 2, 64, 16)
    keys = torch.arange(64) < 32  # whole blocks of the tail; one that is masked in part has no weight
    out = scaled_dot_product_attention(q, k, v, grid=(8, 8), config=SPARSE, attn_bias=keys[None, None, None])
    v[:, :, 32:] += 100.0
    again = scaled_dot_product_attention(q, k, v, grid=(8, 8), config=SPARSE, attn_bias=keys[None, None, None])
    assert out.isfinite().all()
    assert (out - again).abs().max() < 1e-5


def test_a_predictor_of_ones_own():
    config = SPARSE.replace(predictor=LowRankConfig())
    predictor = build_predictor(config, num_heads=2, head_dim=16, grid=(8, 8), num_prefix_tokens=1)
    q, k, v = tensors(1, 2, 65, 16)
    out, connectivity = scaled_dot_product_attention(
        q, k, v, grid=(8, 8), num_prefix_tokens=1, config=config, predictor=predictor, return_connectivity=True
    )
    assert connectivity.num_keys == 1 + 7
    random = scaled_dot_product_attention(
        q, k, v, grid=(8, 8), num_prefix_tokens=1, config=SPARSE.replace(predictor=RandomConfig())
    )
    assert not torch.equal(out, random)


Q = torch.randn(2, 4, 65, 16)
BAD = {
    "a 9x8 grid and 1 other tokens are 73": dict(grid=(9, 8), num_prefix_tokens=1),
    "grid must be the rows and columns": dict(grid=64),
    "num_prefix_tokens must be": dict(grid=(8, 8), num_prefix_tokens=-1),
    "order 'snake' is unknown": dict(grid=(8, 8), num_prefix_tokens=1, order="snake"),
    "needs even numbers of rows and columns, got 13x5": dict(grid=(13, 5), order="merge2x2"),
    "enable_gqa=True shares a key head": dict(grid=(13, 5), key=Q[:, :2], value=Q[:, :2]),
    "key has 2 heads and value 4": dict(grid=(13, 5), key=Q[:, :2], enable_gqa=True),
    "must be a multiple of the 3 of key": dict(grid=(13, 5), key=Q[:, :3], value=Q[:, :3], enable_gqa=True),
    "key must have shape": dict(grid=(13, 5), key=Q[:, :, :64]),
    "value must be torch.float32": dict(grid=(13, 5), value=Q.double()),
    "attn_bias must have a shape that broadcasts": dict(grid=(13, 5), attn_bias=Q),
    "attn_bias must be a boolean mask": dict(grid=(13, 5), attn_bias=torch.ones(65, 65, dtype=torch.int32)),
    "give one keep_rate": dict(grid=(13, 5), config=SparsifinerConfig(keep_rate=(0.1, 0.2))),
    "predictor 'lowrank' has weights": dict(grid=(13, 5), config=SparsifinerConfig(predictor="lowrank")),
    "keep_rate must lie in": dict(grid=(13, 5), keep_rate=0.0),
    "config must be a SparsifinerConfig": dict(grid=(13, 5), config="auto"),
    "there is no such backend": dict(grid=(13, 5), config=SPARSE, backend="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message):
    arguments = {"query": Q, "key": Q, "value": Q, **BAD[message]}
    with pytest.raises(SparsifinerError, match=message) as raised:
        scaled_dot_product_attention(**arguments)
    assert "\n" not in str(raised.value)
