"""The settings a search may choose from: a plain list, and the model that a choice of each describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import SparsifinerConfig, TailConfig
from ..ops import cpu
from ..predictors import PooledConfig
from ..runtime import Runtime

KEEP_RATES = (0.01, 0.5)
"""Smallest and largest keep rate that is tried."""

PRECISIONS: dict[str, Runtime] = {
    "int8": Runtime(linears="int8", compilation="ahead"),
    "bfloat16, int8 linears": Runtime(activations="bfloat16", linears="int8", compilation="ahead"),
    "bfloat16": Runtime(activations="bfloat16", compilation="ahead"),
    "float32": Runtime(compilation="ahead"),
}
"""Runtimes by name, the most promising first: those are probed first where time is short."""


@dataclass(frozen=True)
class Choice:
    """A setting of sparse attention with the values it may take.

    Args:
        name: of the setting.
        values: to choose from, in words; the first is the default.
        apply: the settings with one of these values.
        fits: whether a value can be used on a patch grid of so many rows and columns and on this machine; all if None.
    """

    name: str
    values: tuple[str, ...]
    apply: Callable[[SparsifinerConfig, str], SparsifinerConfig]
    fits: Callable[[str, tuple[int, int]], bool] | None = None


def _predictor(**changes: Any) -> Callable[[SparsifinerConfig], SparsifinerConfig]:
    return lambda config: config.replace(predictor=dataclasses.replace(config.predictor, **changes))


def sides(text: str) -> tuple[int, int]:
    """``"4x8"`` as rows and columns."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _within(value: str, grid: tuple[int, int]) -> bool:
    rows, columns = sides(value)
    return 2 * rows <= grid[0] and 2 * columns <= grid[1]


def _tail(config: SparsifinerConfig, value: str) -> SparsifinerConfig:
    block, _, refine = value.partition(", refined ")
    return config.replace(tail=TailConfig(sides(block), int(refine or 0)))


CHOICES: list[Choice] = [
    Choice(
        "query_tile", ("8x8", "4x4", "4x8", "16x16"), lambda c, v: c.replace(query_tile=sides(v)), _within,
    ),
    Choice("query_pool", ("2x4", "2x2", "4x4"), lambda c, v: _predictor(query_pool=sides(v))(c)),
    Choice("query_refine", ("2", "1", "0"), lambda c, v: _predictor(query_refine=int(v))(c)),
    Choice(
        "tail", ("4x4, refined 2", "4x4, refined 1", "4x4", "3x3, refined 1", "3x3", "2x2"), _tail,
        lambda v, grid: _within(v.partition(",")[0], grid),
    ),
    Choice(
        "attention_dtype", ("bfloat16", "int8", "model"), lambda c, v: c.replace(attention_dtype=v),
        lambda v, grid: v == "model" or v in cpu.precisions(),
    ),
]  # fmt: skip
"""Settings of sparse attention besides the keep rate. A new one is one more entry."""


def usable(choices: list[Choice], grid: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """The values of each choice that fit the patch grid and this machine."""
    return {
        choice.name: tuple(v for v in choice.values if choice.fits is None or choice.fits(v, grid)) or choice.values[:1]
        for choice in choices
    }


def structure(choices: list[Choice], values: Mapping[str, str]) -> SparsifinerConfig:
    """The settings that ``values`` describe, at the default keep rate and always sparse."""
    config = SparsifinerConfig(mode="sparse", predictor=PooledConfig())
    for choice in choices:
        config = choice.apply(config, values[choice.name])
    return config


@dataclass(frozen=True)
class Candidate:
    """A model that may be the result: settings of its attention, None for dense, and of how it runs."""

    config: SparsifinerConfig | None
    runtime: Runtime

    def __str__(self) -> str:
        if self.config is None:
            return f"dense, {self.runtime}"
        config = self.config
        rates = config.keep_rate if isinstance(config.keep_rate, tuple) else (config.keep_rate,)
        by_layer = " by layer" if len(set(rates)) > 1 else ""
        tile = "x".join(map(str, config.query_tile))
        attention = "" if config.attention_dtype == "model" else f", attention {config.attention_dtype}"
        return f"sparse, keep {sum(rates) / len(rates):.3g}{by_layer}, {tile} tiles{attention}, {self.runtime}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what ``tuned.yaml`` holds."""
        return {
            "sparsity": None if self.config is None else self.config.to_dict(),
            "runtime": self.runtime.to_dict(),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Candidate:
        """The inverse of :meth:`to_dict`."""
        config = settings["sparsity"]
        return cls(
            None if config is None else SparsifinerConfig.from_dict(config), Runtime.from_dict(settings["runtime"])
        )
