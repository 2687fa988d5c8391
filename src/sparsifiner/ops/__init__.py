"""The sparse attention operator and its backends."""

from .api import BACKENDS, choose_backend, sparse_attention, why_not

__all__ = ["BACKENDS", "choose_backend", "sparse_attention", "why_not"]
