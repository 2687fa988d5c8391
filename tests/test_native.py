"""The compiled kernels: attention at every instruction set against the float64 reference, refusals, threads."""

from __future__ import annotations

import dataclasses
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import LEVEL_NAMES, LEVELS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner import Connectivity, Tail, Tiling, sparse_attention
from sparsifiner.ops import choose_backend, count_unkept, cpu, top_keys, why_not
from sparsifiner.ops.tail import group_keys

pytestmark = [
    pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing())),
    pytest.mark.usefixtures("two_threads"),
]

DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


@dataclasses.dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    connectivity: Connectivity
    tail: Tail | None
    scale: float

    def run(self, backend: str, precision: str = "same") -> Tensor:
        tensors = (self.q, self.k, self.v, self.connectivity)
        return sparse_attention(*tensors, tail=self.tail, scale=self.scale, precision=precision, backend=backend)

    def exact(self) -> Tensor:
        """The reference in float64 on the same, already rounded inputs."""
        tail = self.tail and Tail(self.tail.k.double(), self.tail.v.double(), self.tail.bias.double())
        return Problem(self.q.double(), self.k.double(), self.v.double(), self.connectivity, tail, self.scale).run(
            "reference"
        )

    def budget(self) -> float:
        """Largest error the precision explains, for outputs that are averages of ``v``.

        A logit is a sum of ``D`` products and carries up to ``D * eps32`` of their absolute sum, which enters
        its weight as a factor; the exponential adds 2 eps32 and the sums over the keys their square root. In
        bfloat16 the weights and the result are rounded once each as well.
        """
        eps = torch.finfo(torch.float32).eps
        keys = [self.k] if self.tail is None else [self.k, self.tail.k]
        product = self.q.double().abs().amax((0, 1, 2)) @ torch.cat(keys, 2).double().abs().amax((0, 1, 2))
        logit_error = eps * 4 * (self.q.shape[-1] ** 0.5 + 2) * product.item() * abs(self.scale)
        relative = 2 * logit_error + eps * (8 + self.connectivity.num_keys**0.5)
        if self.q.dtype == torch.bfloat16:
            relative += 2 * torch.finfo(torch.bfloat16).eps
        values = [self.v] if self.tail is None else [self.v, self.tail.v]
        return relative * max(1e-30, *(x.abs().max().item() for x in values if x.numel()))


def make(
    grid: tuple[int, int] = (9, 10),
    tile: tuple[int, int] = (4, 4),
    prefix: int = 1,
    batch: int = 1,
    heads: int = 2,
    width: int = 32,
    keys: int = 20,
    padding: bool = False,
    block: tuple[int, int] | None = (4, 4),
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    seed: int = 0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    tiling = Tiling(grid, (min(tile[0], grid[0]), min(tile[1], grid[1])), prefix)
    n = tiling.num_tokens
    qkv = torch.randn(batch, n, 3 * heads * width, generator=g).to(dtype)
    q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    indices = torch.rand(batch, heads, tiling.num_tiles, n, generator=g).argsort(-1)[..., :keys].to(torch.int32)
    bias = None
    if padding:
        bias = torch.randn(indices.shape, generator=g)
        bias.masked_fill_(torch.rand(indices.shape, generator=g) < 0.3, float("-inf"))
        bias[:, :, 0] = float("-inf")
    connectivity = Connectivity(tiling, indices, bias)
    tail = None
    if block:
        blocks = tiling.regions((min(block[0], grid[0]), min(block[1], grid[1])))
        tail = group_keys(k, v, blocks, steps=seed % 2).tail(connectivity)
    return Problem(q * size, k, v, connectivity, tail, width**-0.5)


problems = st.builds(
    make,
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tile=st.sampled_from([(1, 1), (2, 3), (4, 4), (4, 8), (6, 6), (12, 12)]),
    prefix=st.integers(0, 5),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    width=st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128]),
    keys=st.sampled_from([1, 2, 7, 64, 65, 1000]),
    padding=st.booleans(),
    block=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=80, deadline=None)
@given(problem=problems)
def test_attention_stays_within_its_error_budget(level: str, problem: Problem) -> None:
    with cpu.force_level(level):
        got = problem.run("native")
    assert got.dtype == problem.q.dtype
    assert (got.double() - problem.exact()).abs().max() <= problem.budget()


def logit_error(problem: Problem, precision: str) -> float:
    """Six standard deviations of a logit whose factors are off by at most half a step each, uniformly."""
    keys = problem.k if problem.tail is None else torch.cat([problem.k, problem.tail.k], 2)
    q, k = problem.q.double(), keys.double()
    if precision == "int8":  # a step is that of the row's largest element; less about the mean, a key is twice as large
        q_step, k_step = q.abs().max() / 127, 2 * k.abs().max() / 127
    else:
        q_step, k_step = (x.abs().max() * torch.finfo(torch.bfloat16).eps for x in (q, k))
    spread = (q_step * k.norm(dim=-1).max() + k_step * q.norm(dim=-1).max()) / 12**0.5
    return 6 * spread.item() * abs(problem.scale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_rounded_attention_stays_within_its_error_budget(level: str, precision: str, problem: Problem) -> None:
    """Of float32 inputs; where the level rounds nothing, the result is that of float32 to the bit."""
    with cpu.force_level(level):
        got, unrounded = problem.run("native", precision), problem.run("native")
        rounds = precision in cpu.precisions() and problem.q.dtype == torch.float32
    assert got.dtype == problem.q.dtype
    if not rounds:
        assert torch.equal(got, unrounded)
        return
    # An error of a logit is a factor of a weight, and the weights' sum has it too.
    values = [problem.v] if problem.tail is None else [problem.v, problem.tail.v]
    largest = max(x.abs().max().item() for x in values if x.numel())
    relative = 2 * math.expm1(logit_error(problem, precision))
    relative += 0 if precision == "int8" else 3 * torch.finfo(torch.bfloat16).eps  # values, weights and their sum
    assert (got.double() - problem.exact()).abs().max() <= problem.budget() + relative * largest


@pytest.mark.parametrize("level", [level for level in LEVEL_NAMES if "avx512" in level])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_typical_error_of_rounded_attention(level: str, precision: str) -> None:
    """Keys with a large mean, as those of vision transformers: relative L2 of the result within 1 %."""
    problem = make(grid=(16, 16), keys=40, width=64)
    problem.k += 4 * torch.randn(1, problem.k.shape[1], 1, 64, generator=torch.Generator().manual_seed(1))
    assert problem.tail is not None
    problem.tail = group_keys(problem.k, problem.v, problem.connectivity.tiling, 0).tail(problem.connectivity)
    exact = problem.exact()
    with cpu.force_level(level):
        if precision not in cpu.precisions():
            pytest.skip(f"level {level} rounds nothing to {precision}")
        error = (problem.run("native", precision) - exact).norm() / exact.norm()
    # The mean is taken off for int8 alone: of bfloat16 it takes away bits.
    assert 1e-5 < error < (0.01 if precision == "int8" else 0.03)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ["same", "bfloat16", "int8"])
def test_masked_keys_are_not_read(level: str, precision: str) -> None:
    """Padding with a bias of ``-inf`` changes nothing, be it NaN; a tile whose keys are all masked gives zeros."""
    problem = make(prefix=0, keys=20, padding=True, block=None)
    bias = problem.connectivity.bias
    assert bias is not None
    bias[problem.connectivity.indices == 50] = float("-inf")
    with cpu.force_level(level):
        want = problem.run("native", precision)
        problem.k[:, :, 50] = problem.v[:, :, 50] = float("nan")
        got = problem.run("native", precision)
    # The vector taken off int8 keys comes from some of them, whichever a tile keeps.
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 if precision == "int8" else 0)
    assert not got[:, :, problem.connectivity.tiling.tokens(CPU)[0].long()].any()


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=30, deadline=None)
@given(problem=problems, seed=st.integers(0, 2**20))
def test_extreme_logits(level: str, problem: Problem, seed: int) -> None:
    """Logits and biases of plus and minus 1e4: whole numbers, so that the products and their sums are exact."""
    g = torch.Generator().manual_seed(seed)
    width, bias = problem.q.shape[-1], problem.connectivity.bias
    for x in (problem.q, problem.k):
        x.copy_(torch.randint(-1, 2, x.shape, generator=g))
    problem.scale = 1e4 / (width // 2)
    if bias is not None:
        bias.copy_(torch.where(bias > 0.5, 1e4, torch.where(bias < -0.5, bias.sign() * torch.inf, bias.sign() * 1e4)))
    problem.tail = None
    with cpu.force_level(level):
        got = problem.run("native")
    # The scale and the bias are rounded twice each, as is the logit itself when the maximum is taken off.
    eps, half = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
    relative = 2 * eps * 6e4 + (2 * half if problem.q.dtype == torch.bfloat16 else 0)
    assert (got.double() - problem.exact()).abs().max() <= relative * problem.v.abs().max()


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=15, deadline=None)
@given(problem=problems, names=st.sets(st.sampled_from("qkv"), min_size=1))
def test_denormals(level: str, problem: Problem, names: set[str]) -> None:
    for name in names:
        getattr(problem, name).mul_(1e-40)
    with cpu.force_level(level):
        got = problem.run("native")
    assert (got.double() - problem.exact()).abs().max() <= problem.budget()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("side", "width"), [(16, 64), (7, 128), (24, 48)])
def test_bfloat16_is_as_good_as_torch_sdpa(level: str, side: int, width: int) -> None:
    problem = make(grid=(side, side), keys=1000, block=None, width=width, dtype=torch.bfloat16)
    exact = problem.exact()
    sdpa = torch.nn.functional.scaled_dot_product_attention(problem.q, problem.k, problem.v)
    with cpu.force_level(level):
        ours = (problem.run("native").double() - exact).abs().max()
    assert ours <= 2 * (sdpa.double() - exact).abs().max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_is_passed_on(level: str, dtype: torch.dtype) -> None:
    problem = make(block=None, dtype=dtype)
    problem.q[0, 0, 1, 0] = float("nan")
    with cpu.force_level(level):
        got = problem.run("native")
    assert got[0, 0, 1].isnan().all()
    assert got[0, 1].isfinite().all()


@pytest.mark.parametrize("layout", ["heads first", "odd offset", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(layout: str, dtype: torch.dtype) -> None:
    problem = make(dtype=dtype)
    want = problem.run("native")
    for name in ("q", "k", "v"):
        x = getattr(problem, name)
        if layout == "heads first":
            x = x.contiguous()
        elif layout == "odd offset":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        else:
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        setattr(problem, name, x)
    assert torch.equal(problem.run("native"), want)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("index", [-1, 91, 2**31 - 1, -(2**31)])
def test_bad_indices_are_caught(level: str, index: int) -> None:
    problem = make()
    problem.connectivity.indices[0, 1, 2, 3] = index
    with cpu.force_level(level), pytest.raises(IndexError, match=r"connectivity.indices must lie in \[0, 91\)"):
        problem.run("native")
    blocks = Tiling((9, 10), (4, 4), 1)
    with pytest.raises(IndexError, match="connectivity.indices must lie in"):
        count_unkept(problem.connectivity.indices, None, blocks)


def test_refusals_are_said_in_words() -> None:
    x = torch.zeros(1, 1, 4, 64)
    assert why_not("native", x) is None
    assert choose_backend(x)[0] == "native"
    for bad, words in [
        (x.double(), "not in float64"),
        (x[..., :40], "head widths that are multiples of 16"),
        (x.to("meta"), "the tensors are on meta"),
        (x.clone().requires_grad_(), "no backward pass"),
    ]:
        assert words in (why_not("native", bad) or "")
        assert choose_backend(bad)[0] == "gather"
        assert words in choose_backend(bad)[1]
    assert "no attn_bias" in (why_not("native", x, attn_bias=x) or "")
    trained = x.clone().requires_grad_()
    assert "no backward pass" in (why_not("native", x, trained) or "")
    with torch.no_grad():
        assert why_not("native", x, trained) is None


def test_levels_are_forced_and_restored() -> None:
    before = cpu.level()
    with cpu.force_level("portable"):
        assert cpu.level() == "portable"
    assert cpu.level() == before
    with pytest.raises(ValueError, match="this machine has portable"), cpu.force_level("mmx"):
        pass


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_without_graph_breaks_and_runs_in_inference_mode(dtype: torch.dtype) -> None:
    problem = make(dtype=dtype)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiling = problem.connectivity.tiling
        scores = tiling.mean_patches(q[:, :, 1:]) @ k.transpose(-1, -2)
        connectivity = Connectivity(tiling, top_keys(scores, 20))
        tail = group_keys(k, v, tiling.regions((4, 4)), 2).tail(connectivity)
        return sparse_attention(q, k, v, connectivity, tail=tail, backend="native")

    inputs = (problem.q, problem.k, problem.v)
    with torch.inference_mode():
        want = layer(*inputs)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), want)


def test_library_contracts() -> None:
    problem = make()
    tiling, tail = problem.connectivity.tiling, problem.tail
    assert tail is not None
    checks = ("test_schema", "test_faketensor")
    indices = problem.connectivity.indices
    attention = (
        tiling.tokens(indices.device),
        indices,
        None,
        tail.k,
        tail.v,
        tail.bias,
        None,
        1,
        0.2,
        "int8",
        "native",
    )
    ops = torch.ops.sparsifiner
    torch.library.opcheck(ops.attend, (problem.q, problem.k, problem.v, *attention), test_utils=checks)
    torch.library.opcheck(ops.topk, (torch.randn(3, 40), 7, "native"), test_utils=checks)
    torch.library.opcheck(ops.pool_blocks, (problem.k, 9, 10, 4, 4, 1, "native"), test_utils=checks)
    torch.library.opcheck(ops.count_unkept, (indices, None, None, 9, 10, 4, 4, 1, "native"), test_utils=checks)
    torch.library.opcheck(ops.block_distances, (problem.v, 9, 10, 4, 4, 1, "native"), test_utils=checks)
    tokens, group_of = problem.connectivity.tiling.tokens(indices.device), torch.arange(16, dtype=torch.int32) // 4
    torch.library.opcheck(ops.group_queries, (problem.q, tokens, group_of, 4, 2, "native"), test_utils=checks)
    pooled = problem.q[:, :, None, :4].expand(-1, -1, 3, -1, -1)
    weight = torch.rand(*problem.k.shape[:2], problem.k.shape[2] - 1)
    torch.library.opcheck(ops.tile_keys, (pooled, problem.k, weight, 1, 5, 0.25, False, "native"), test_utils=checks)


def test_flops_are_those_of_gather() -> None:
    counts = []
    for backend in ("gather", "native"):
        with FlopCounterMode(display=False) as counter:
            make().run(backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_several_python_threads_at_once() -> None:
    wanted = [(p, p.run("native")) for p in (make(seed=s, dtype=DTYPES[s % 2], keys=10 * s + 1) for s in range(8))]
    wrong: list[int] = []

    def work(number: int) -> None:
        problem, want = wanted[number]
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(problem.run("native"), want):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
