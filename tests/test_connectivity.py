"""Tilings of any grid, the tail's exact counts, and masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner import Connectivity, Tiling
from sparsifiner.ops import count_unkept
from sparsifiner.ops.tail import group_keys

CPU = torch.device("cpu")
tilings = st.builds(
    lambda rows, columns, height, width, prefix: Tiling(
        (rows, columns), (min(height, rows), min(width, columns)), prefix
    ),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
)


@given(tiling=tilings)
@settings(max_examples=80, deadline=None)
def test_every_patch_lies_in_exactly_one_tile(tiling: Tiling) -> None:
    tokens = tiling.tokens(CPU)
    assert tokens.shape == (tiling.num_tiles, tiling.tile_size)
    real = tokens[tokens >= 0]
    assert sorted(real.tolist()) == list(range(tiling.num_prefix_tokens, tiling.num_tokens))
    tile_of = tiling.tile_of_patch(CPU)
    for tile, row in enumerate(tokens.tolist()):
        inside = [token - tiling.num_prefix_tokens for token in row if token >= 0]
        assert tile_of[inside].tolist() == [tile] * len(inside)
        ys, xs = [p // tiling.grid[1] for p in inside], [p % tiling.grid[1] for p in inside]
        assert len(inside) == (max(ys) - min(ys) + 1) * (max(xs) - min(xs) + 1)  # a full rectangle
    assert tiling.sizes(CPU).tolist() == [(row >= 0).sum().item() for row in tokens]


@given(tiling=tilings)
@settings(max_examples=60, deadline=None)
def test_pooling_equals_a_mean_over_the_members(tiling: Tiling) -> None:
    x = torch.randn(2, tiling.num_patches, 3, dtype=torch.float64)
    want = torch.stack([x[:, tiling.tile_of_patch(CPU) == tile].mean(1) for tile in range(tiling.num_tiles)], dim=1)
    torch.testing.assert_close(tiling.mean_patches(x), want)
    torch.testing.assert_close(tiling.sum_patches(x), want * tiling.sizes(CPU)[:, None].double())


@given(tiling=tilings, share=st.floats(0.01, 1.0), padded=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_log_counts_are_exact(tiling: Tiling, share: float, padded: bool, data: st.DataObject) -> None:
    block = (data.draw(st.integers(1, tiling.grid[0])), data.draw(st.integers(1, tiling.grid[1])))
    keys = max(1, int(share * tiling.num_tokens))
    indices = torch.rand(1, 2, tiling.num_tiles, tiling.num_tokens).argsort(-1)[..., :keys].to(torch.int32)
    bias = None
    if padded:
        bias = torch.zeros(indices.shape).masked_fill(torch.rand(indices.shape) < 0.5, float("-inf"))
    connectivity = Connectivity(tiling, indices, bias)
    blocks = tiling.regions(block)
    counts = count_unkept(indices, bias, blocks)
    dropped = ~connectivity.to_mask()[:, :, tiling.num_prefix_tokens :, tiling.num_prefix_tokens :]
    first_patch = tiling.tokens(CPU)[:, 0].long() - tiling.num_prefix_tokens
    for number in range(blocks.num_tiles):
        members = blocks.tile_of_patch(CPU) == number
        want = dropped[:, :, first_patch][..., members].sum(-1).float().log()
        torch.testing.assert_close(counts[..., number], want, rtol=1e-6, atol=0.0)


def test_the_tail_vanishes_when_every_key_is_kept() -> None:
    tiling = Tiling((4, 5), (2, 2), 1)
    indices = torch.arange(21, dtype=torch.int32).expand(1, 1, tiling.num_tiles, 21)
    k = torch.randn(1, 1, 21, 8)
    for steps in (0, 2):
        tail = group_keys(k, k, tiling.regions((2, 3)), steps).tail(Connectivity(tiling, indices))
        assert (tail.bias == float("-inf")).all()


@given(tiling=tilings, keys=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_density_is_that_of_the_mask(tiling: Tiling, keys: int) -> None:
    keys = min(keys, tiling.num_tokens)
    indices = torch.rand(2, 2, tiling.num_tiles, tiling.num_tokens).argsort(-1)[..., :keys].to(torch.int32)
    bias = torch.zeros(indices.shape).masked_fill(torch.rand(indices.shape) < 0.3, float("-inf"))
    for connectivity in (Connectivity(tiling, indices), Connectivity(tiling, indices, bias)):
        assert connectivity.density() == pytest.approx(connectivity.to_mask().float().mean().item(), abs=1e-6)


def test_a_tile_larger_than_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="a 4x4 tile does not fit the 3x8 patch grid; use larger images"):
        Tiling((3, 8), (4, 4))
