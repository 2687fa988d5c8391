"""Pictures and captions of a query patch: what the page shows, without the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..report.pictures import heat_picture, kept_picture, to_pixels
from .look import Look
from .query import QueryAttention, kept_mass, query_attention

if TYPE_CHECKING:
    from PIL.Image import Image

_QUALITY = 88
_BORDER = torch.tensor([0.0, 0.9, 1.0])  # of the tail's groups: a colour that the heat map does not have


@dataclass(frozen=True)
class Panel:
    """A picture of the page.

    Args:
        key: its name in the page.
        title: above it.
        image: RGB, of the size of the image that the model saw.
        caption: below it.
        tile: whether the query tile is outlined in it, beside the query patch.
    """

    key: str
    title: str
    image: Image
    caption: str
    tile: bool = False

    @property
    def address(self) -> str:
        """The picture as a data address, JPEG."""
        stream = io.BytesIO()
        self.image.save(stream, "JPEG", quality=_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


@dataclass(frozen=True)
class QueryView:
    """All pictures of one query patch.

    Args:
        patch: row and column of the query.
        grid: rows and columns of patches.
        layer: shown, from 0.
        head: shown, from 0; None is the mean of all.
        tile: first row, first column, rows and columns of the query tile, in patches.
        panels: photo, kept keys, tail, dense attention, difference.
        mass: share of the dense attention on the kept keys, per layer and head.
    """

    patch: tuple[int, int]
    grid: tuple[int, int]
    layer: int
    head: int | None
    tile: tuple[int, int, int, int]
    panels: list[Panel]
    mass: list[list[float]]


def query_view(look: Look, patch: tuple[int, int], layer: int, head: int | None = None) -> QueryView:
    """The pictures of the query at ``patch`` in one layer and head.

    Args:
        look: at the image.
        patch: row and column; moved into the grid if they lie outside.
        layer: from 0; the last one if there are fewer.
        head: from 0; the mean of all heads if None or there are fewer.
    """
    rows, columns = look.grid
    patch = (min(max(patch[0], 0), rows - 1), min(max(patch[1], 0), columns - 1))
    layer = min(max(layer, 0), len(look.layers) - 1)
    found = query_attention(look, layer, patch)
    if head is not None and head >= len(found.dense):
        head = None
    pixels = to_pixels(look.image)
    panels = [
        Panel("photo", "Query patch and its tile", look.image, _photo_caption(look, patch), tile=True),
        _kept_panel(look, found, pixels, head),
        _tail_panel(look, found, pixels, head),
        _dense_panel(look, found, pixels, head),
        _difference_panel(look, pixels),
    ]
    mass = [values.tolist() for values in kept_mass(look, patch)]
    return QueryView(patch, look.grid, layer, head, found.tile, panels, mass)


def _over_heads(values: Tensor, head: int | None) -> Tensor:
    return values.float().mean(0) if head is None else values[head].float()


def _photo_caption(look: Look, patch: tuple[int, int]) -> str:
    rows, columns = look.grid
    return f"row {patch[0] + 1}, column {patch[1] + 1} of {rows}x{columns} patches"


def _kept_panel(look: Look, found: QueryAttention, pixels: Tensor, head: int | None) -> Panel:
    prefix = look.layers[0].connectivity.tiling.num_prefix_tokens
    kept = _over_heads(found.kept[:, prefix:], head).view(look.grid)
    held = _over_heads(found.mass, head).item()
    caption = f"{kept.mean().item():.1%} of the keys, {held:.0%} of dense attention"
    return Panel("kept", "Sparse: keys the tile keeps", _picture(kept_picture(pixels, kept)), caption, tile=True)


def _tail_panel(look: Look, found: QueryAttention, pixels: Tensor, head: int | None) -> Panel:
    title = "Sparse: pooled tail"
    if found.members is None:
        return Panel("tail", title, _picture(pixels * 0.3), "this model has no tail")
    picture = heat_picture(pixels, _over_heads(found.tail, head).view(look.grid), smooth=False)
    if head is not None:
        picture = _draw_borders(picture, found.members[head].view(look.grid))
    share = _over_heads(found.tail_share, head).item()
    caption = f"{found.pooled.shape[1]} pooled keys, {share:.0%} of this query's weight"
    return Panel("tail", title, _picture(picture), caption)


def _dense_panel(look: Look, found: QueryAttention, pixels: Tensor, head: int | None) -> Panel:
    prefix = look.layers[0].connectivity.tiling.num_prefix_tokens
    patches = _over_heads(found.dense[:, prefix:], head).view(look.grid)
    caption = f"{patches.sum().item():.0%} on patches, at most {patches.max().item():.1%} on one"
    return Panel("dense", "Dense: attention of this query", _picture(heat_picture(pixels, patches)), caption)


def _difference_panel(look: Look, pixels: Tensor) -> Panel:
    found, largest = look.fidelity, look.difference.max().item()
    caption = f"relative L2 {found.patch_l2:.3f}, largest {largest:.2f}"
    # Squared, since the heat map takes the root: a patch twice as wrong is twice as bright.
    picture = heat_picture(pixels, look.difference.square(), smooth=False)
    return Panel("difference", "Difference of final features", _picture(picture), caption)


def _draw_borders(picture: Tensor, members: Tensor) -> Tensor:
    """Lines of one pixel between patches of different groups, ``members`` ``[rows, columns]``."""
    height, width = picture.shape[:2]
    y = torch.arange(height) * members.shape[0] // height
    x = torch.arange(width) * members.shape[1] // width
    group = members[y][:, x]
    border = torch.zeros(height, width, dtype=torch.bool)
    border[1:] |= group[1:] != group[:-1]
    border[:, 1:] |= group[:, 1:] != group[:, :-1]
    return torch.where(border[..., None], 0.5 * picture + 0.5 * _BORDER, picture)


def _picture(pixels: Tensor) -> Image:
    from PIL import Image as Pillow

    return Pillow.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
