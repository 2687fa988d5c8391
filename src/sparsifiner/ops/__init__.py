"""The library's operations, one file each, and their backends, one folder each.

A backend is a package in this folder that calls :func:`register_backend` when it is imported; it must not import more
than torch before a kernel runs.
"""

from importlib import import_module
from pkgutil import iter_modules

from . import flop_formula as _flop_formula  # noqa: F401  (registers formulas)
from .attend import choose_backend, sparse_attention, why_not
from .block_distances import block_distances
from .budget_keys import budget_keys
from .count_unkept import count_unkept
from .group_patches import group_patches
from .group_queries import group_queries
from .pool_blocks import pool_blocks
from .pool_groups import pool_groups
from .registry import OPERATIONS, backends, register_backend, registered_backend, serving, unregister_backend
from .screened_keys import screened_keys
from .tile_keys import tile_keys
from .topk import top_keys

for _module in iter_modules(__path__):
    if _module.ispkg:
        import_module(f"{__name__}.{_module.name}")

BACKENDS: tuple[str, ...] = backends()
"""The backends that come with the library."""

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "backends",
    "block_distances",
    "budget_keys",
    "choose_backend",
    "count_unkept",
    "group_patches",
    "group_queries",
    "pool_blocks",
    "pool_groups",
    "register_backend",
    "registered_backend",
    "screened_keys",
    "serving",
    "sparse_attention",
    "tile_keys",
    "top_keys",
    "unregister_backend",
    "why_not",
]
