"""Time of attention, one layer alone, for settings that have not been run in a whole model."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attention import AttentionInputs, Policy, attend, build_predictor, dense_attention
from ..config import SparsifinerConfig
from ..convert import sparse_layers
from ..geometry.tiling import Tiling
from ..measure.latency import interleave_all
from ..recording import observable_twin, record

RATES = (0.03, 0.12, 0.4)
"""Keep rates at which a layer is timed; times in between are interpolated, and they are nearly linear."""


class AttentionTimes:
    """Measured seconds of one attention layer by its settings, on q, k and v of a real image.

    Args:
        dense: the model.
        x: a batch of images.
    """

    def __init__(self, dense: nn.Module, x: Tensor) -> None:
        twin = observable_twin(dense)
        with torch.inference_mode(), record(twin, tensors=True) as seen:
            twin.forward_features(x)  # type: ignore[operator]
        layers = sparse_layers(twin)
        name = list(seen)[len(seen) // 2]
        layer, did = layers[name], seen[name]
        q, k, v = (tensor for tensor in (did.q, did.k, did.v) if tensor is not None)
        self.num_layers = len(layers)
        self.grid, self.num_prefix_tokens, self.scale = layer.grid.shape, layer.grid.num_prefix_tokens, layer.scale
        # As the packed projection leaves them.
        packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
        self._qkv = {torch.float32: packed.float(), torch.bfloat16: packed.bfloat16()}
        self.bias = did.attn_bias
        self._seconds: dict[object, list[float]] = {}
        self._dense: dict[torch.dtype, float] = {}

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        return int(self._qkv[torch.float32].shape[-1])

    def dense(self, dtype: torch.dtype) -> float:
        """Seconds of dense attention in one layer."""
        if dtype not in self._dense:
            inputs = self._inputs(SparsifinerConfig(query_tile=(1, 1)), dtype)
            times = _time({"dense": lambda: dense_attention(inputs)})
            self._dense[dtype] = times["dense"]
        return self._dense[dtype]

    def known(self, config: SparsifinerConfig, dtype: torch.dtype) -> bool:
        """True if :meth:`sparse` need not run anything."""
        return self._key(config, dtype) in self._seconds

    def sparse(self, config: SparsifinerConfig, dtype: torch.dtype) -> float:
        """Seconds of all layers' sparse attention together.

        Args:
            config: settings, with one keep rate or one per layer.
            dtype: of the model.
        """
        key = self._key(config, dtype)
        if key not in self._seconds:
            work: dict[str, Callable[[], object]] = {}
            for rate in RATES:
                own = config.replace(keep_rate=rate)
                work[str(rate)] = self._work(own, dtype)
            self._seconds[key] = list(_time(work).values())
        known = self._seconds[key]
        rates = config.keep_rate if isinstance(config.keep_rate, tuple) else (config.keep_rate,) * self.num_layers
        return sum(_interpolated(known, rate) for rate in rates)

    def _key(self, config: SparsifinerConfig, dtype: torch.dtype) -> object:
        return config.replace(keep_rate=0.1), dtype

    def _inputs(self, config: SparsifinerConfig, dtype: torch.dtype) -> AttentionInputs:
        tiling = Tiling(self.grid, config.query_tile, self.num_prefix_tokens)
        q, k, v = self._qkv[dtype].permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if self.bias is None else self.bias.to(dtype)
        return AttentionInputs(q, k, v, tiling, self.scale, bias, config.backend)

    def _work(self, config: SparsifinerConfig, dtype: torch.dtype) -> Callable[[], object]:
        inputs = self._inputs(config, dtype)
        predictor = build_predictor(
            config, num_heads=inputs.q.shape[1], head_dim=self.head_dim, grid=self.grid,
            num_prefix_tokens=self.num_prefix_tokens,
        ).to(dtype)  # fmt: skip
        return lambda: attend(inputs, predictor, config, policy=Policy("sparse"))


def _time(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds by name: medians of interleaved runs."""
    with torch.inference_mode():
        times = interleave_all(work, repeats=7, warmup=1, max_seconds=1.0, min_repeats=3)
    return {name: statistics.median(values) for name, values in times.items()}


def _interpolated(known: list[float], rate: float) -> float:
    (low, middle, high), (at_low, at_middle, at_high) = known, RATES
    if rate <= at_middle:
        slope = (middle - low) / (at_middle - at_low)
        return max(middle + (rate - at_middle) * slope, 0.5 * low)
    return middle + (rate - at_middle) * (high - middle) / (at_high - at_middle)
