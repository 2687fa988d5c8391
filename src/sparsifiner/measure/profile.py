"""Measures attention on this machine, dense and sparse, and fits the costs that the choice between them is made by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import AttentionInputs, Policy, attend, build_predictor, tail_groups
from ..attention.cost import Work, work_of
from ..config import SparsifinerConfig
from ..errors import SparsifinerError
from ..geometry.tiling import Tiling
from ..ops.profile import Costs, Profile
from ..predictors import PooledConfig, Predictor
from .latency import Progress, interleave

HEADS, HEAD_DIM = 6, 64
SLOWEST = 0.97
"""Share of dense time that every measured case must stay below where the choice is sparse."""
MOST_MARGIN = 0.95
SETTINGS = (
    SparsifinerConfig(keep_rate=0.1, mode="sparse"),
    SparsifinerConfig(keep_rate=0.3, mode="sparse"),
    SparsifinerConfig(keep_rate=0.1, mode="sparse", query_tile=(8, 8), predictor=PooledConfig(query_pool=(2, 4))),
    SparsifinerConfig(keep_rate=0.1, mode="sparse", predictor="local"),  # type: ignore[arg-type]
)
SIDES = {"cpu": (12, 18, 27, 40, 60), "cuda": (16, 32, 64, 96, 128)}
IMAGES = {"cpu": (1,), "cuda": (1, 8)}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}
BACKENDS = {"cpu": "native", "cuda": "triton"}
# Largest relative L2 error of a layer against float64, per dtype: a few roundings of its mantissa.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
LEAST_OVERLAP = 0.9


@dataclass(frozen=True)
class Case:
    """One layer that was measured: its settings, its work for one image, and seconds of all images."""

    settings: SparsifinerConfig
    images: int
    num_tokens: int
    work: Work
    dense_s: float
    sparse_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "settings": self.settings.to_dict(),
            "images": self.images,
            "num_tokens": self.num_tokens,
            "dense_s": self.dense_s,
            "sparse_s": self.sparse_s,
        }


def measure_profiles(
    device: torch.device,
    *,
    sides: Sequence[int] | None = None,
    repeats: int = 5,
    max_seconds: float = 60.0,
    progress: Progress | None = None,
) -> dict[str, Profile]:
    """Profiles of a device by dtype, from interleaved runs of attention layers on random tensors.

    On a GPU the kernels are first held against plain PyTorch in float64, since nobody may have run them on such a card.

    Args:
        device: a CPU, or a CUDA GPU.
        sides: sides of the square patch grids to measure, patches.
        repeats: pairs of runs per case.
        max_seconds: no further case is started after so long.
        progress: called with the cases measured and their number.

    Returns:
        By dtype; one whose kernels cannot run here, or are wrong, is missing.

    Raises:
        SparsifinerError: if no kernel can be measured here; the message has the reason for each dtype.
    """
    kind = device.type
    sides = SIDES[kind] if sides is None else sides
    found: dict[str, Profile] = {}
    reasons = []
    dtypes = DTYPES[kind]
    total, done, start = len(dtypes) * len(IMAGES[kind]) * len(sides) * len(SETTINGS), 0, time.perf_counter()
    for number, dtype in enumerate(dtypes):
        name = str(dtype).removeprefix("torch.")
        reason = _why_wrong(device, dtype)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            continue
        until = start + max_seconds * (number + 1) / len(dtypes)
        costs, cases = [], []
        for images in IMAGES[kind]:
            measured: list[Case] = []
            for side in sides:  # small ones first, so that whatever time there is serves all settings
                for settings in SETTINGS:
                    if time.perf_counter() < until or len(measured) < 2 * len(SETTINGS):
                        measured.append(_measure(settings, side, images, device, dtype, repeats))
                    done += 1
                    if progress is not None:
                        progress(done, total)
            costs.append(fit(measured))
            cases += measured
        margin = safe_margin([(max(case.work.share(item) for item in costs), case) for case in cases])
        found[name] = Profile(BACKENDS[kind], tuple(costs), margin, [case.to_dict() for case in cases])
    if not found:
        raise SparsifinerError(f"there is nothing to measure on {device}: {'; '.join(reasons)}")
    return found


def fit(cases: Sequence[Case]) -> Costs:
    """Costs, in seconds for one image, that come closest to what was measured, by relative error; none negative."""
    dense_s = [case.dense_s / case.images for case in cases]
    sparse_s = [case.sparse_s / case.images for case in cases]
    dense, dense_call = _nonnegative([[case.work.dense, 1.0] for case in cases], dense_s)
    rows = [[w.attend, w.score, w.elements, w.regroup, 1.0] for w in (case.work for case in cases)]
    attend, score, element, regroup, call = _nonnegative(rows, sparse_s)
    return Costs(attend, score, element, regroup, call, dense, dense_call)


def safe_margin(predicted: Sequence[tuple[float, Case]]) -> float:
    """The predicted share of dense time below which every case really took less than dense, with a little to spare."""
    losers = [share for share, case in predicted if case.sparse_s > SLOWEST * case.dense_s]
    return min([MOST_MARGIN, *losers])


def _measure(
    settings: SparsifinerConfig, side: int, images: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> Case:
    inputs, layer = _layer(settings, side, images, device, dtype, BACKENDS[device.type])
    predictor_macs = _predictor(settings, side).score_macs(HEADS, HEAD_DIM, inputs.tiling)
    with torch.inference_mode():
        timings = interleave(
            lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale),
            layer,
            repeats=repeats,
            warmup=2,
        )
    work = work_of(settings, HEADS, HEAD_DIM, inputs.tiling, predictor_macs)
    dense, sparse = statistics.median(timings.dense), statistics.median(timings.sparse)
    return Case(settings, images, inputs.tiling.num_tokens, work, dense, sparse)


def _layer(
    settings: SparsifinerConfig,
    side: int,
    images: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    like: AttentionInputs | None = None,
) -> tuple[AttentionInputs, Callable[[], Tensor]]:
    """Random q, k, v as the packed projection leaves them, with a class token, or those of ``like``; a sparse layer."""
    tiling = Tiling((side, side), settings.query_tile, 1)
    if like is None:
        generator = torch.Generator().manual_seed(0)
        packed = torch.randn(images, tiling.num_tokens, 3, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (x.to(dtype) for x in (like.q, like.k, like.v))
    inputs = AttentionInputs(q, k, v, tiling, HEAD_DIM**-0.5, backend=backend)
    predictor = _predictor(settings, side).to(device, dtype)
    return inputs, lambda: attend(inputs, predictor, settings, policy=Policy("sparse"))


def _why_wrong(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot be measured in a dtype, or None: they do not run, or plain PyTorch computes otherwise.

    A layer of random keys, among which nothing is nearly equal, is held against float64; the predictor's choice against
    that of the references in the same dtype, from which rounding may part it at near ties.
    """
    backend = BACKENDS[device.type]
    fixed = SparsifinerConfig(keep_rate=0.2, mode="sparse", predictor="random")  # type: ignore[arg-type]
    try:
        with torch.inference_mode():
            inputs, layer = _layer(fixed, 12, 1, device, dtype, backend)
            want = _layer(fixed, 12, 1, device, torch.float64, "reference", inputs)[1]()
            error = float((layer().double() - want).norm() / want.norm())
            kept = [_kept(SETTINGS[0], 12, device, dtype, name) for name in (backend, "reference")]
    except (RuntimeError, ValueError) as failure:
        return str(failure).splitlines()[0]
    if not error <= TOLERANCES[dtype]:
        return f"the kernels are off by {error:.2g} here, {TOLERANCES[dtype]:g} was expected; please report it"
    same = float((kept[0] & kept[1]).sum() / kept[1].sum())
    if same < LEAST_OVERLAP:
        return f"the kernels choose {same:.0%} of the keys that plain PyTorch does, {LEAST_OVERLAP:.0%} was expected"
    return None


def _kept(settings: SparsifinerConfig, side: int, device: torch.device, dtype: torch.dtype, backend: str) -> Tensor:
    """Mask ``[1, H, N, N]`` of the keys that the predictor keeps."""
    inputs, _ = _layer(settings, side, 1, device, dtype, backend)
    predictor = _predictor(settings, side).to(device, dtype)
    return predictor(inputs, tail_groups(settings.tail, inputs)).to_mask()


def _predictor(settings: SparsifinerConfig, side: int) -> Predictor:
    return build_predictor(settings, num_heads=HEADS, head_dim=HEAD_DIM, grid=(side, side), num_prefix_tokens=1)


def _nonnegative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Factors of each column, none negative, whose sums come closest to ``seconds`` by relative error.

    Non-negative least squares by coordinate descent: the problem is convex and has seven unknowns at most.
    """
    a = numpy.array(rows, float) / numpy.array(seconds)[:, None]
    scale = numpy.abs(a).max(0)
    scale[scale == 0] = 1.0  # work that no case has
    a = a / scale
    gram, target = a.T @ a, a.sum(0)
    x = numpy.zeros(a.shape[1])
    for _ in range(10_000):
        before = x.copy()
        for i in range(len(x)):
            if gram[i, i] > 0:
                x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if numpy.abs(x - before).max() < 1e-10:
            break
    return [float(value) for value in x / scale]
