"""Pictures of attention: dense heat maps beside the keys the sparse model keeps."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .maps import AttentionMaps, LayerMap

if TYPE_CHECKING:
    from PIL.Image import Image

_ACCENT = "#00e5ff"  # outlines the query tile: a colour neither the heat map nor most photographs have
_INK, _FAINT = "#1d1f23", "#6a6f78"


def draw_maps(image: Image, maps: AttentionMaps, *, title: str = "", dpi: int = 110) -> bytes:
    """One page for one image, a PNG: a row per query patch, per layer what it attends to and what is kept.

    Args:
        image: the image as the model saw it, RGB, before normalisation.
        maps: of that image.
        title: printed above.
        dpi: dots per inch; a panel is 2.1 inches wide.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pixels = to_pixels(image)
    aspect = pixels.shape[0] / pixels.shape[1]
    queries, columns = len(maps.queries), 1 + 2 * len(maps.layers)
    side, gap, group, caption = 2.1, 0.07, 0.22, 0.27
    top, left, bottom = 0.98, 0.12, 0.42
    width = left * 2 + columns * side + len(maps.layers) * (gap + group)
    height = top + bottom + queries * (side * aspect + caption)
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)

    def panel(row: int, column: int) -> Any:
        layer, second = divmod(column - 1, 2) if column else (-1, 0)
        x = left + column * side + (layer + 1) * group + (layer + second) * gap * (column > 0)
        y = height - top - (row + 1) * side * aspect - row * caption
        axes = figure.add_axes((x / width, y / height, side / width, side * aspect / height))
        axes.set_axis_off()
        return axes, x

    def text(x: float, y: float, words: str, size: float, colour: str = _INK, **settings: Any) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size, color=colour, **settings)

    text(left, 0.3, title, 14, weight="bold", va="center")
    for row in range(queries):
        axes, x = panel(row, 0)
        axes.imshow(pixels.numpy())
        _outline(axes, maps.layers[0].tiles[row], maps, pixels, query=maps.queries[row])
        if row == 0:
            text(x + side / 2, 0.84, "query patch and its tile", 11, _FAINT, ha="center", va="center")
        for number, layer in enumerate(maps.layers):
            axes, x = panel(row, 1 + 2 * number)
            axes.imshow(heat_picture(pixels, layer.attention[row]).numpy())
            _outline(axes, layer.tiles[row], maps, pixels, query=maps.queries[row], tile=False)
            if row == 0:
                centre = x + side + gap / 2
                text(
                    centre,
                    0.62,
                    f"layer {layer.number} of {maps.num_layers}",
                    11,
                    weight="bold",
                    ha="center",
                    va="center",
                )
                text(x + side / 2, 0.84, "dense model attends to", 11, _FAINT, ha="center", va="center")
                text(x + side * 1.5 + gap, 0.84, "sparse model keeps", 11, _FAINT, ha="center", va="center")
            axes, x = panel(row, 2 + 2 * number)
            axes.imshow(kept_picture(pixels, layer.kept[row]).numpy())
            _outline(axes, layer.tiles[row], maps, pixels)
            y = top + (row + 1) * side * aspect + row * caption + 0.12
            text(x + side / 2, y, _caption(layer, row), 11, ha="center", va="center")
    text(
        left,
        height - 0.2,
        "Heat: attention of the query patch, mean over heads. Kept: the brighter a patch, the more heads keep it for "
        "the outlined tile. Below: share of the keys kept, and of the dense attention they hold.",
        11,
        _FAINT,
        va="center",
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def _caption(layer: LayerMap, row: int) -> str:
    return f"keys {layer.kept[row].mean().item():.0%}, attention {layer.mass[row].item():.0%}"


def to_pixels(image: Image) -> Tensor:
    """An image as RGB in 0..1, ``[rows, columns, 3]``."""
    import numpy

    return torch.from_numpy(numpy.array(image.convert("RGB"))).float() / 255


def heat_picture(pixels: Tensor, attention: Tensor, *, smooth: bool = True) -> Tensor:
    """A darkened grey image under the heat map, ``[rows, columns, 3]``.

    Args:
        pixels: the image in 0..1, ``[rows, columns, 3]``.
        attention: not negative, a value per patch ``[rows, columns]``.
        smooth: interpolate between patches; otherwise each is a rectangle of one colour.
    """
    from matplotlib import colormaps

    ceiling = attention.flatten().quantile(0.995).clamp(min=1e-12)
    strength = (attention / ceiling).clamp(0, 1).sqrt()
    strength = resize_grid(strength, pixels, "bicubic" if smooth else "nearest").clamp(0, 1)
    colour = torch.from_numpy(colormaps["inferno"](strength.numpy())[..., :3]).float()
    grey = pixels.mean(-1, keepdim=True).expand_as(pixels) * 0.55
    opacity = (0.25 + 0.75 * strength)[..., None]
    return (grey * (1 - opacity) + colour * opacity).clamp(0, 1)


def kept_picture(pixels: Tensor, kept: Tensor) -> Tensor:
    """The image with every patch as bright as the share of heads that keep it, ``kept`` ``[rows, columns]`` in 0..1."""
    share = resize_grid(kept, pixels, "nearest")[..., None]
    shown = (0.5 + 0.5 * share) * (share > 0)
    return pixels * shown + (1 - shown) * torch.tensor([0.06, 0.07, 0.09])


def resize_grid(grid: Tensor, pixels: Tensor, mode: str) -> Tensor:
    """A value per patch as a value per pixel of ``pixels``."""
    settings: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(grid[None, None].float(), size=pixels.shape[:2], mode=mode, **settings)[0, 0]


def _outline(
    axes: Any,
    rectangle: tuple[int, int, int, int],
    maps: AttentionMaps,
    pixels: Tensor,
    *,
    query: tuple[int, int] | None = None,
    tile: bool = True,
) -> None:
    """Outline the query tile, and fill the query patch, in image coordinates."""
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[0] / maps.grid[0], pixels.shape[1] / maps.grid[1]
    if tile:
        y, x, rows, columns = rectangle
        corner, size = (x * width - 0.5, y * height - 0.5), (columns * width, rows * height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=3.0))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_ACCENT, linewidth=1.5))
    if query is not None:
        corner = (query[1] * width - 0.5, query[0] * height - 0.5)
        axes.add_patch(Rectangle(corner, width, height, facecolor=_ACCENT, edgecolor="black", linewidth=0.6))
