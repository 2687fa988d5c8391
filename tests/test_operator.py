"""The operator: every backend against the float64 reference, errors, memory and torch.library contracts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner import Connectivity, Tail, Tiling, ops, sparse_attention
from sparsifiner.ops import why_not
from sparsifiner.ops.gather import chunks
from sparsifiner.ops.tail import group_keys

BACKENDS = [name for name in ops.BACKENDS if name != "triton"]  # whose kernels are interpreted: see test_triton.py
FAST = [name for name in BACKENDS if name != "reference"]


@dataclasses.dataclass
class Problem:
    """Random inputs of the operator in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    connectivity: Connectivity
    tail: Tail | None
    attn_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        tail = self.tail and Tail(self.tail.k.to(dtype), self.tail.v.to(dtype), self.tail.bias)
        return Problem(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.connectivity, tail, self.attn_bias)

    def run(self, backend: str, **changes: object) -> Tensor:
        problem = dataclasses.replace(self, **changes)
        return sparse_attention(
            problem.q,
            problem.k,
            problem.v,
            problem.connectivity,
            tail=problem.tail,
            attn_bias=problem.attn_bias,
            backend=backend,
        )


def make(
    *,
    grid: tuple[int, int] = (6, 5),
    tile: tuple[int, int] = (4, 4),
    prefix: int = 1,
    batch: int = 2,
    heads: int = 3,
    width: int = 16,
    keys: int | None = None,
    padding: bool = False,
    block: tuple[int, int] | None = (4, 4),
    bias: bool = False,
    seed: int = 0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    tiling = Tiling(grid, tile, prefix)
    n = tiling.num_tokens
    q, k, v = (torch.randn(batch, heads, n, width, generator=g, dtype=torch.float64) for _ in range(3))
    keys = min(n, keys or max(1, n // 3))
    order = torch.rand(batch, heads, tiling.num_tiles, n, generator=g).argsort(-1)
    entry_bias = None
    if padding:
        drop = torch.rand(batch, heads, tiling.num_tiles, keys, generator=g) < 0.4
        entry_bias = torch.zeros(drop.shape).masked_fill(drop, float("-inf"))
    connectivity = Connectivity(tiling, order[..., :keys].to(torch.int32), entry_bias)
    tail = group_keys(k, v, tiling.regions(block), steps=seed % 2).tail(connectivity) if block else None
    columns = n + (tail.k.shape[2] if tail else 0)
    attn_bias = torch.randn(1, heads, n, columns, generator=g, dtype=torch.float64) if bias else None
    return Problem(q, k, v, connectivity, tail, attn_bias)


problems = st.builds(
    lambda rows, columns, tile, block, **rest: make(
        grid=(rows, columns),
        tile=(min(tile[0], rows), min(tile[1], columns)),
        block=block and (min(block[0], rows), min(block[1], columns)),
        **rest,
    ),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    block=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    prefix=st.integers(0, 2),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 16, 48, 64]),
    keys=st.integers(1, 100),
    padding=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)


def epsilon_error(got: Tensor, want: Tensor) -> float:
    """Largest error in units of the precision, relative to the size of the values."""
    scale = want.abs().max().clamp(min=1.0)
    return ((got.double() - want).abs().max() / scale / torch.finfo(got.dtype).eps).item()


def dense_by_hand(p: Problem) -> Tensor:
    """Softmax over the mask, written out once more from Connectivity.to_mask."""
    logits = p.q @ p.k.transpose(-1, -2) * p.q.shape[-1] ** -0.5
    return logits.masked_fill(~p.connectivity.to_mask(), float("-inf")).softmax(-1) @ p.v


def test_reference_is_masked_softmax() -> None:
    problem = make(block=None)
    torch.testing.assert_close(problem.run("reference"), dense_by_hand(problem))


def test_reference_with_a_tail_equals_repeating_the_pooled_token() -> None:
    """A pooled token with bias log(n) weighs as much as n keys that are all equal to it."""
    p = make(grid=(4, 4), tile=(2, 2), prefix=1, block=(2, 2), keys=4)
    blocks = Tiling((4, 4), (2, 2))
    block_of = blocks.tile_of_patch(p.q.device)
    pooled_k, pooled_v = (blocks.mean_patches(x[:, :, 1:])[:, :, block_of] for x in (p.k, p.v))
    kept = p.connectivity.to_mask()
    columns = torch.cat([kept, ~kept[..., 1:]], dim=-1)
    columns[:, :, :1, 17:] = False  # the class token's row is dense and takes no pooled token
    logits = p.q @ torch.cat([p.k, pooled_k], 2).transpose(-1, -2) * p.q.shape[-1] ** -0.5
    want = logits.masked_fill(~columns, float("-inf")).softmax(-1) @ torch.cat([p.v, pooled_v], 2)
    torch.testing.assert_close(p.run("reference"), want, rtol=1e-6, atol=1e-6)  # log-counts are float32


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=60, deadline=None)
@given(problem=problems)
def test_backends_match_the_reference(backend: str, problem: Problem) -> None:
    for dtype, budget in ((torch.float64, 64), (torch.float32, 64), (torch.bfloat16, 8), (torch.float16, 16)):
        rounded = problem.to(dtype)
        # The inputs' own rounding is not the backend's error: compare with the reference on rounded inputs.
        exact = rounded.to(torch.float64).run("reference")
        if why_not(backend, rounded.q, attn_bias=rounded.attn_bias) is not None:
            continue
        got = rounded.run(backend)
        assert got.dtype == dtype
        assert got.shape == problem.q.shape
        assert epsilon_error(got, exact) < budget


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_is_as_good_as_torch_sdpa(backend: str) -> None:
    problem = make(grid=(16, 16), keys=257, block=None, width=64).to(torch.bfloat16)
    exact = problem.to(torch.float64).run("reference")
    sdpa = torch.nn.functional.scaled_dot_product_attention(problem.q, problem.k, problem.v)
    ours = (problem.run(backend).double() - exact).abs().max()
    assert ours <= 2 * (sdpa.double() - exact).abs().max()


@contextmanager
def chunked(way: str, chunk_bytes: int) -> Iterator[None]:
    """Make the gather backend copy keys or mask them, in chunks of another size."""
    cost = {"copies": 0, "masks": 10**9}[way]
    with patch.object(chunks, "COPY_COST", cost), patch.object(chunks, "CHUNK_BYTES", chunk_bytes):
        yield


@pytest.mark.parametrize("way", ["copies", "masks"])
@settings(max_examples=25, deadline=None)
@given(problem=problems, chunk_bytes=st.sampled_from([2**10, 2**14, 2**23]))
def test_gather_and_its_gradients_match_the_reference(way: str, problem: Problem, chunk_bytes: int) -> None:
    def result_and_gradients(backend: str) -> list[Tensor]:
        leaves = [problem.q, problem.k, problem.v]
        if problem.tail is not None:
            leaves += [problem.tail.k, problem.tail.v]
        if problem.attn_bias is not None:
            leaves.append(problem.attn_bias)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        rest = leaves[3:]
        tail = problem.tail and Tail(rest.pop(0), rest.pop(0), problem.tail.bias)
        out = problem.run(
            backend, q=leaves[0], k=leaves[1], v=leaves[2], tail=tail, attn_bias=rest[0] if rest else None
        )
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    with chunked(way, chunk_bytes):
        found = result_and_gradients("gather")
    for got, want in zip(found, result_and_gradients("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", ["copies", "masks"])
@pytest.mark.parametrize("block", [None, (4, 4)])
def test_gather_gradient_of_the_biases(way: str, block: tuple[int, int] | None) -> None:
    """Of the kept entries, where padding must get none, and of the tail."""
    problem = make(padding=True, block=block)
    connectivity, tail = problem.connectivity, problem.tail
    assert connectivity.bias is not None
    # Padding entries as the predictors write them: they repeat a key that is kept.
    repeated = torch.where(connectivity.bias == float("-inf"), connectivity.indices[..., :1], connectivity.indices)
    repeated[..., 0] = connectivity.indices[..., 0]
    entry_bias = connectivity.bias.double() + torch.randn(connectivity.bias.shape, dtype=torch.float64)
    entry_bias[..., 0] = 0.5

    def gradients(backend: str) -> tuple[Tensor, ...]:
        bias = entry_bias.clone().requires_grad_()
        leaves = [bias]
        changes: dict[str, object] = {"connectivity": dataclasses.replace(connectivity, indices=repeated, bias=bias)}
        if tail is not None:
            leaves.append(tail.bias.double().requires_grad_())
            changes["tail"] = dataclasses.replace(tail, bias=leaves[1])
        return torch.autograd.grad(problem.run(backend, **changes).square().sum(), leaves)

    with chunked(way, 2**12):
        found = gradients("gather")
    for got, want in zip(found, gradients("reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_gather_masks_single_queries_and_copies_for_tiles() -> None:
    """What pays, by the sizes: the paper's per-token masks and 4x4 tiles, at 1,024 tokens and a keep rate of 0.1."""
    for tile, block, masked in (((1, 1), None, True), ((4, 4), (4, 4), False)):
        p = make(grid=(32, 32), tile=tile, block=block, prefix=0, keys=102, batch=1, heads=1)
        pooled = (None, None, None) if p.tail is None else (p.tail.k, p.tail.v, p.tail.bias)
        tokens, indices = p.connectivity.tiling.tokens(p.q.device), p.connectivity.indices
        inputs = chunks.Inputs(p.q, p.k, p.v, tokens, indices, None, *pooled, None, 0)
        assert chunks.masking_pays(inputs) == masked


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys_gives_zeros(backend: str) -> None:
    problem = make(padding=True, block=None, prefix=0).to(torch.float32)
    problem.connectivity.bias[:, :, 0] = float("-inf")
    out = problem.run(backend)
    rows = problem.connectivity.tiling.tokens(out.device)[0].long()
    assert (out[:, :, rows] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_extreme_logits(backend: str) -> None:
    problem = make().to(torch.float32)
    scaled = dataclasses.replace(problem, q=problem.q * 1e4)
    exact = scaled.to(torch.float64).run("reference")
    got = scaled.run(backend)
    assert got.isfinite().all()
    # Logits of size 1e4 carry an absolute round-off of 1e4 * eps, which enters the weights as a factor.
    assert epsilon_error(got, exact) < 1e5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [-1, 31, 2**31 - 1])
def test_bad_indices_are_caught(backend: str, index: int) -> None:
    problem = make().to(torch.float32)
    problem.connectivity.indices[1, 2, 1, 3] = index
    with pytest.raises(IndexError, match=r"connectivity.indices must lie in \[0, 31\)"):
        problem.run(backend)


def test_shape_errors_name_the_tensor_and_what_was_expected() -> None:
    p = make().to(torch.float32)
    tail = p.tail
    assert tail is not None
    for name, changes, message in [
        ("q", {"q": p.q[0]}, r"q must have shape \[B, H, N, D\], got \[3, 31, 16\]"),
        ("q", {"q": p.q[:, :, 1:]}, "q must have 31 tokens, 1 prefix tokens and a 6x5 patch grid"),
        ("k", {"k": p.k[..., 1:]}, r"k must have shape \[2, 3, 31, 16\], got \[2, 3, 31, 15\]"),
        ("v", {"v": p.v.double()}, "v must have the dtype of q, torch.float32, got torch.float64"),
        ("tail.k", {"tail": Tail(tail.k.bfloat16(), tail.v, tail.bias)}, "tail.k must have the dtype of q"),
        ("tail.v", {"tail": Tail(tail.k, tail.v.double(), tail.bias)}, "tail.v must have the dtype of q"),
        ("attn_bias", {"attn_bias": torch.zeros(35)}, r"attn_bias must have shape \[2, 3, 31, 35\], got \[35\]"),
        ("attn_bias", {"attn_bias": torch.zeros(1, 1, 31, 35, device="meta")}, "attn_bias is on meta but q is on cpu"),
        ("tail.bias", {"tail": Tail(tail.k, tail.v, tail.bias[:1])}, r"tail.bias must have shape \[2, 3, 4, 4\]"),
        ("attn_bias", {"attn_bias": torch.zeros(1, 1, 31, 31)}, r"attn_bias must have shape \[1, 1, 31, 35\]"),
        (
            "indices",
            {"connectivity": dataclasses.replace(p.connectivity, indices=p.connectivity.indices.long())},
            "connectivity.indices must be int32, got torch.int64",
        ),
        (
            "indices",
            {"connectivity": dataclasses.replace(p.connectivity, indices=p.connectivity.indices[:, :, :1])},
            r"connectivity.indices must have shape \[2, 3, 4, K\], got \[2, 3, 1, 10\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            p.run("gather", **changes)
        assert name
    with pytest.raises(ValueError, match="backend 'flash' cannot run here: there is no such backend"):
        p.run("flash")
    with pytest.raises(ValueError, match="q must be float64, float32, bfloat16 or float16, got torch.int64"):
        p.run("gather", q=p.q.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    p = make(padding=True, bias=True).to(dtype)
    assert p.tail is not None
    arguments = (
        p.q,
        p.k,
        p.v,
        p.connectivity.tiling.tokens(p.q.device),
        p.connectivity.indices,
        p.connectivity.bias,
        p.tail.k,
        p.tail.v,
        p.tail.bias,
        p.attn_bias,
        1,
        0.25,
        "same",
        "gather",
    )
    tolerances = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(torch.ops.sparsifiner.attend.default, arguments, **tolerances)
    backward = torch.ops.sparsifiner.attend_backward.default
    torch.library.opcheck(backward, (torch.ones_like(p.q), *arguments), **tolerances)


def test_flop_counter_sees_the_operator() -> None:
    p = make(prefix=1, block=(2, 2)).to(torch.float32)
    assert p.tail is not None
    with FlopCounterMode(display=False) as counter:
        p.run("gather")
    pairs = 30 * (p.connectivity.num_keys + p.tail.k.shape[2]) + 31
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * pairs * 16


def test_16384_tokens_stay_under_4_gigabytes() -> None:
    """Prediction, selection, tail and attention of one layer of a ViT-S at 2048 px, in a process of its own."""
    script = """
        import torch
        from sparsifiner import SparsifinerConfig, Tiling, sparse_attention
        from sparsifiner.ops.tail import group_keys
        from sparsifiner.attention import build_predictor
        from sparsifiner.attention import AttentionInputs
        q, k, v = torch.randn(3, 1, 6, 16384, 64).unbind(0)
        tiling = Tiling((128, 128), (4, 4))
        predictor = build_predictor(SparsifinerConfig(), num_heads=6, head_dim=64, grid=(128, 128), num_prefix_tokens=0)
        with torch.inference_mode():
            groups = group_keys(k, v, tiling.regions((4, 4)), 2)
            connectivity = predictor(AttentionInputs(q, k, v, tiling, 0.125), groups)
            out = sparse_attention(q, k, v, connectivity, tail=groups.tail(connectivity), backend="gather")
        assert out.isfinite().all()
        import resource
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True, timeout=300
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 4e9
