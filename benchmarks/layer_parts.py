"""Time of each part of one sparse layer, on the queries, keys and values of the built-in model.

    python benchmarks/layer_parts.py benchmarks/results/layer-parts.json

Pooling the tail, grouping the queries, choosing the keys, counting what was not kept and attending in every precision,
beside dense attention, interleaved in one process: medians in milliseconds at 1,369 and 5,476 patches. The photograph
ships with the package.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner import SparsifinerConfig, sparse_layers, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.photos import load_photos, preprocess
from sparsifiner.attention import AttentionInputs, build_predictor, tail_groups
from sparsifiner.measure.latency import interleave_all
from sparsifiner.models import load_model
from sparsifiner.ops import cpu, group_queries, sparse_attention
from sparsifiner.predictors import PooledConfig
from sparsifiner.predictors.pooled import PooledPredictor
from sparsifiner.report.machine import this_machine

SIZES = (518, 1036)
LAYER = 5
SETTINGS = {
    "4x4 tiles, 4 groups": SparsifinerConfig(mode="sparse"),
    "4x4 tiles, 4 groups, budget of the layer": SparsifinerConfig(
        mode="sparse", predictor=PooledConfig(budget="layer")
    ),
    "8x8 tiles, 8 groups": SparsifinerConfig(
        mode="sparse", query_tile=(8, 8), predictor=PooledConfig(query_pool=(2, 4))
    ),
}


def captured(size: int) -> AttentionInputs:
    """What attention of layer ``LAYER`` gets from the first photograph."""
    model = load_model("builtin", img_size=(size, size))
    photo = load_photos(Path(str(files("sparsifiner"))) / "data" / "photos").photos[0]
    sparse = sparsify(model, SparsifinerConfig(mode="dense"))
    layer = list(sparse_layers(sparse).values())[LAYER]
    seen: list[AttentionInputs] = []
    attend = layer.attend

    def watch(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        seen.append(layer.inputs(q, k, v, attn_bias))
        return attend(q, k, v, attn_bias)

    layer.attend = watch  # type: ignore[method-assign]
    with torch.no_grad():
        sparse(preprocess(model, (size, size))(photo.image)[None])
    return seen[0]


def parts(inputs: AttentionInputs, config: SparsifinerConfig) -> dict[str, Callable[[], object]]:
    """The parts of a layer with the settings ``config``."""
    inputs = inputs.replace(tiling=inputs.tiling.regions(config.query_tile))
    q, k, v, scale, tiling = inputs.q, inputs.k, inputs.v, inputs.scale, inputs.tiling
    predictor = build_predictor(
        config, num_heads=q.shape[1], head_dim=q.shape[3], grid=tiling.grid, num_prefix_tokens=tiling.num_prefix_tokens
    )
    assert isinstance(predictor, PooledPredictor)
    groups = tail_groups(config.tail, inputs)
    assert groups is not None
    connectivity = predictor(inputs, groups)
    tail = groups.tail(connectivity)
    starts = predictor._groups_at_first(tiling, q.device)
    found: dict[str, Callable[[], object]] = {
        "pool the tail": lambda: tail_groups(config.tail, inputs),
        "group the queries": lambda: group_queries(q, *starts, 2),
        "predict, grouping included": lambda: predictor(inputs, groups),
        "count what was not kept": lambda: groups.tail(connectivity),
    }
    for precision in ("same", *(name for name in cpu.precisions() if name != "same")):
        found[f"attend, {precision}"] = partial(
            sparse_attention, q, k, v, connectivity, tail=tail, scale=scale, precision=precision
        )
    found["dense"] = lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    measured: dict[str, dict[str, float]] = {}
    for size in SIZES:
        inputs = captured(size)
        for name, config in SETTINGS.items():
            with torch.inference_mode():
                seconds = interleave_all(parts(inputs, config), repeats=arguments.repeats, warmup=1)
            milliseconds = {part: round(1e3 * statistics.median(times), 3) for part, times in seconds.items()}
            measured[f"{size} px, {name}"] = milliseconds
            print(f"{size} px, {name}: {milliseconds}", flush=True)
    results = {
        "machine": asdict(this_machine(torch.device("cpu"))),
        "level": cpu.level(),
        "keep_rate": SparsifinerConfig().keep_rate,
        "milliseconds": measured,
    }
    write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
