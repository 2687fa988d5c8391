"""Scores and selection in Triton: exact top-k, the keys of tiles, screened keys, log-counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import DTYPES, exactly, run

from sparsifiner import Tiling
from sparsifiner.errors import SparsifinerError
from sparsifiner.ops.triton import select

# Scores are equal to Triton where they differ by less than a step of its integers; float16 rounds logits, too.
TIE = 2 * 2**-10


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 300),
    count=st.integers(1, 300),
    kind=st.sampled_from(["normal", "ties", "equal", "infinite", "nan"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_topk_is_exact_and_ties_go_to_the_lowest(columns: int, count: int, kind: str, dtype: torch.dtype, seed: int):
    count = min(count, columns)
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, columns, generator=g)
    if kind == "ties":
        scores = scores.round()  # -0 and +0 are equal
    elif kind == "equal":
        scores = torch.full_like(scores, -1e-42)
    elif kind == "infinite":
        scores = scores * torch.inf
    elif kind == "nan":
        scores = scores.where(torch.rand(scores.shape, generator=g) < 0.9, torch.nan).copysign(scores)
    scores = scores.to(dtype)
    got = run("topk", scores, count)
    # torch counts NaN as the highest, whatever its sign, too.
    order = scores.abs().where(scores.isnan(), scores).sort(dim=-1, descending=True, stable=True)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), order.indices[:, :count].sort(-1).values)


def test_rows_that_registers_cannot_hold_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(2, 3, 150, generator=torch.Generator().manual_seed(0)).mul(4).round()
    whole = run("topk", scores, 40)
    monkeypatch.setattr(select, "MOST_IN_REGISTERS", 64)
    assert torch.equal(run("topk", scores, 40), whole)
    assert run("topk", scores, 0).shape == (2, 3, 0)
    with pytest.raises(SparsifinerError, match="0 <= k <= 150"):
        run("topk", scores, 151)


def scores_of(pooled: Tensor, keys: Tensor, weight: Tensor | None, scale: float, by_sum: bool) -> Tensor:
    """Logarithms to the base 2 of the scores, float64 ``[B, H, T, candidates]``."""
    logits = (pooled.double() @ keys.double()[:, :, None].mT * scale).log_softmax(-1)
    merged = logits.logsumexp(3) if by_sum else logits.amax(3)
    merged = merged if weight is None else merged + weight.double().log()[:, :, None]
    return merged / torch.log(torch.tensor(2.0))


@settings(max_examples=8, deadline=None)
@given(
    tiles=st.integers(1, 9),
    groups=st.integers(1, 17),
    num_tokens=st.integers(2, 150),
    first=st.integers(0, 1),
    share=st.floats(0, 1),
    width=st.sampled_from([8, 16, 64, 80, 128]),
    by_sum=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(tiles=5, groups=16, num_tokens=140, first=1, share=0.1, width=64, by_sum=False, weighted=True, seed=0)
@example(tiles=5, groups=4, num_tokens=140, first=1, share=0.1, width=16, by_sum=True, weighted=True, seed=0)
def test_no_key_left_out_beats_a_chosen_one(
    tiles: int, groups: int, num_tokens: int, first: int, share: float, width: int, by_sum: bool, weighted: bool,
    seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 2, tiles, groups, width, generator=g)
    k = torch.randn(1, num_tokens, 2, width, generator=g).transpose(1, 2)
    weight = torch.rand(1, 2, num_tokens - first, generator=g) + 0.01 if weighted else None
    count = 1 + int(share * (num_tokens - first - 1))
    for dtype in DTYPES:
        rounded, keys = pooled.to(dtype), k.to(dtype)
        got = run("tile_keys", rounded, keys, weight, first, count, width**-0.5, by_sum).long()
        assert got.shape == (1, 2, tiles, first + count)
        assert (got[..., :first] == torch.arange(first)).all()
        assert (got.diff(dim=-1) > 0).all()
        scores = scores_of(rounded, keys[:, :, first:], weight, width**-0.5, by_sum)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, got[..., first:] - first, True)
        worst_chosen = scores.masked_fill(~chosen, torch.inf).amin(-1)
        best_left = scores.masked_fill(chosen, -torch.inf).amax(-1)
        assert (worst_chosen >= best_left - TIE).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("where", ["query", "key", "last key"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_concern_their_image_only(where: str, value: float) -> None:
    """A key that is no number is kept, so that attention shows it; other images choose what they choose alone."""
    g = torch.Generator().manual_seed(0)
    pooled, k = torch.randn(3, 1, 3, 2, 16, generator=g), torch.randn(3, 1, 70, 16, generator=g)
    row = {"query": pooled[1, 0, 1, 0], "key": k[1, 0, 5], "last key": k[1, 0, 69]}[where]
    row[7:9] = torch.tensor([value, -value])
    got = run("tile_keys", pooled, k, None, 0, 7, 0.25, False)
    assert torch.equal(got[[0, 2]], run("tile_keys", pooled[[0, 2]], k[[0, 2]], None, 0, 7, 0.25, False))
    assert (got.diff(dim=-1) > 0).all()
    assert ((got >= 0) & (got < 70)).all()
    if where != "query":
        assert (got[1] == {"key": 5, "last key": 69}[where]).any(-1).all()


def test_weights_of_nothing_and_sharp_attention() -> None:
    """A key that costs nothing to drop is dropped; where all the probability is on a few keys, the rest is equal."""
    g = torch.Generator().manual_seed(0)
    pooled, k = torch.randn(1, 1, 4, 4, 16, generator=g), torch.randn(1, 1, 60, 16, generator=g)
    weight = torch.ones(1, 1, 60)
    weight[..., ::2] = 0.0
    assert (run("tile_keys", pooled, k, weight, 0, 30, 0.25, False) % 2 == 1).all()
    sharp = run("tile_keys", 100 * pooled, k, None, 0, 12, 0.25, False)
    best = (pooled @ k[:, :, None].mT).argmax(-1)
    assert (sharp[..., None, :] == best[..., None]).any(-1).all()
    with pytest.raises(SparsifinerError, match="cannot select 61 of 60 keys"):
        run("tile_keys", pooled, k, None, 0, 61, 0.25, False)


def smooth_keys(blocks: Tiling, width: int, dtype: torch.dtype) -> Tensor:
    """Keys whose neighbours resemble each other, ``[1, 2, N, D]``."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, width, -(-blocks.grid[0] // 4), -(-blocks.grid[1] // 4), generator=g)
    patches = torch.nn.functional.interpolate(coarse, size=blocks.grid, mode="bilinear") * 2
    patches = (patches + 0.4 * torch.randn(patches.shape, generator=g)).flatten(2).mT
    return torch.cat([torch.randn(2, blocks.num_prefix_tokens, width, generator=g), patches], dim=1)[None].to(dtype)


@pytest.mark.parametrize("by_sum", [False, True])
@pytest.mark.parametrize(("grid", "block", "prefix"), [((8, 12), (2, 2), 1), ((9, 7), (2, 2), 0), ((5, 13), (1, 4), 5)])
def test_screened_keys(grid: tuple[int, int], block: tuple[int, int], prefix: int, by_sum: bool) -> None:
    blocks = Tiling(grid, block, prefix)
    g = torch.Generator().manual_seed(1)
    pooled, weight = torch.randn(1, 2, 5, 4, 16, generator=g), torch.rand(1, 2, blocks.num_patches, generator=g)
    num_blocks, count = blocks.num_tiles // 2, blocks.num_patches // 6
    for dtype in DTYPES:
        k = smooth_keys(blocks, 16, dtype)
        numbers = (*grid, *block, prefix, num_blocks, count, 0.25, by_sum)
        for weights in (weight, None):
            got = run("screened_keys", pooled.to(dtype), k, weights, *numbers)
            want = exactly("screened_keys", pooled.to(dtype), k, weights, *numbers)
            assert got.shape == want.shape
            assert (got.diff(dim=-1) > 0).all()
            # Blocks and keys whose scores are nearly equal are taken for each other.
            same = (got[..., :, None] == want[..., None, :]).any(-1).double().mean()
            assert same >= (0.999 if dtype == torch.float32 else 0.97)


@settings(max_examples=8, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    prefix=st.integers(0, 3),
    share=st.floats(0, 1),
    biased=st.booleans(),
    grouped=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_log_counts(
    grid: tuple[int, int], block: tuple[int, int], prefix: int, share: float, biased: bool, grouped: bool, seed: int
) -> None:
    blocks = Tiling(grid, (min(block[0], grid[0]), min(block[1], grid[1])), prefix)
    g = torch.Generator().manual_seed(seed)
    kept = 1 + int(share * (blocks.num_tokens - 1))
    indices = torch.rand(2, 1, 3, blocks.num_tokens, generator=g).argsort(-1)[..., :kept].to(torch.int32)
    bias = (
        torch.zeros(indices.shape).where(torch.rand(indices.shape, generator=g) < 0.7, -torch.inf) if biased else None
    )
    member = torch.randint(blocks.num_tiles, (2, 1, blocks.num_patches), generator=g, dtype=torch.int32)
    numbers = (*blocks.grid, *blocks.tile, prefix)
    arguments = (indices, bias, member if grouped else None, *numbers)
    torch.testing.assert_close(run("count_unkept", *arguments), exactly("count_unkept", *arguments))
