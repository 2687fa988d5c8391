"""Keys by a budget that the tiles of an image share: in torch and in the compiled kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import EXACT_LEVELS, LEVELS, ROUNDING_LEVELS, level_parameters
from torch import Tensor

from sparsifiner import Connectivity, Tiling, sparse_attention
from sparsifiner.ops import budget_keys, cpu, tile_keys


def inputs(
    tiles: int, groups: int, tokens: int, *, batch: int = 2, width: int = 32, weighted: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(batch, 2, tiles, groups, width, generator=g)
    pooled *= torch.rand(batch, 2, tiles, 1, 1, generator=g) * 3  # tiles that look at few keys and at many
    k = torch.randn(batch, 2, tokens, width, generator=g)
    return pooled, k, torch.rand(batch, 2, tokens - 1, generator=g) + 0.01 if weighted else None


def kept_of(indices: Tensor, bias: Tensor, tokens: int) -> Tensor:
    """Boolean ``[B, H, T, N]``."""
    kept = torch.zeros(*indices.shape[:3], tokens, dtype=torch.int32)
    return kept.scatter_add_(-1, indices.long(), (bias == 0).to(torch.int32)) > 0


def expect_form(indices: Tensor, bias: Tensor, first: int, least: int, total: int) -> None:
    valid = bias == 0
    assert torch.equal(~valid, bias == float("-inf"))
    counts = valid.sum(-1)
    assert (counts >= first + least).all()
    assert (counts.sum((1, 2)) == total + first * counts[0].numel()).all()
    assert (indices[..., :first] == torch.arange(first)).all()
    position = torch.arange(indices.shape[-1])
    assert torch.equal(valid, position < counts[..., None])  # padding comes last
    rising = (indices.diff(dim=-1) > 0) | ~valid[..., 1:]
    assert rising.all()
    assert ((indices >= 0) & (indices[..., :] < 2**31 - 1)).all()


@pytest.mark.parametrize("level", level_parameters(EXACT_LEVELS))
@pytest.mark.parametrize("sum_probabilities", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    tiles=st.integers(1, 9),
    groups=st.integers(1, 4),
    tokens=st.integers(3, 120),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_kernels_keep_the_best_of_an_image(
    level: str,
    sum_probabilities: bool,
    tiles: int,
    groups: int,
    tokens: int,
    shares: tuple[float, float, float],
    weighted: bool,
    seed: int,
) -> None:
    pooled, k, weight = inputs(tiles, groups, tokens, weighted=weighted, seed=seed)
    most = 1 + round(shares[0] * (tokens - 2))
    least = round(shares[1] * most)
    total = 2 * tiles * least + round(shares[2] * 2 * tiles * (most - least))
    numbers = (1, most, least, total, 32**-0.5, sum_probabilities)
    with cpu.force_level(level):
        got = budget_keys(pooled, k, weight, *numbers, "native")
    expect_form(*got, 1, least, total)
    want = budget_keys(pooled.double(), k.double(), None if weight is None else weight.double(), *numbers, "reference")
    expect_form(*want, 1, least, total)
    # Scores that differ by less than their float32 sums explain may be taken for each other.
    assert (kept_of(*got, tokens) != kept_of(*want, tokens)).sum() <= 4


@pytest.mark.parametrize("level", level_parameters(ROUNDING_LEVELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_scores_share_a_budget(level: str, dtype: torch.dtype) -> None:
    pooled, k, weight = (x.to(dtype) for x in inputs(20, 4, 300))
    with cpu.force_level(level):
        got = budget_keys(pooled, k, weight.float(), 1, 90, 3, 1200, 32**-0.5, False, "native")
    expect_form(*got, 1, 3, 1200)
    want = budget_keys(*(x.double() for x in (pooled, k, weight)), 1, 90, 3, 1200, 32**-0.5, False, "reference")
    same = kept_of(*got, 300) & kept_of(*want, 300)
    assert same.sum() >= 0.97 * 2 * (1200 + 40)


@pytest.mark.parametrize("level", LEVELS)
def test_an_equal_share_is_that_of_every_tile_alone_and_images_do_not_share(level: str) -> None:
    pooled, k, weight = inputs(7, 2, 90)
    with cpu.force_level(level):
        indices, bias = budget_keys(pooled, k, weight, 1, 13, 13, 2 * 7 * 13, 32**-0.5, False, "native")
        assert torch.equal(indices, tile_keys(pooled, k, weight, 1, 13, 32**-0.5, False, "native"))
        assert not bias.any()
        batch = budget_keys(pooled, k, weight, 1, 40, 2, 150, 32**-0.5, False, "native")
        for image in range(2):
            alone = (x[image : image + 1] for x in (pooled, k, weight))
            found = budget_keys(*alone, 1, 40, 2, 150, 32**-0.5, False, "native")
            assert all(torch.equal(x, y[image : image + 1]) for x, y in zip(found, batch, strict=True))


def test_tiles_that_need_more_get_more() -> None:
    pooled, k, _ = inputs(2, 1, 201, batch=1)
    pooled[:, :, 0] *= 100  # one key has all of the probability
    pooled[:, :, 1] *= 0.01  # all keys have the same
    _, bias = budget_keys(pooled, k, None, 1, 200, 1, 150, 32**-0.5, False)
    counts = (bias == 0).sum(-1)
    assert (counts[:, :, 0] < 6).all()
    assert (counts[:, :, 1] > 50).all()


def test_the_operator_takes_what_it_gives() -> None:
    tiling = Tiling((8, 8), (4, 4), 1)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 65, 32, generator=g)
    pooled = tiling.mean_patches(q[:, :, 1:])[:, :, :, None]
    indices, bias = budget_keys(pooled, k, None, 1, 60, 1, 100, 32**-0.5, False)
    connectivity = Connectivity(tiling, indices, bias)
    want = sparse_attention(q.double(), k.double(), v.double(), connectivity, backend="reference")
    torch.testing.assert_close(sparse_attention(q, k, v, connectivity), want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_scores_that_are_no_numbers_concern_their_image_only(level: str) -> None:
    pooled, k, weight = inputs(5, 2, 60)
    numbers = (1, 20, 1, 100, 32**-0.5, False, "native")
    with cpu.force_level(level):
        want = budget_keys(pooled, k, weight, *numbers)
        k[1, :, 30] = float("nan")
        got = budget_keys(pooled, k, weight, *numbers)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(got, want, strict=True))
    expect_form(*got, 1, 1, 100)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_library_contract_and_refusals(backend: str) -> None:
    if backend == "native" and cpu.why_missing() is not None:
        pytest.skip(str(cpu.why_missing()))
    arguments = (*inputs(3, 2, 40), 1, 12, 2, 50, 0.2, False, backend)
    op = torch.ops.sparsifiner.budget_keys
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    for changed, message in (
        ({4: 40}, "cannot select 40 of 39 keys"),
        ({5: 13}, "a tile must keep from 0 to 12 keys at least, got 13"),
        ({6: 11}, "an image must have from 12 to 72 keys, got 11"),
        ({6: 73}, "an image must have from 12 to 72 keys, got 73"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*(changed.get(i, x) for i, x in enumerate(arguments)))
