"""The operator and its selection beside dense attention: interleaved runs in one process, medians and ratios.

python benchmarks/sparse_operator.py --tokens 64 64 --tile 4 8 --keep 0.1 --tail 4 8 --json results.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparsifiner import SparsifinerConfig, Tiling, cpu, sparse_attention
from sparsifiner.connectivity import pool_tail
from sparsifiner.predictors import build_predictor
from sparsifiner.selection import top_keys


def interleaved(work: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each; one run of each in turn, so that a busy machine slows all alike."""
    for run in work.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    tiling = Tiling(tuple(args.tokens), tuple(args.tile), args.prefix)
    n, h, d = tiling.num_tokens, args.heads, args.width
    config = SparsifinerConfig(
        keep_rate=args.keep, query_tile=tuple(args.tile), tail=tuple(args.tail), query_pool=tuple(args.pool)
    )
    predictor = build_predictor(config, num_heads=h, head_dim=d, grid=tiling.grid, num_prefix_tokens=args.prefix)
    qkv = torch.randn(1, n, 3 * h * d).to(dtype)
    q, k, v = qkv.unflatten(-1, (3, h, d)).permute(2, 0, 3, 1, 4).unbind(0)
    scale = d**-0.5
    connectivity = predictor(q, k, v, tiling, scale)
    tail = pool_tail(k, v, connectivity, config.tail)
    scores = torch.randn(1, h, tiling.num_tiles, n).softmax(-1)
    count = math.ceil(args.keep * n)

    def layer(backend: str) -> torch.Tensor:
        chosen = predictor(q, k, v, tiling, scale)
        return sparse_attention(
            q, k, v, chosen, tail=pool_tail(k, v, chosen, config.tail), scale=scale, backend=backend
        )

    work: dict[str, Callable[[], object]] = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
        "native operator": lambda: sparse_attention(q, k, v, connectivity, tail=tail, scale=scale, backend="native"),
        "native layer": lambda: layer("native"),
        "prediction": lambda: predictor(q, k, v, tiling, scale),
        "tail": lambda: pool_tail(k, v, connectivity, config.tail),
        "torch.topk": lambda: scores.topk(count, dim=-1, sorted=False),
        "native top-k": lambda: top_keys(scores, count),
    }
    if args.gather:
        work["gather operator"] = lambda: sparse_attention(
            q, k, v, connectivity, tail=tail, scale=scale, backend="gather"
        )
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    with torch.inference_mode():
        times = interleaved(work, args.repeats, clock)
    dense = times["dense SDPA"]
    for name, value in times.items():
        versus = times["torch.topk"] if "top" in name else dense
        print(f"{str(dtype).removeprefix('torch.'):9} {name:16} {value:9.2f} ms   {versus / value:6.2f} x")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs=2, default=[64, 64], help="rows and columns of the patch grid")
    parser.add_argument("--prefix", type=int, default=0)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tile", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--tail", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--pool", type=int, nargs=2, default=[4, 4], help="query sub-blocks pooled before scoring")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="with 1, CPU time is measured")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--gather", action="store_true", help="measure the gather backend as well")
    parser.add_argument("--json", help="write the medians to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"level {cpu.level()} of {', '.join(cpu.levels())}; {args.threads} threads; torch {torch.__version__}")
    results = {str(dtype): measure(args, dtype) for dtype in (torch.float32, torch.bfloat16)}
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "level": cpu.level(), "milliseconds": results}, file, indent=2)


if __name__ == "__main__":
    main()
