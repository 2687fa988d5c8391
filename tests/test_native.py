"""The compiled kernels: every instruction set against the float64 reference, selection, pooling, threads."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner import Connectivity, SparsifinerConfig, Tail, Tiling, cpu, sparse_attention
from sparsifiner.connectivity import pool_tail
from sparsifiner.ops import choose_backend, why_not
from sparsifiner.pooling import count_unkept, pool_blocks
from sparsifiner.predictors import PooledPredictor, build_predictor
from sparsifiner.selection import native_group_queries, native_tile_keys, native_topk, top_keys

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))

LEVELS = [*cpu.levels(), "amx_emulated"]
ROUNDING_LEVELS = [level for level in LEVELS if level in ("avx512bf16", "amx", "amx_emulated")]
"""Those whose scores come from products of bfloat16."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclasses.dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    connectivity: Connectivity
    tail: Tail | None
    scale: float

    def run(self, backend: str) -> Tensor:
        return sparse_attention(
            self.q, self.k, self.v, self.connectivity, tail=self.tail, scale=self.scale, backend=backend
        )

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
    tail = block and pool_tail(k, v, connectivity, (min(block[0], grid[0]), min(block[1], grid[1])))
    return Problem(q * size, k, v, connectivity, tail or None, width**-0.5)


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
        tail = pool_tail(k, v, connectivity, (4, 4))
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
    attention = (tiling.tokens(indices.device), indices, None, tail.k, tail.v, tail.bias, 1, 0.2)
    ops = torch.ops.sparsifiner
    torch.library.opcheck(ops.native_attention, (problem.q, problem.k, problem.v, *attention), test_utils=checks)
    torch.library.opcheck(ops.native_topk, (torch.randn(3, 40), 7), test_utils=checks)
    torch.library.opcheck(ops.native_pool_blocks, (problem.k, 9, 10, 4, 4, 1), test_utils=checks)
    torch.library.opcheck(ops.native_count_unkept, (indices, None, 9, 10, 4, 4, 1), test_utils=checks)
    torch.library.opcheck(ops.native_block_distances, (problem.v, 9, 10, 4, 4, 1), test_utils=checks)
    tokens, group_of = problem.connectivity.tiling.tokens(indices.device), torch.arange(16, dtype=torch.int32) // 4
    torch.library.opcheck(ops.native_group_queries, (problem.q, tokens, group_of, 4, 2), test_utils=checks)
    pooled = problem.q[:, :, None, :4].expand(-1, -1, 3, -1, -1)
    weight = torch.rand(*problem.k.shape[:2], problem.k.shape[2] - 1)
    torch.library.opcheck(ops.native_tile_keys, (pooled, problem.k, weight, 1, 5, 0.25, False), test_utils=checks)


def test_flops_are_those_of_gather() -> None:
    counts = []
    for backend in ("gather", "native"):
        with FlopCounterMode(display=False) as counter:
            make().run(backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


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
        got = native_topk(scores, count)
    assert got.dtype == torch.int32
    want = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    assert torch.equal(got.long(), want)
    assert torch.equal(scores.gather(-1, got.long()).sort(-1).values, scores.topk(count).values.sort(-1).values)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_topk_refuses_nan(level: str, nan: float) -> None:
    scores = torch.randn(5, 100)
    scores[3, 99] = nan
    with cpu.force_level(level), pytest.raises(ValueError, match="row 3 of the scores holds NaN"):
        native_topk(scores, 10)


def test_topk_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="0 <= k <= 4"):
        native_topk(torch.zeros(1, 4), 5)


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
    ("grid", "tile", "prefix"), [((16, 16), (4, 4), 1), ((13, 18), (4, 8), 5), ((7, 9), (1, 1), 0)]
)
def test_groups_and_stakes_are_those_of_torch(
    level: str, dtype: torch.dtype, grid: tuple[int, int], tile: tuple[int, int], prefix: int
) -> None:
    tiling = Tiling(grid, tile, prefix)
    q, v = torch.randn(2, 2, 3, tiling.num_tokens, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    for keep_prefix in (True, False):
        predictor = PooledPredictor(SparsifinerConfig(query_tile=tile, tail=(4, 4), keep_prefix=keep_prefix))
        with cpu.force_level(level), torch.no_grad():
            stakes = predictor.stakes(v, tiling)
        torch.testing.assert_close(stakes.double(), predictor.stakes(v.double(), tiling), rtol=1e-5, atol=1e-5)
    tokens = tiling.tokens(q.device).long()
    tokens = torch.where(tokens >= 0, tokens, tokens[:, :1])
    weights = predictor.groups(q.double(), tiling)
    want = weights @ q.double()[:, :, tokens.flatten()].unflatten(2, tokens.shape)
    start = Tiling(tile, predictor.group_block(tiling)).tile_of_patch(q.device).to(torch.int32)
    steps = predictor.config.query_refine if weights.shape[3] < tiling.tile_size else 0
    with cpu.force_level(level):
        got = native_group_queries(q, tiling.tokens(q.device), start, weights.shape[3], steps)
    assert got.shape == want.shape
    # A query halfway between two centres may join either; all others must agree. In a border tile several groups
    # can start as copies of the first query, equally near to it.
    whole = (tiling.tokens(q.device) >= 0).all(-1)
    agrees = ((got.double() - want).abs() <= 4 * torch.finfo(dtype).eps).all(-1)[:, :, whole]
    assert agrees.double().mean() > 0.99


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


@pytest.mark.parametrize("level", ROUNDING_LEVELS)
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
    """Of queries and keys rounded to bfloat16: no key left out beats a selected one by more than sums explain."""
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(2, 2, tiles, members, width, generator=g).to(dtype)
    k = torch.randn(2, 2, num_tokens, width, generator=g).to(dtype)
    weight = torch.rand(2, 2, num_tokens - 1, generator=g) + 0.01 if weighted else None
    count = 1 + int(share * (num_tokens - 2))
    with cpu.force_level(level):
        got = native_tile_keys(pooled, k, weight, 1, count, width**-0.5, False).long()
    assert (got[..., 0] == 0).all()
    assert (got.diff(dim=-1) > 0).all()
    logits = pooled.bfloat16().double() @ k[:, :, None, 1:].bfloat16().double().transpose(-1, -2) * width**-0.5
    scores = logits.log_softmax(-1).amax(-2)
    if weight is not None:
        scores = scores + weight.double().log()[:, :, None]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, got[..., 1:] - 1, True)
    worst_chosen = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_left = scores.masked_fill(chosen, -torch.inf).amax(-1)
    # The scores' exponentials are good to 1e-4; the same error in all of a query's scores changes little else.
    assert (worst_chosen >= best_left - 2e-3).all()


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in ROUNDING_LEVELS])
@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize(
    ("grid", "tile", "tail"),
    [((16, 16), (4, 4), (4, 4)), ((13, 11), (4, 4), (3, 3)), ((9, 9), (1, 1), None), ((16, 16), (4, 8), (4, 4))],
)
def test_fused_prediction_selects_what_the_torch_path_selects(level, reduction, grid, tile, tail) -> None:
    """Scoring, merging, weighting by what the tail would get wrong, and selection in one pass."""
    tiling = Tiling(grid, tile, 1)
    config = SparsifinerConfig(query_tile=tile, tail=tail, reduction=reduction, keep_rate=0.2)
    predictor = build_predictor(config, num_heads=3, head_dim=64, grid=grid, num_prefix_tokens=1)
    q, k, v = torch.randn(3, 2, 3, tiling.num_tokens, 64, generator=torch.Generator().manual_seed(0)) * 1.5
    with cpu.force_level(level):
        fused = predictor(q, k, v, tiling, 0.125)
    stepwise = super(PooledPredictor, predictor).forward(q, k, v, tiling, 0.125)
    assert torch.equal(fused.to_mask(), stepwise.to_mask())
    assert (fused.indices.diff(dim=-1) > 0).all()
