"""Speed of sparse attention on this machine: the operator, its layer, and whole models, beside dense attention."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.copying import copy_model
from .._utils.photos import input_channels
from ..attention import AttentionInputs, Policy, attend, build_predictor, tail_groups
from ..config import SparsifinerConfig
from ..convert import sparsify
from ..geometry.tiling import Tiling
from ..ops import sparse_attention
from ..ops.connectivity import Connectivity
from ..ops.tail import KeyGroups, Tail
from ..runtime import compile_ahead
from .latency import Progress, interleave_all


@dataclass(frozen=True)
class Measured:
    """Things that ran in turn in one process.

    Args:
        title: what was measured, for people.
        settings: the same for machines.
        seconds: of each run, by name.
        reference: the name that ratios refer to.
    """

    title: str
    settings: dict[str, Any]
    seconds: dict[str, list[float]]
    reference: str

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str) -> float:
        """Median of the reference over the median of ``name``; above 1 ``name`` is faster."""
        return self.median(self.reference) / self.median(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, seconds."""
        return {
            "title": self.title,
            "settings": self.settings,
            "reference": self.reference,
            "median_s": {name: self.median(name) for name in self.seconds},
            "speedup": {name: self.speedup(name) for name in self.seconds},
            "seconds": self.seconds,
        }


def measure_operator(
    grid: tuple[int, int],
    config: SparsifinerConfig,
    *,
    heads: int = 6,
    head_dim: int = 64,
    batch: int = 1,
    num_prefix_tokens: int = 1,
    repeats: int = 9,
    max_seconds: float = math.inf,
    min_repeats: int = 3,
    progress: Progress | None = None,
) -> list[Measured]:
    """One attention layer without its projections, on random q, k, v laid out as the packed projection leaves them.

    In float32 and in bfloat16: ``scaled_dot_product_attention``, the sparse operator alone, prediction with
    selection, pooling, and all three together ("layer").

    Args:
        grid: rows and columns of the patch grid.
        config: settings of the sparse layer, one keep rate.
        heads: attention heads.
        head_dim: width of a head.
        batch: images.
        num_prefix_tokens: class and register tokens.
        repeats: interleaved rounds.
        max_seconds: no further round of a dtype is started after so long...
        min_repeats: ...but so many are run in any case.
        progress: called with the rounds timed and their number.
    """
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        work = _operator_work(grid, config, dtype, heads, head_dim, batch, num_prefix_tokens)
        with torch.inference_mode():
            seconds = interleave_all(
                work, repeats=repeats, warmup=1, max_seconds=max_seconds, min_repeats=min_repeats, progress=progress
            )
        name = str(dtype).removeprefix("torch.")
        tokens = num_prefix_tokens + grid[0] * grid[1]
        settings = {
            "grid": list(grid),
            "num_tokens": tokens,
            "heads": heads,
            "head_dim": head_dim,
            "batch": batch,
            "dtype": name,
            "config": config.to_dict(),
        }
        title = (
            f"attention of {tokens} tokens, {heads} heads of {head_dim}, batch {batch}, keep {config.keep_rate}, {name}"
        )
        found.append(Measured(title, settings, seconds, "dense"))
    return found


def _operator_work(
    grid: tuple[int, int],
    config: SparsifinerConfig,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    batch: int,
    num_prefix_tokens: int,
) -> dict[str, Callable[[], object]]:
    tiling = Tiling(grid, config.query_tile, num_prefix_tokens)
    predictor = build_predictor(
        config, num_heads=heads, head_dim=head_dim, grid=grid, num_prefix_tokens=num_prefix_tokens
    ).to(dtype)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, tiling.num_tokens, 3, heads, head_dim, generator=generator).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    scale = head_dim**-0.5

    def tail_of(groups: KeyGroups | None, keys: Connectivity) -> Tail | None:
        return None if groups is None else groups.tail(keys)

    inputs = AttentionInputs(q, k, v, tiling, scale, backend=config.backend)
    with torch.inference_mode():
        groups = tail_groups(config.tail, inputs)
        chosen = predictor(inputs, groups)
        pooled = tail_of(groups, chosen)

    work: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
        "operator": lambda: sparse_attention(q, k, v, chosen, tail=pooled, scale=scale),
        "predict and select": lambda: predictor(inputs, groups),
    }
    if groups is not None:
        work["pool the tail"] = lambda: tail_of(tail_groups(config.tail, inputs), chosen)
    return {**work, "layer": lambda: attend(inputs, predictor, config, policy=Policy("sparse"))}


def measure_model(
    dense: nn.Module,
    configs: Mapping[str, SparsifinerConfig],
    image_size: tuple[int, int],
    *,
    title: str,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    repeats: int = 5,
    max_seconds: float = math.inf,
    min_repeats: int = 3,
    progress: Progress | None = None,
) -> Measured:
    """A whole model, dense and sparse in one or more ways, on a random image.

    Args:
        dense: a dense model; it is copied.
        configs: settings of the sparse models by name, all of the same keep rate.
        image_size: rows and columns in pixels.
        title: the model's name.
        batch: images at once.
        dtype: of weights and images.
        compiled: whether to measure all of them under ``torch.compile`` and compiled ahead of time as well; that
            compiles for minutes.
        repeats: interleaved rounds.
        max_seconds: no further round is started after so long...
        min_repeats: ...but so many are run in any case.
        progress: called with the rounds timed and their number.
    """
    dense = copy_model(dense).eval().to(dtype)
    models: dict[str, Callable[[Tensor], Tensor]] = {"dense": dense}
    models |= {name: sparsify(dense, config) for name, config in configs.items()}
    x = torch.randn(batch, input_channels(dense), *image_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    if compiled:
        eager: dict[str, Any] = dict(models)
        models |= {f"{name}, compiled": torch.compile(model, fullgraph=True) for name, model in eager.items()}
        models |= {f"{name}, ahead of time": compile_ahead(model, x) for name, model in eager.items()}

    def run(model: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: model(x)

    with torch.inference_mode():
        work = {name: run(model) for name, model in models.items()}
        seconds = interleave_all(
            work, repeats=repeats, warmup=1, max_seconds=max_seconds, min_repeats=min_repeats, progress=progress
        )
    name = str(dtype).removeprefix("torch.")
    settings = {
        "model": title,
        "image_size": list(image_size),
        "batch": batch,
        "dtype": name,
        "configs": {label: config.to_dict() for label, config in configs.items()},
    }
    keep_rate = next(iter(configs.values())).keep_rate
    pixels = f"{image_size[0]} px" if image_size[0] == image_size[1] else f"{image_size[0]}x{image_size[1]} px"
    return Measured(f"{title}, {pixels}, batch {batch}, {name}, keep {keep_rate}", settings, seconds, _fastest(seconds))


def _fastest(seconds: dict[str, list[float]]) -> str:
    """The fastest of the dense models, eager and compiled: the one to beat."""
    dense = [name for name in seconds if name.startswith("dense")]
    return min(dense, key=lambda name: statistics.median(seconds[name]))
