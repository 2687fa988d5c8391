"""The operations in standard operators against their references."""

from __future__ import annotations

import pytest
import torch

from sparsifiner import Tiling
from sparsifiner.exporters import standard
from sparsifiner.ops._common import numbers_of
from sparsifiner.ops.registry import OPERATIONS

GRIDS = [Tiling((8, 8), (4, 4), 1), Tiling((7, 10), (3, 4), 2), Tiling((6, 6), (2, 3), 0)]


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(len(size)), dtype=torch.float64)


def qkv(tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = randn(3, 2, 3, tiling.num_tokens, 8)
    return x[0], x[1], x[2]


def connectivity(tiling: Tiling, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each tile, and a bias that leaves some out; the first tile of the first head keeps none."""
    scores = randn(2, 3, tiling.num_tiles, tiling.num_tokens)
    bias = randn(2, 3, tiling.num_tiles, count)
    bias[bias < -1] = float("-inf")
    bias[0, 0, 0] = float("-inf")
    return scores.topk(count).indices.to(torch.int32), bias.float()


def close(name: str, *arguments: object) -> None:
    found, want = getattr(standard, name)(*arguments), OPERATIONS[name].reference(*arguments)
    for got, expected in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, want)), strict=True):
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-9, atol=1e-9)


def test_there_is_a_form_of_every_operation_that_inference_calls() -> None:
    assert {operation.op for name, operation in OPERATIONS.items() if "backward" not in name} == set(
        standard.decompositions()
    )


@pytest.mark.parametrize("tiling", GRIDS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_attention(tiling: Tiling, biased: bool, tail: bool) -> None:
    (q, k, v), (indices, bias) = qkv(tiling), connectivity(tiling)
    pooled = (randn(2, 3, 5, 8), randn(2, 3, 5, 8) + 1, randn(2, 3, tiling.num_tiles, 5)) if tail else (None,) * 3
    tokens, columns = tiling.tokens(q.device), tiling.num_tokens + 5 * tail
    for attn_bias in (None, randn(1, 3, tiling.num_tokens, columns)):
        close("attend", q, k, v, tokens, indices, bias if biased else None, *pooled, attn_bias,
              tiling.num_prefix_tokens, 0.3, "same")  # fmt: skip


@pytest.mark.parametrize("tiling", GRIDS, ids=str)
def test_pooling_grouping_and_counting(tiling: Tiling) -> None:
    (q, k, v), (indices, bias) = qkv(tiling), connectivity(tiling)
    numbers = numbers_of(tiling)
    for name in ("pool_blocks", "block_distances"):
        close(name, v, *numbers)
    for steps in (1, 3):
        close("group_patches", v, *numbers, steps)
    member = OPERATIONS["group_patches"].reference(v, *numbers, 2)[0]
    close("pool_groups", k, member, *numbers)
    for kept, groups in ((bias, None), (None, member), (bias, member), (None, None)):
        close("count_unkept", indices, kept, groups, *numbers)
    whole = (tiling.tokens(q.device) >= 0).all(-1)  # elsewhere a query counts several times, and groups tie
    groups_of = Tiling(tiling.tile, (1, 2) if tiling.tile[1] % 2 == 0 else (1, 1)).tile_of_patch(q.device)
    for steps in (0, 2):
        close("group_queries", q, tiling.tokens(q.device)[whole], groups_of.int(), int(groups_of.max()) + 1, steps)


@pytest.mark.parametrize("tiling", GRIDS, ids=str)
@pytest.mark.parametrize("by_sum", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_keys_are_selected(tiling: Tiling, by_sum: bool, weighted: bool) -> None:
    (_, k, v), prefix = qkv(tiling), tiling.num_prefix_tokens
    pooled = randn(2, 3, tiling.num_tiles, 4, 8)
    weight = v[:, :, prefix:].norm(dim=-1) if weighted else None
    rows, columns = tiling.grid
    for name, settings in (
        ("tile_keys", (prefix, 9, 0.3, by_sum)),
        ("screened_keys", (rows, columns, 2, 2, prefix, 7, 9, 0.3, by_sum)),
    ):
        found = getattr(standard, name)(pooled, k, weight, *settings)
        torch.testing.assert_close(found.sort(-1).values, OPERATIONS[name].reference(pooled, k, weight, *settings))
    budget = (prefix, 9, 2, 3 * tiling.num_tiles * 5, 0.3, by_sum)
    (found, bias), (want, padded) = (
        function(pooled, k, weight, *budget) for function in (standard.budget_keys, OPERATIONS["budget_keys"].reference)
    )
    for got, expected in ((found, want), (bias, padded)):
        assert got.shape == expected.shape
    for keys, added, other_keys, other_added in zip(
        *(x.flatten(0, 2) for x in (found, bias, want, padded)), strict=True
    ):
        assert set(keys[added == 0].tolist()) == set(other_keys[other_added == 0].tolist())
    scores = randn(2, 3, 5, 11)
    torch.testing.assert_close(standard.topk(scores, 4).sort(-1).values, OPERATIONS["topk"].reference(scores, 4))
