"""Groups of patches and of queries in Triton against the float64 references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_interpreter import DTYPES, exactly, run

from sparsifiner import Tiling
from sparsifiner.ops import why_not
from sparsifiner.ops.registry import OPERATIONS, refusal

EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@settings(max_examples=5, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    prefix=st.integers(0, 5),
    width=st.sampled_from([8, 16, 64, 80]),
    steps=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
@example(grid=(9, 10), block=(4, 4), prefix=1, width=16, steps=2, seed=0)
def test_groups_of_patches(
    grid: tuple[int, int], block: tuple[int, int], prefix: int, width: int, steps: int, seed: int
) -> None:
    blocks = Tiling(grid, (min(block[0], grid[0]), min(block[1], grid[1])), prefix)
    numbers = (*blocks.grid, *blocks.tile, prefix)
    g = torch.Generator().manual_seed(seed)
    packed = torch.randn(1, blocks.num_tokens, 3, 2, width, generator=g)
    for dtype in DTYPES:
        x, y, _ = packed.to(dtype).permute(2, 0, 3, 1, 4)
        means = run("pool_blocks", x, *numbers)
        torch.testing.assert_close(means.double(), exactly("pool_blocks", x, *numbers), rtol=0, atol=2 * EPS[dtype])
        distances = run("block_distances", x, *numbers)
        assert distances.dtype == torch.float32
        torch.testing.assert_close(distances.double(), exactly("block_distances", x, *numbers), rtol=1e-5, atol=1e-5)
        member, means, distances = run("group_patches", x, *numbers, steps)
        want = exactly("group_patches", x, *numbers, steps)
        # A patch halfway between two means may join either.
        assert (member == want[0]).double().mean() > 0.98
        if torch.equal(member, want[0]):
            torch.testing.assert_close(means.double(), want[1], rtol=0, atol=2 * EPS[dtype])
            torch.testing.assert_close(distances.double(), want[2], rtol=1e-5, atol=4 * EPS[dtype] * width**0.5)
        pooled = run("pool_groups", y, member, *numbers)
        expected = exactly("pool_groups", y, member, *numbers)
        torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=2 * EPS[dtype])


def test_a_group_that_lost_its_patches_keeps_its_mean() -> None:
    """Every patch of the middle block is nearer to a neighbour's mean."""
    x = torch.zeros(1, 1, 12, 16)
    x[0, 0, :, 0] = torch.tensor([0.0, 0, 0, 0, 0, 2, 0, 2, 2, 2, 2, 2])
    numbers = (1, 12, 1, 4, 0)
    for steps in (1, 2, 3):
        found, expected = run("group_patches", x, *numbers, steps), exactly("group_patches", x, *numbers, steps)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), want.double())
    assert not (run("group_patches", x, *numbers, 1)[0] == 1).any()


@settings(max_examples=8, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    steps=st.integers(0, 3),
    width=st.sampled_from([8, 16, 64, 80]),
    seed=st.integers(0, 2**20),
)
@example(grid=(9, 10), tile=(8, 8), pool=(2, 2), steps=2, width=64, seed=0)
def test_groups_of_queries(
    grid: tuple[int, int], tile: tuple[int, int], pool: tuple[int, int], steps: int, width: int, seed: int
) -> None:
    tiling = Tiling(grid, (min(tile[0], grid[0]), min(tile[1], grid[1])), 1)
    parts = Tiling(tiling.tile, (min(pool[0], tiling.tile[0]), min(pool[1], tiling.tile[1])))
    tokens, start = tiling.tokens(torch.device("cpu")), parts.tile_of_patch(torch.device("cpu")).to(torch.int32)
    q = torch.randn(1, 2, tiling.num_tokens, width, generator=torch.Generator().manual_seed(seed))
    for dtype in DTYPES:
        arguments = (q.to(dtype), tokens, start, parts.num_tiles, steps)
        got, want = run("group_queries", *arguments), exactly("group_queries", *arguments)
        assert got.dtype == dtype
        # A query halfway between two centres may join either. In a border tile several groups can start as copies of
        # the first query, equally near to it.
        whole = (tokens >= 0).all(-1)
        agrees = ((got.double() - want).abs() <= 4 * EPS[dtype]).all(-1)[:, :, whole]
        assert agrees.double().mean() > 0.95 or not whole.any()


@pytest.mark.parametrize(
    ("operation", "arguments", "reason"),
    [
        ("tile_keys", {"pooled": torch.zeros(1, 1, 1, 129, 16)}, "at most 128 pooled queries per tile, not 129"),
        ("pool_blocks", {"x": torch.zeros(1, 1, 4, 16), "block_rows": 20, "block_columns": 20}, "128 patches, not 20"),
        ("topk", {"scores": torch.zeros(3, dtype=torch.float64)}, "in float32, bfloat16 and float16, not in float64"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said_in_words(operation: str, arguments: dict[str, object], reason: str) -> None:
    assert reason in str(refusal(OPERATIONS[operation], "triton", False, arguments))
    assert why_not("triton", torch.zeros(1, 1, 4, 16)) is None
