"""Attention and its gradients in Triton against the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_operator import Problem, epsilon_error, make
from torch import Tensor
from triton_interpreter import DTYPES, exactly, run

from sparsifiner.errors import SparsifinerError
from sparsifiner.ops import why_not

BUDGET = {torch.float32: 64, torch.float16: 16, torch.bfloat16: 8}  # units of the precision, as of other backends
GRADIENT_BUDGET = {torch.float32: 2e-6, torch.float16: 4e-3}  # relative to the norm: rounded weights enter


def arguments(p: Problem) -> tuple[Any, ...]:
    pooled = (None, None, None) if p.tail is None else (p.tail.k, p.tail.v, p.tail.bias)
    tiling = p.connectivity.tiling
    tensors = (p.q, p.k, p.v, tiling.tokens(p.q.device), p.connectivity.indices, p.connectivity.bias, *pooled)
    return (*tensors, p.attn_bias, tiling.num_prefix_tokens, p.q.shape[-1] ** -0.5, "same")


cases = st.fixed_dictionaries(
    {
        "grid": st.tuples(st.integers(1, 9), st.integers(1, 9)),
        "tile": st.tuples(st.integers(1, 8), st.integers(1, 8)),
        "block": st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "prefix": st.integers(0, 5),
        "width": st.sampled_from([8, 16, 64, 80, 128]),
        "keys": st.integers(1, 100),
        "padding": st.booleans(),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**20),
    }
)
# Several blocks of keys and of the tail; everything there is; more queries than one program takes. One head suffices
# for the long ones: the others have two, and programs of heads are interpreted one after the other.
LONG = {"heads": 1, "grid": (12, 12), "tile": (8, 8), "block": (1, 1), "keys": 101, "width": 64, "prefix": 1}
EVERYTHING = {"grid": (9, 9), "tile": (3, 8), "block": (4, 4), "keys": 86, "prefix": 5, "padding": True, "bias": True}
LARGE_TILE = {"heads": 1, "grid": (10, 14), "tile": (10, 14), "block": (4, 4), "keys": 64, "prefix": 2}


def problem(case: dict[str, Any]) -> Problem:
    """A problem whose tiles and blocks fit its grid."""
    fitting = {
        name: case[name] and tuple(min(size, side) for size, side in zip(case[name], case["grid"], strict=True))
        for name in ("tile", "block")
    }
    return make(**{"batch": 1, "heads": 2, **case, **fitting})


@settings(max_examples=8, deadline=None)
@given(case=cases)
@example(LONG)
@example(EVERYTHING)
@example(LARGE_TILE)
def test_attend(case: dict[str, Any]) -> None:
    for dtype in DTYPES:
        inputs = arguments(problem(case).to(dtype))
        got = run("attend", *inputs)
        assert got.dtype == dtype
        assert epsilon_error(got, exactly("attend", *inputs)) < BUDGET[dtype]


def gradients_agree(case: dict[str, Any]) -> None:
    for dtype in DTYPES:
        inputs = arguments(problem(case).to(dtype))
        grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = exactly("attend_backward", grad, *inputs)
        found = run("attend_backward", grad, *inputs)
        numbers = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        # Sums of many terms that cancel: their error is one of the terms, which the largest gradients show.
        size = max(x.norm() / x.numel() ** 0.5 for x in expected)
        for got, want, x in zip(found, expected, numbers, strict=True):
            assert got.dtype == x.dtype
            assert (got.double() - want).norm() <= GRADIENT_BUDGET[dtype] * max(want.norm(), size * want.numel() ** 0.5)


@settings(max_examples=6, deadline=None)
@given(case=cases)
@example(LONG)
@example(EVERYTHING)
@example(LARGE_TILE)
def test_gradients(case: dict[str, Any]) -> None:
    gradients_agree(case)


@pytest.mark.parametrize("case", [LONG, EVERYTHING, LARGE_TILE], ids=["long", "everything", "large tile"])
def test_gradients_in_a_fixed_order(case: dict[str, Any]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        gradients_agree(case)
    finally:
        torch.use_deterministic_algorithms(False)


def test_packed_projections_are_read_in_place() -> None:
    """Views of the packed qkv, of every order of dimensions, and a bias that images share."""
    p = make(grid=(6, 5), batch=2, heads=2, bias=True).to(torch.float32)
    plain = run("attend", *arguments(p))
    packed = torch.stack([p.q, p.k, p.v])  # [3, B, H, N, D]
    for order in [(0, 1, 3, 2, 4), (1, 3, 0, 2, 4), (2, 1, 3, 0, 4), (0, 4, 1, 2, 3)]:
        back = [order.index(dim) for dim in range(5)]
        q, k, v = packed.permute(order).contiguous().permute(back).unbind()
        assert not q.is_contiguous()
        assert torch.equal(run("attend", *arguments(dataclasses.replace(p, q=q, k=k, v=v))), plain)


def test_a_row_without_keys_gives_zeros() -> None:
    p = make(padding=True, block=None, prefix=0).to(torch.float32)
    assert p.connectivity.bias is not None
    p.connectivity.bias[:, :, 0] = float("-inf")
    out, rows = run("attend", *arguments(p)), p.connectivity.tiling.tokens(p.q.device)[0].long()
    assert (out[:, :, rows] == 0).all()
    assert out.isfinite().all()
    gradients = run("attend_backward", torch.ones_like(p.q), *arguments(p))
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, :, rows] == 0).all()


def test_large_logits_and_biases() -> None:
    """A bias at the end of float32's range masks, but a row of nothing else attends to all of it alike."""
    p = make(block=None, bias=True).to(torch.float32)
    assert p.attn_bias is not None
    for case in [
        dataclasses.replace(p, q=p.q * 1e4),
        dataclasses.replace(p, attn_bias=p.attn_bias.where(p.attn_bias > 0, torch.finfo(torch.float32).min)),
        dataclasses.replace(p, attn_bias=torch.full_like(p.attn_bias, torch.finfo(torch.float32).min)),
    ]:
        got, want = run("attend", *arguments(case)), exactly("attend", *arguments(case))
        assert epsilon_error(got, want) < 1e5  # logits of 1e4 carry an error of 1e4 * eps


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_what_is_not_finite_stays_where_it_is_kept() -> None:
    p = make(grid=(8, 8), heads=1, batch=1, prefix=1, keys=7).to(torch.float32)
    broken = 17
    kept = (p.connectivity.indices == broken).any(-1)[0, 0]  # [T]
    assert kept.any()
    assert not kept.all()
    p.k[..., broken, 0], p.v[..., broken, :] = float("nan"), float("inf")
    out = run("attend", *arguments(dataclasses.replace(p, tail=None)))[0, 0]
    tokens = p.connectivity.tiling.tokens(p.q.device).long()
    for tile in range(len(tokens)):
        assert out[tokens[tile]].isnan().all() == kept[tile]
        assert out[tokens[tile]].isfinite().all() == ~kept[tile]


def test_bfloat16_is_as_good_as_torch_sdpa() -> None:
    p = make(grid=(8, 8), keys=65, block=None, width=64, batch=1).to(torch.bfloat16)
    exact = exactly("attend", *arguments(p))
    sdpa = torch.nn.functional.scaled_dot_product_attention(p.q, p.k, p.v)
    assert (run("attend", *arguments(p)).double() - exact).norm() <= 1.5 * (sdpa.double() - exact).norm()


@pytest.mark.parametrize("index", [-1, 31, 2**31 - 1])
def test_bad_indices_are_caught_on_a_cpu(index: int) -> None:
    p = make().to(torch.float32)
    p.connectivity.indices[1, 2, 1, 3] = index
    if torch.cuda.is_available():
        pytest.skip("a GPU would have to wait")
    with pytest.raises(IndexError, match=r"connectivity.indices must lie in \[0, 31\)"):
        run("attend", *arguments(p))


def test_what_it_cannot_do_is_said_in_words() -> None:
    p = make()
    with pytest.raises(SparsifinerError, match="'triton' cannot run here: it computes in float32, bfloat16 and float1"):
        run("attend", *arguments(p))
    wide = make(width=272, heads=1).to(torch.float32)
    assert "it takes head widths up to 256, not 272" in str(why_not("triton", wide.q.to(p.q.device)))
