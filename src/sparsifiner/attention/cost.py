"""Expected time of sparse attention against dense attention, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..config import SparsifinerConfig
from ..geometry.counting import num_kept
from ..geometry.tiling import Tiling
from ..ops import cpu
from ..ops.attend import ATTEND
from ..ops.group_patches import grouping_macs
from ..ops.inputs import AttentionInputs
from ..ops.profile import Costs, find_profile
from ..ops.registry import AUTO, refusal

# Sparse must be predicted to take less than this share of dense: the model of the cost is 15 to 25 % off.
MARGIN = 0.9


# In units of a multiply-add of dense attention, fitted by ``benchmarks/cost.py`` to interleaved measurements on 2 cores
# with AVX-512 and bfloat16 products; ratios of one CPU to itself, which carry over better than times. ``regroup`` was
# measured by itself on 2 cores with AVX2. AMX has constants of its own where it is used, for bfloat16: its dense
# attention is four times as fast. They follow from the parts of two layers of 4,096 tokens on 2 cores
# (``benchmarks/results/speed-amx.json``).
_COSTS = {
    torch.float32: Costs(attend=0.79, score=1.74, element=420.0, regroup=8.2, call=17e6),
    torch.bfloat16: Costs(attend=0.35, score=0.97, element=340.0, regroup=5.7, call=11e6),
}
_AMX_COSTS = Costs(attend=1.6, score=2.8, element=340.0, regroup=22.0, call=42e6)


def costs_of(dtype: torch.dtype, level: str | None) -> Costs:
    """Costs of the kernels of the instruction set ``level`` in float32 or bfloat16."""
    return _AMX_COSTS if level == "amx" and dtype == torch.bfloat16 else _COSTS[dtype]


def sparse_pays(config: SparsifinerConfig, inputs: AttentionInputs, score_macs: int) -> bool:
    """True where a sparse layer is expected to beat dense attention for ``inputs`` on the kernels that serve them.

    The answer depends on shapes, dtype, settings and the machine's profile, where there is one: never on the clock, so
    that a model's output does not depend on how busy a machine is, and never on the batch size, so that an image's does
    not depend on its neighbours. Without a profile a table serves CPUs, and a GPU is taken to be faster dense: in plain
    PyTorch sparse attention never pays (an H200 takes 24 times as long as with dense attention at 5,476 tokens and 17
    times at 256), and how fast kernels for it are is known once they have run on the card.

    Args:
        config: settings of the layer.
        inputs: of the attention call.
        score_macs: multiply-adds of the predictor for one image.
    """
    q = inputs.q
    profile = find_profile(q.device.type, q.device.index, q.dtype) if config.use_profile else None
    backend = "native" if profile is None else profile.backend
    if refusal(ATTEND, backend, False, {"q": q, "attn_bias": inputs.attn_bias}) is not None:
        return False
    if q.device.type != "cpu" and inputs.backend not in (AUTO, backend):
        return False
    heads, width = q.shape[1], q.shape[3]
    if profile is None:
        costs = costs_of(q.dtype, cpu.level())
        return predicted_share(config, costs, heads, width, inputs.tiling, score_macs) < MARGIN
    shares = (predicted_share(config, costs, heads, width, inputs.tiling, score_macs) for costs in profile.costs)
    return max(shares) < profile.margin


@dataclass(frozen=True)
class Work:
    """What :class:`Costs` are multiplied by, for one layer and one image; all but ``elements`` are multiply-adds."""

    attend: int
    score: int
    elements: int
    regroup: int
    dense: int

    def share(self, costs: Costs) -> float:
        """Time of the sparse layer's attention over that of dense attention."""
        sparse = (
            costs.attend * self.attend
            + costs.score * self.score
            + costs.element * self.elements
            + costs.regroup * self.regroup
            + costs.call
        )
        return sparse / (costs.dense * self.dense + costs.dense_call)


def predicted_share(
    config: SparsifinerConfig, costs: Costs, heads: int, width: int, tiling: Tiling, score_macs: int
) -> float:
    """Predicted time of a sparse layer's attention over that of dense attention, for one image (:func:`work_of`)."""
    return work_of(config, heads, width, tiling, score_macs).share(costs)


def work_of(config: SparsifinerConfig, heads: int, width: int, tiling: Tiling, score_macs: int) -> Work:
    """The work of a layer's attention, sparse and dense, for one image.

    Args:
        config: settings of the layer.
        heads: heads of the layer.
        width: width of a head.
        tiling: query tiles of the input.
        score_macs: multiply-adds of the predictor.
    """
    assert isinstance(config.keep_rate, float)
    kept = num_kept(config.keep_rate, tiling.num_patches + tiling.num_missing)
    keys = min(kept, tiling.num_patches) + tiling.num_prefix_tokens
    regroup_macs = 0
    if config.tail is not None:
        blocks = tiling.regions(config.tail.block)
        keys += blocks.num_tiles
        regroup_macs = heads * grouping_macs(blocks, width, config.tail.refine)
    lanes = math.ceil(tiling.tile_size / 16) * 16  # queries lie in the lanes of vectors of 16
    return Work(
        attend=2 * heads * width * tiling.num_tiles * lanes * keys,
        score=score_macs,
        elements=heads * width * tiling.num_tokens,
        regroup=regroup_macs,
        dense=2 * heads * width * tiling.num_tokens**2,
    )
