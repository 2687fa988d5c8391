"""Measurements of dense and sparse models: FLOPs, latency, memory, fidelity, accuracy."""

from .crossover import BreakEven, break_even
from .fidelity import Fidelity, ImageFidelity, measure_fidelity
from .flops import FlopReport, LayerFlops, count_flops
from .latency import Timings, compare_latency, interleave
from .memory import PeakMemory, measure_memory

__all__ = [
    "BreakEven",
    "Fidelity",
    "FlopReport",
    "ImageFidelity",
    "LayerFlops",
    "PeakMemory",
    "Timings",
    "break_even",
    "compare_latency",
    "count_flops",
    "interleave",
    "measure_fidelity",
    "measure_memory",
]
