"""The fast form of a sparse model without a search: the best preset for this machine's instructions."""

from __future__ import annotations

from importlib.util import find_spec

from ..config import SparsifinerConfig
from ..ops import cpu
from ..predictors import PooledConfig
from ..runtime import Runtime

ROOM = 4
"""Larger tiles from so many of them along each side of the patch grid on."""


def fast_preset(config: SparsifinerConfig, grid: tuple[int, int]) -> tuple[SparsifinerConfig, Runtime] | str:
    """Settings and runtime of the fast form on this CPU, or why there is none.

    bfloat16 throughout where the CPU has such products, which needs no compilation; elsewhere int8 linears, which do.
    Tiles are 8x8 with eight query groups where the settings are the default ones and the patch grid has room.

    Args:
        config: settings of the float32 model.
        grid: rows and columns of patches.
    """
    default = SparsifinerConfig()
    if config.query_tile == default.query_tile and config.predictor == default.predictor and min(grid) >= 8 * ROOM:
        config = config.replace(query_tile=(8, 8), predictor=PooledConfig(query_pool=(2, 4)))
    if "bfloat16" in cpu.precisions():
        return config, Runtime(activations="bfloat16")
    if find_spec("torchao") is None:
        return "this CPU has no bfloat16 products, and int8 linears need torchao; pip install 'sparsifiner[tune]'"
    return config.replace(attention_dtype="auto"), Runtime(linears="int8", compilation="ahead")
