"""Small Vision Transformers laid out as repositories of their own lay them out, whose classes no package has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embed(nn.Module):
    """Patches of a convolution, flattened or as a map."""

    def __init__(self, dim: int, flat: bool = True, img_size: int = 64) -> None:
        super().__init__()
        self.img_size, self.flat = (img_size, img_size), flat
        self.proj = nn.Conv2d(3, dim, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).mT if self.flat else x.permute(0, 2, 3, 1)


class PackedAttention(nn.Module):
    """DINOv2's: dropout as a number, a mask that must be None."""

    def __init__(self, dim: int, num_heads: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.scale, self.causal = num_heads, (dim // num_heads) ** -0.5, causal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = 0.0, nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        assert attn_bias is None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class HalvesAttention(PackedAttention):
    """DINOv3's: sine and cosine of the patches, rotated in halves in their dtype."""

    def forward(self, x: Tensor, attn_bias: Tensor | None = None, rope: Any = None) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            sin, cos = rope
            q, k = (self._rotate(y.to(sin.dtype), sin, cos).to(x.dtype) for y in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _rotate(self, y: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        start = y.shape[2] - len(sin)
        a, b = y[:, :, start:].chunk(2, -1)
        return torch.cat([y[:, :, :start], y[:, :, start:] * cos + torch.cat([-b, a], -1) * sin], 2)


class Turn(nn.Module):
    """Rotates pairs of channels by the row and the column of each token, ``[B, N, 2]``."""

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        angle = pos.float() @ torch.linspace(0.1, 1.0, x.shape[-1] // 2, device=x.device).expand(2, -1)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        sin, cos = angle[:, None].sin(), angle[:, None].cos()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class PlacedAttention(PackedAttention):
    """VGGT's: norms of q and k, a rotary embedding of its own that takes the positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads)
        self.rope = Turn()

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attention

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return x + self.attn(self.norm1(x), **context)


class Chunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class PackedViT(nn.Module):
    """DINOv2's: block chunks with places left empty, a class token, registers or none."""

    def __init__(self, chunks: int = 2, registers: int = 0, dim: int = 32, causal: bool = False) -> None:
        super().__init__()
        self.patch_embed = Embed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        blocks = [Block(dim, PackedAttention(dim, 2, causal)) for _ in range(4)]
        size = 4 // chunks
        chunked = [Chunk([nn.Identity()] * start + blocks[start : start + size]) for start in range(0, 4, size)]
        self.blocks = nn.ModuleList(chunked)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        front = [self.cls_token] + ([] if self.register_tokens is None else [self.register_tokens])
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in front), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


class RotatedViT(nn.Module):
    """DINOv3's: a map of patches, storage tokens, one pair of sine and cosine for all layers."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.patch_embed = Embed(dim, flat=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.zeros(1, 3, dim))
        self.blocks = nn.ModuleList([Block(dim, HalvesAttention(dim, 2)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        angles = torch.linspace(0, 9, x.shape[1] * x.shape[2])[:, None] * torch.linspace(0.1, 1, 8).repeat(2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.storage_tokens.expand(len(x), -1, -1),
                       x.flatten(1, 2)], 1)  # fmt: skip
        for block in self.blocks:
            x = block(x, rope=(angles.sin(), angles.cos()))
        return x


class MultiView(nn.Module):
    """VGGT's: attention within each frame and over all frames in turn, prefix tokens for each frame."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.patch_embed = PackedViT(chunks=1, registers=2)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, 3, dim))
        self.frame_blocks = nn.ModuleList([Block(dim, PlacedAttention(dim, 2)) for _ in range(2)])
        self.global_blocks = nn.ModuleList([Block(dim, PlacedAttention(dim, 2)) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        """``[B, frames, 3, height, width]``"""
        batch, frames, _, height, width = images.shape
        x = self.patch_embed(images.flatten(0, 1))[:, 3:]
        front = torch.cat([self.camera_token, self.register_token], 2)
        front = torch.cat([front[:, :1], front[:, 1:].expand(-1, frames - 1, -1, -1)], 1)
        x = torch.cat([front.expand(batch, -1, -1, -1).flatten(0, 1), x], 1)
        places = torch.cartesian_prod(torch.arange(height // 8), torch.arange(width // 8)) + 1
        pos = torch.cat([places.new_zeros(4, 2), places]).expand(len(x), -1, -1)
        for within, across in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = within(x, pos=pos)
            x, everywhere = x.reshape(batch, -1, x.shape[-1]), pos.reshape(batch, -1, 2)
            x = across(x, pos=everywhere).reshape(batch * frames, -1, x.shape[-1])
        return x


class MapAttention(nn.Module):
    """segment-anything's: maps of tokens, a relative position for rows and one for columns, weights of all pairs."""

    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.use_rel_pos = num_heads, (dim // num_heads) ** -0.5, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))

    def distances(self, side: int) -> Tensor:
        return torch.arange(side)[:, None] - torch.arange(side)[None] + side - 1

    def table(self, rel_pos: Tensor, side: int) -> Tensor:
        resized = F.interpolate(rel_pos.T[None], size=2 * side - 1, mode="linear")[0].T
        return resized[self.distances(side)]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        places = q.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", places, self.table(self.rel_pos_h, height))
        columns = torch.einsum("bnhwc,wkc->bnhwk", places, self.table(self.rel_pos_w, width))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)
        out = ((q * self.scale) @ k.mT + bias).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (height, width))


class MapBlock(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, window_size: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.window_size = nn.LayerNorm(dim), attention, window_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.window_size:
            return x + self.attn(self.norm1(x))
        side, (rows, columns) = self.window_size, x.shape[1:3]
        y = F.pad(self.norm1(x), (0, 0, 0, -columns % side, 0, -rows % side))
        cut = y.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        out = self.attn(cut.flatten(0, 2)).view(cut.shape)
        return x + out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


class MapViT(nn.Module):
    """segment-anything's encoder: no prefix tokens, windows but for the global blocks."""

    def __init__(self, dim: int = 32, attention: type[nn.Module] = MapAttention) -> None:
        super().__init__()
        self.img_size, self.patch_embed = 64, Embed(dim, flat=False)
        sides = [(0, 8), (4, 4), (0, 8)]
        self.blocks = nn.ModuleList([MapBlock(dim, attention(dim, 2, side), window) for window, side in sides])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x)
        return x
