"""The sparse attention operator and its backends."""

from . import flop_formula as _flop_formula  # noqa: F401  (registers the operators' FLOP formulas)
from .api import BACKENDS, choose_backend, sparse_attention, why_not

__all__ = ["BACKENDS", "choose_backend", "sparse_attention", "why_not"]
