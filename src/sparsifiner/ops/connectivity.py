"""Which keys each query tile attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry.tiling import Tiling


@dataclass(frozen=True)
class Connectivity:
    """The keys that each tile of queries keeps (design of the operator; the paper's mask for 1x1 tiles).

    Args:
        tiling: which queries form a tile. Prefix tokens belong to no tile; their query rows are dense.
        indices: token numbers of the kept keys, int32 ``[B, H, T, K]``, no key twice in a row.
        bias: added to the logits of the kept keys, ``[B, H, T, K]``, or None; ``-inf`` marks padding,
            which is how tiles keep different numbers of keys.
    """

    tiling: Tiling
    indices: Tensor
    bias: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """Entries per tile, padding included."""
        return self.indices.shape[-1]

    def density(self) -> float:
        """Kept query-key pairs over all pairs; the dense query rows of prefix tokens count as kept."""
        tiling = self.tiling
        kept: Tensor | int = self.num_keys
        if self.bias is not None:
            kept = (self.bias > float("-inf")).sum(-1).double().mean((0, 1))
        pairs = (tiling.sizes(self.indices.device).double() * kept).sum().item()
        return (pairs + tiling.num_prefix_tokens * tiling.num_tokens) / tiling.num_tokens**2

    def to_mask(self) -> Tensor:
        """Boolean ``[B, H, N, N]``, True where a query attends to a key. For tests and pictures only."""
        tiling = self.tiling
        batch, heads, tiles, _ = self.indices.shape
        valid = torch.ones_like(self.indices, dtype=torch.bool)
        if self.bias is not None:
            valid = self.bias > float("-inf")
        rows = torch.zeros(batch, heads, tiles, tiling.num_tokens, dtype=torch.int32, device=self.indices.device)
        rows.scatter_add_(-1, self.indices.long(), valid.to(torch.int32))
        patch_rows = (rows > 0)[:, :, tiling.tile_of_patch(rows.device)]
        prefix_rows = patch_rows.new_ones(batch, heads, tiling.num_prefix_tokens, tiling.num_tokens)
        return torch.cat([prefix_rows, patch_rows], dim=2)
