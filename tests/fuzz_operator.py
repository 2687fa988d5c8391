"""Random calls of the operator: every backend against the float64 reference, whatever the shapes and strides."""

from __future__ import annotations

import dataclasses
import random

import torch
from test_operator import FAST, Problem, epsilon_error, make
from torch import Tensor

from sparsifiner import Connectivity, Tail
from sparsifiner.ops import why_not

BUDGETS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 8, torch.float16: 16}
"""In units of the precision, relative to the values; those of ``test_operator.py``."""


def draw(rng: random.Random) -> Problem:
    """Ragged grids, single rows and columns, no to five prefix tokens, one key to all of them."""
    grid = rng.choice(
        [(1, 1), (1, rng.randint(1, 40)), (rng.randint(1, 40), 1), (rng.randint(1, 13), rng.randint(1, 13))]
    )
    tile, block = ((min(rng.randint(1, 6), grid[0]), min(rng.randint(1, 6), grid[1])) for _ in range(2))
    problem = make(
        grid=grid,
        tile=tile,
        block=rng.choice([None, block]),
        prefix=rng.choice([0, 0, 1, 2, 5]),
        batch=rng.randint(1, 3),
        heads=rng.randint(1, 4),
        width=rng.choice([1, 3, 8, 16, 32, 48, 64, 80, 112, 128, 144]),
        keys=rng.choice([1, 2, rng.randint(1, 200), 10**6]),
        padding=rng.random() < 0.3,
        bias=rng.random() < 0.3,
        seed=rng.randrange(2**20),
    )  # fmt: skip
    size = rng.choice([1.0, 1.0, 1.0, 1e-3, 5.0])
    return dataclasses.replace(problem, q=problem.q * size, k=problem.k * size)


def strided(x: Tensor, rng: random.Random) -> Tensor:
    """The same values laid out as projections, slices and transposed tensors leave them."""
    batch, heads, tokens, width = x.shape
    kind = rng.randrange(7)
    if kind == 0:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:  # packed: [B, N, 3, H, D]
        packed = torch.full((batch, tokens, 3, heads, width), 7.0).to(x.dtype)
        packed[:, :, 1] = x.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)
    if kind == 2:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 3:  # rows that begin at an odd element of a larger buffer
        buffer = torch.full((batch, heads, tokens, width + 3), 7.0).to(x.dtype)
        buffer[..., 1 : width + 1] = x
        return buffer[..., 1 : width + 1]
    if kind == 4:  # every other element
        buffer = torch.full((batch, heads, tokens, 2 * width), 7.0).to(x.dtype)
        buffer[..., ::2] = x
        return buffer[..., ::2]
    if kind == 5:
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return x


def relaid(problem: Problem, rng: random.Random) -> Problem:
    tail = problem.tail and Tail(strided(problem.tail.k, rng), strided(problem.tail.v, rng), problem.tail.bias)
    q, k, v = (strided(x, rng) for x in (problem.q, problem.k, problem.v))
    return dataclasses.replace(problem, q=q, k=k, v=v, tail=tail)


def of_image(problem: Problem, number: int) -> Problem:
    pick = slice(number, number + 1)
    tail, old, bias = problem.tail, problem.connectivity, problem.attn_bias
    return Problem(
        problem.q[pick], problem.k[pick], problem.v[pick],
        Connectivity(old.tiling, old.indices[pick], None if old.bias is None else old.bias[pick]),
        tail and Tail(tail.k[pick], tail.v[pick], tail.bias[pick]),
        bias if bias is None or len(bias) == 1 else bias[pick],
    )  # fmt: skip


def poisoned(problem: Problem, number: int, rng: random.Random) -> Problem:
    """One row of one image's queries, keys or values is NaN or infinite."""
    name = rng.choice("qkv")
    x = getattr(problem, name).clone()
    x[number, rng.randrange(x.shape[1]), rng.randrange(x.shape[2])] = rng.choice(
        [float("nan"), float("inf"), -float("inf")]
    )
    return dataclasses.replace(problem, **{name: x})


def run(seed: int) -> str:
    """One random problem in every precision by every backend that serves it.

    Raises:
        AssertionError: if one is wrong, or an image's answer depends on its neighbours.
    """
    rng = random.Random(seed)
    problem, done = draw(rng), []
    logits = problem.q.norm(dim=-1).max().item() * problem.k.norm(dim=-1).max().item() * problem.q.shape[-1] ** -0.5
    for dtype, budget in BUDGETS.items():
        rounded = problem.to(dtype)
        exact = rounded.to(torch.float64).run("reference")
        # Rounding of logits grows with them, and the exponential makes their absolute error a relative one.
        budget *= max(1.0, logits / 8)
        laid = relaid(rounded, rng)
        for backend in FAST:
            if why_not(backend, laid.q, attn_bias=laid.attn_bias) is not None:
                continue
            what = f"seed {seed}: {backend}, {dtype}, {list(laid.q.shape)}, {laid.connectivity.tiling}"
            try:
                with torch.inference_mode():
                    got = laid.run(backend)
                    assert got.shape == problem.q.shape
                    error = epsilon_error(got, exact)
                    assert error < budget, f"{error:.1f} units off, {budget} are allowed"
                    number = rng.randrange(len(got))
                    alone = of_image(laid, number).run(backend)
                    error = epsilon_error(alone, got[number : number + 1].double())
                    assert error < budget, f"{error:.1f} units off when alone"
                    other = poisoned(laid, number, rng).run(backend)
                    rest = [place for place in range(len(got)) if place != number]
                    error = epsilon_error(other[rest], exact[rest]) if rest else 0.0
                    assert error < budget, f"{error} units off beside an image with NaN or infinities"
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
            done.append(f"{backend} {dtype}".replace("torch.", ""))
    return f"seed {seed}: {', '.join(done)}"
