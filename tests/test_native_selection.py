"""The compiled kernels: selection, scores, groups of queries and pooling at every instruction set."""

from __future__ import annotations

import pytest
import torch
from choosing import chooser
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import EXACT_LEVELS, LEVELS, ROUNDING_LEVELS, level_parameters

from sparsifiner import SparsifinerConfig, Tiling
from sparsifiner.ops import cpu, group_queries, pool_blocks, tile_keys, top_keys
from sparsifiner.ops.tail import group_keys
from sparsifiner.predictors import PooledConfig

pytestmark = [
    pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing())),
    pytest.mark.usefixtures("two_threads"),
]

DTYPES = (torch.float32, torch.bfloat16)


def rounded_for_scores(level: str, x: torch.Tensor) -> torch.Tensor:
    """Queries or keys as the level rounds them, in float64."""
    if level not in ("avx512vnni", "avx512bf16"):
        return x.bfloat16().double()
    largest = x.float().abs().amax(-1, keepdim=True)
    # `127 / largest` would be the rounded reciprocal times 127, and differ in the last place.
    return (x.float() * torch.tensor(127.0).div(largest)).round().double() * (largest / 127).double()


score_rows = st.tuples(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from(["normal", "ties", "equal", "infinite", "softmax"]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=150, deadline=None)
@given(row=score_rows)
def test_topk_is_exact(level: str, row: tuple[int, int, str, torch.dtype, int]) -> None:
    columns, count, kind, dtype, seed = row
    count = min(count, columns)
    scores = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        scores = scores.round()  # -0 and +0 are equal
    elif kind == "equal":
        scores = torch.full_like(scores, -1e-42)
    elif kind == "infinite":
        scores = (scores * 1e38) * 10
    elif kind == "softmax":
        scores = (scores * 30).softmax(-1)
    scores = scores.to(dtype)
    with cpu.force_level(level):
        got = top_keys(scores, count, "native")
    assert got.dtype == torch.int32
    want = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    assert torch.equal(got.long(), want)
    assert torch.equal(scores.gather(-1, got.long()).sort(-1).values, scores.topk(count).values.sort(-1).values)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_counts_as_the_highest_score(level: str, nan: float) -> None:
    """As in torch.topk; the other rows are as they would be alone."""
    scores = torch.randn(5, 100)
    want = top_keys(scores, 10, "reference")
    scores[3, 99] = nan
    with cpu.force_level(level):
        got = top_keys(scores, 10, "native")
    assert torch.equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])
    assert got[3, -1] == 99
    assert torch.equal(got[3], top_keys(scores, 10, "reference")[3])


def test_topk_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="0 <= k <= 4"):
        top_keys(torch.zeros(1, 4), 5, "native")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "block"), [((8, 8), (4, 4)), ((9, 13), (4, 5)), ((1, 3), (1, 1))])
def test_pooling(level: str, dtype: torch.dtype, grid: tuple[int, int], block: tuple[int, int]) -> None:
    blocks = Tiling(grid, block, 2)
    x = torch.randn(2, blocks.num_tokens, 3 * 48).unflatten(-1, (3, 48)).transpose(1, 2).to(dtype)
    with cpu.force_level(level):
        got = pool_blocks(x, blocks)
    want = blocks.mean_patches(x[:, :, 2:].double())
    assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * 4
    trained = x.clone().requires_grad_()
    assert pool_blocks(trained, blocks).requires_grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "tile", "prefix"),
    [((16, 16), (4, 4), 1), ((13, 18), (4, 8), 5), ((7, 9), (1, 1), 0), ((13, 17), (6, 6), 1), ((7, 7), (3, 2), 0)],
)
def test_groups_and_distances_are_those_of_torch(
    level: str, dtype: torch.dtype, grid: tuple[int, int], tile: tuple[int, int], prefix: int
) -> None:
    tiling = Tiling(grid, tile, prefix)
    q, v = torch.randn(2, 2, 3, tiling.num_tokens, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    blocks = tiling.regions((4, 4))
    for keep_prefix in (True, False):
        config = SparsifinerConfig(query_tile=tile, tail=(4, 4), keep_prefix=keep_prefix)
        predictor = chooser(config, tiling, num_heads=3, head_dim=48)
        with cpu.force_level(level), torch.no_grad():
            distance = predictor.value_distances(group_keys(v, v, blocks), tiling)
        exact = predictor.value_distances(group_keys(v.double(), v.double(), blocks), tiling)
        torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=1e-5)
    tokens = tiling.tokens(q.device).long()
    tokens = torch.where(tokens >= 0, tokens, tokens[:, :1])
    weights = predictor.groups(q.double(), tiling)
    want = weights @ q.double()[:, :, tokens.flatten()].unflatten(2, tokens.shape)
    start = Tiling(tile, predictor.group_block(tiling)).tile_of_patch(q.device).to(torch.int32)
    steps = predictor.settings.query_refine if weights.shape[3] < tiling.tile_size else 0
    with cpu.force_level(level):
        got = group_queries(q, tiling.tokens(q.device), start, weights.shape[3], steps, "native")
    assert got.shape == want.shape
    # A query halfway between two centres may join either; all others must agree. In a border tile several groups
    # can start as copies of the first query, equally near to it.
    whole = (tiling.tokens(q.device) >= 0).all(-1)
    agrees = ((got.double() - want).abs() <= 4 * torch.finfo(dtype).eps).all(-1)[:, :, whole]
    assert agrees.double().mean() > 0.99


def largest_logit_error(level: str, pooled: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The bound that ``tile_keys`` states, ``[B, H, T]``: for ``[B, H, T, G, D]`` queries and ``[B, H, N, D]`` keys."""
    q, k = pooled.double().abs(), keys[:, :, None].double().abs()
    if level in EXACT_LEVELS:
        error = 2 * q.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * (q @ k.mT)
    elif level in ("avx512vnni", "avx512bf16"):
        step_q, step_k = q.amax(-1, keepdim=True) / 127, k.amax(-1, keepdim=True) / 127
        error = q.sum(-1, keepdim=True) @ step_k.mT / 2 + step_q @ k.sum(-1, keepdim=True).mT / 2
        error = error + q.shape[-1] * step_q @ step_k.mT / 4
    else:
        error = (2 * 2**-8 + 2**-16) * (q @ k.mT)
    return scale * error.amax((-1, -2))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([16, 16, 32, 64]),
    num_keys=st.sampled_from([4, 16, 64, 196]),
    members=st.integers(1, 4),
    share=st.floats(0, 1),
    size=st.sampled_from([0.3, 1.0, 3.0]),
    by_sum=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_what_rounding_selects_scores_nearly_as_high(
    level: str,
    dtype: torch.dtype,
    width: int,
    num_keys: int,
    members: int,
    share: float,
    size: float,
    by_sum: bool,
    seed: int,
) -> None:
    """On tiny grids, where few keys are kept and one taken for another is a large share of them, as on any."""
    g = torch.Generator().manual_seed(seed)
    pooled = (torch.randn(2, 2, 9, members, width, generator=g) * size).to(dtype)
    k = (torch.randn(2, 2, num_keys + 1, width, generator=g) * size).to(dtype)
    weight = torch.rand(2, 2, num_keys, generator=g) + 0.01
    count, scale = 1 + int(share * (num_keys - 1)), width**-0.5
    with cpu.force_level(level):
        got = tile_keys(pooled, k, weight, 1, count, scale, by_sum, "native").long()
    logits = pooled.double() @ k[:, :, None, 1:].double().mT * scale
    log_probabilities = logits.log_softmax(-1)
    scores = log_probabilities.logsumexp(-2) if by_sum else log_probabilities.amax(-2)
    scores = scores + weight.double().log()[:, :, None]
    threshold = scores.topk(count, dim=-1).values[..., -1]
    lowest = scores.gather(-1, got[..., 1:] - 1).amin(-1)
    # A sum of exponentials is good to 1e-4, where scores are rounded and where probabilities are summed.
    allowed = 4 * largest_logit_error(level, pooled, k[:, :, 1:], scale) + 4e-4
    assert (threshold - lowest <= allowed).all()


@pytest.mark.parametrize("level", level_parameters(ROUNDING_LEVELS))
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(
    width=st.sampled_from([16, 48, 64, 128]),
    num_tokens=st.integers(2, 200),
    tiles=st.integers(1, 20),
    members=st.integers(1, 5),
    share=st.floats(0, 1),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_rounded_scores_select_the_best_keys(
    level: str,
    dtype: torch.dtype,
    width: int,
    num_tokens: int,
    tiles: int,
    members: int,
    share: float,
    weighted: bool,
    seed: int,
) -> None:
    """Of queries and keys as they are rounded: no key left out beats a selected one by more than sums explain."""
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(2, 2, tiles, members, width, generator=g).to(dtype)
    k = torch.randn(2, 2, num_tokens, width, generator=g).to(dtype)
    weight = torch.rand(2, 2, num_tokens - 1, generator=g) + 0.01 if weighted else None
    count = 1 + int(share * (num_tokens - 2))
    with cpu.force_level(level):
        got = tile_keys(pooled, k, weight, 1, count, width**-0.5, False, "native").long()
    assert (got[..., 0] == 0).all()
    assert (got.diff(dim=-1) > 0).all()
    rounded_keys = rounded_for_scores(level, k)[:, :, None, 1:]
    logits = rounded_for_scores(level, pooled) @ rounded_keys.transpose(-1, -2) * width**-0.5
    scores = logits.log_softmax(-1).amax(-2)
    if weight is not None:
        scores = scores + weight.double().log()[:, :, None]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, got[..., 1:] - 1, True)
    worst_chosen = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_left = scores.masked_fill(chosen, -torch.inf).amax(-1)
    # A sum of exponentials is good to 1e-4, and two of them meet where queries are merged.
    assert (worst_chosen >= best_left - 3e-4).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["query", "key", "last key"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_concern_their_image_only(level: str, where: str, value: float) -> None:
    """A key that is no number is kept, so that attention shows it; other images choose what they choose alone."""
    pooled, k = torch.randn(2, 1, 1, 3, 2, 48)[0], torch.randn(1, 1, 70, 48)
    others, other_keys = torch.randn(2, 1, 3, 2, 48), torch.randn(2, 1, 70, 48)
    row = {"query": pooled[0, 0, 1, 0], "key": k[0, 0, 5], "last key": k[0, 0, 69]}[where]
    row[7:9] = torch.tensor([value, -value])  # the difference of two infinities is no number
    pooled[..., 7:9], k[..., 7:9] = pooled[..., 7:9].abs(), k[..., 7:9].abs()
    batch, keys = torch.cat([others[:1], pooled, others[1:]]), torch.cat([other_keys[:1], k, other_keys[1:]])
    with cpu.force_level(level):
        got = tile_keys(batch, keys, None, 0, 7, 0.15, False, "native")
        want = tile_keys(others, other_keys, None, 0, 7, 0.15, False, "native")
    assert torch.equal(got[[0, 2]], want)
    assert (got.diff(dim=-1) > 0).all()
    assert ((got >= 0) & (got < 70)).all()
    if where != "query":
        assert (got[1] == {"key": 5, "last key": 69}[where]).any(-1).all()


@pytest.mark.parametrize("level", level_parameters(ROUNDING_LEVELS))
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-33, 1e15])
def test_tiny_and_huge_keys_can_be_scored(level: str, size: float) -> None:
    pooled, k = torch.randn(1, 1, 3, 2, 48), torch.randn(1, 1, 70, 48) * size
    with cpu.force_level(level):
        chosen = tile_keys(pooled, k, None, 0, 7, 0.15, False, "native")
    assert (chosen.diff(dim=-1) > 0).all()
    if size == 1e15:  # the best key by far has all of the probability
        best = (pooled @ k.mT[:, :, None]).flatten(3).argmax(-1) % 70
        assert (chosen == best[..., None]).any(-1).all()


@pytest.mark.parametrize("level", EXACT_LEVELS)
@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize(
    ("grid", "tile", "tail"),
    [((16, 16), (4, 4), (4, 4)), ((13, 11), (4, 4), (3, 3)), ((9, 9), (1, 1), None), ((16, 16), (4, 8), (4, 4))],
)
def test_fused_prediction_selects_what_the_torch_path_selects(level, reduction, grid, tile, tail) -> None:
    """Scoring, merging, weighting by what the tail would get wrong, and selection in one pass."""
    tiling = Tiling(grid, tile, 1)
    settings = PooledConfig(reduction=reduction)
    config = SparsifinerConfig(query_tile=tile, tail=tail, predictor=settings, keep_rate=0.2)
    predictor = chooser(config, tiling, num_heads=3, head_dim=64)
    q, k, v = torch.randn(3, 2, 3, tiling.num_tokens, 64, generator=torch.Generator().manual_seed(0)) * 1.5
    with cpu.force_level(level):
        fused = predictor(q, k, v, tiling, 0.125)
    stepwise = predictor.by_torch(q, k, v, tiling, 0.125)
    assert torch.equal(fused.to_mask(), stepwise.to_mask())
    assert (fused.indices.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("members", [1, 3, 4])
def test_long_rows_select_what_single_tiles_select(level: str, members: int) -> None:
    """Where the logits of one tile fill the cache, tiles still share a pass over the keys; the result is the same."""
    g = torch.Generator().manual_seed(0)
    pooled, k = torch.randn(1, 1, 5, members, 16, generator=g), torch.randn(1, 1, 30_001, 16, generator=g)
    with cpu.force_level(level):
        together = tile_keys(pooled, k, None, 1, 40, 0.25, False, "native")
        alone = [tile_keys(pooled[:, :, tile : tile + 1], k, None, 1, 40, 0.25, False, "native") for tile in range(5)]
    assert torch.equal(together, torch.cat(alone, dim=2))
    scores = (pooled.double() @ k[:, :, None, 1:].double().transpose(-1, -2) * 0.25).log_softmax(-1).amax(-2)
    # The same sum over the chosen scores, but for those that rounding makes equal to the last one.
    chosen = scores.gather(-1, together[..., 1:].long() - 1).sum(-1)
    torch.testing.assert_close(chosen, scores.topk(40, dim=-1).values.sum(-1), rtol=1e-3, atol=0)
