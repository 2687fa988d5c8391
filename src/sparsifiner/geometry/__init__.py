"""The patch grid: tiles and blocks of patches, sequences that lost patches."""

from .patch_grid import PatchGrid
from .subset import SubsetTiling
from .tiling import Tiling

__all__ = ["PatchGrid", "SubsetTiling", "Tiling"]
