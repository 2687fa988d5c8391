"""The patch grid of models whose patches come from a convolution, wherever that stands in the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import SparsifinerError
from .frames import TokenLayout
from .patch_grid import GridHook, PatchGrid, add_grid_hook
from .tiling import Tiling

_SIZES = ("img_size", "image_size", "crop_size")
_TOKENS = (
    "cls_token", "class_token", "class_embedding", "dist_token", "reg_token", "register_token", "register_tokens",
    "storage_tokens", "camera_token", "pose_token",
)  # fmt: skip
"""Names of parameters ``[..., n, C]`` or ``[C]`` that hold the tokens before the patches."""


class ConvGrid(PatchGrid):
    """A patch grid that follows one convolution: what it returns, ``[B, C, (frames,) rows, columns]``, is the grid.

    A sequence that is several times as long as one image's holds as many frames, each with prefix tokens of its own.

    Args:
        shape: rows and columns the model was built for, used until the first forward pass.
        conv: path of the convolution below the module that owns it.
        patch_size: pixels per patch, rows and columns.
        num_prefix_tokens: tokens of the sequence that are no patches, those of the suffix included.
        num_suffix_tokens: those that come after the patches.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        conv: str,
        patch_size: tuple[int, int],
        num_prefix_tokens: int,
        num_suffix_tokens: int = 0,
    ) -> None:
        super().__init__(shape, patch_size, num_prefix_tokens)
        self.conv, self.num_suffix_tokens = conv, num_suffix_tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "conv": self.conv, "num_suffix_tokens": self.num_suffix_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.conv, self.num_suffix_tokens = state["conv"], state["num_suffix_tokens"]

    def layout(self, num_tokens: int) -> TokenLayout:
        state = self.current
        one = self.num_prefix_tokens + state.num_patches
        if num_tokens != one and num_tokens % one == 0 and state.num_frames == 1 and not self.num_suffix_tokens:
            return TokenLayout((num_tokens // one, *state.shape), prefix_per_frame=self.num_prefix_tokens)
        prefix = self.num_prefix_tokens - self.num_suffix_tokens
        return TokenLayout((state.num_frames, *state.shape), prefix, num_suffix_tokens=self.num_suffix_tokens)

    def tiling(self, tile: tuple[int, int], num_tokens: int) -> Tiling:
        kept = super().tiling(tile, num_tokens)
        return kept if kept.num_tokens == num_tokens else self.layout(num_tokens).tiling(tile)

    def projected(self, proj: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.ndim in (4, 5):
            frames = output.shape[2] if output.ndim == 5 else 1
            self._begin((output.shape[-2], output.shape[-1]), embedded=True, num_frames=frames)

    def attach(self, owner: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Hook into the convolution of ``owner`` and into the blocks that look at the grid."""
        self._owner = weakref.ref(owner)
        conv = owner.get_submodule(self.conv)
        add_grid_hook(conv.register_forward_hook, conv._forward_hooks, self, "projected")
        for block in blocks:
            add_grid_hook(block.register_forward_pre_hook, block._forward_pre_hooks, self, "entered")
            add_grid_hook(block.register_forward_hook, block._forward_hooks, self, "left")

    def _follows(self, owner: nn.Module) -> bool:
        return self in _grids_of(owner.get_submodule(self.conv))


@dataclass(frozen=True)
class GridSource:
    """The convolution that tells a model's patch grid.

    Args:
        conv: its path below the module that owns it.
    """

    conv: str

    @classmethod
    def from_conv(cls, path: str) -> GridSource:
        """The convolution at ``path`` of the model, such as ``"conv_proj"`` or ``"patch_embed.proj"``."""
        return cls(path)

    def follow(
        self, owner: nn.Module, num_prefix_tokens: int, num_suffix_tokens: int = 0, *, built_by: Any = None
    ) -> ConvGrid:
        """The grid of ``owner`` that follows the convolution; not attached yet where there was none.

        Args:
            owner: the module below which the convolution stands.
            num_prefix_tokens: tokens of the sequence before the patches.
            num_suffix_tokens: and after them.
            built_by: what knows the image size that ``owner`` was built for, such as its configuration.

        Raises:
            SparsifinerError: if there is no convolution of images or videos at the path.
        """
        try:
            conv: Any = owner.get_submodule(self.conv)
        except AttributeError:
            conv = None
        if not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            found = ", ".join(patch_convolutions(owner)) or "none that is as wide as its stride"
            raise SparsifinerError(
                f"grid must name the convolution of {type(owner).__name__} that makes the patches; {self.conv!r} is "
                f"{'not there' if conv is None else 'a ' + type(conv).__name__}, its patch convolutions are: {found}"
            )
        known = next((grid for grid in _grids_of(conv) if grid._owner is not None and grid._owner() is owner), None)
        stride = (int(conv.stride[-2]), int(conv.stride[-1]))
        others = num_prefix_tokens + num_suffix_tokens
        return known or ConvGrid(_built_shape(stride, owner, built_by), self.conv, stride, others, num_suffix_tokens)


def _built_shape(patch_size: tuple[int, int], *holders: Any) -> tuple[int, int]:
    """Patches of the image that a model was built for, rows and columns; of 224x224 pixels where nobody says."""
    found = (getattr(holder, name, None) for holder in holders for name in _SIZES)
    size = next((size for size in found if isinstance(size, (int, list, tuple))), 224)
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return (max(1, height // patch_size[0]), max(1, width // patch_size[1]))


def _grids_of(conv: nn.Module) -> list[ConvGrid]:
    """The grids that follow the convolution ``conv``."""
    grids = [hook.grid for hook in conv._forward_hooks.values() if isinstance(hook, GridHook)]
    return [grid for grid in grids if isinstance(grid, ConvGrid)]


def patch_convolutions(model: nn.Module) -> list[str]:
    """Paths of the convolutions that cut an image or a video into patches: as wide as their stride, in an embedding."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d))
        and module.kernel_size == module.stride
        and module.in_channels <= 4
        and max(module.kernel_size) > 1
    ]


def find_conv_owner(model: nn.Module, name: str) -> str | None:
    """Path of the nearest module around the layer at ``name`` with a patch convolution; None if it has several."""
    while name:
        name = name.rpartition(".")[0]
        convolutions = patch_convolutions(model.get_submodule(name))
        if convolutions:
            return name if len(convolutions) == 1 else None
    return None


def count_prefix_tokens(owner: nn.Module) -> int:
    """Tokens before the patches, by the parameters of ``owner`` that usually hold them: class and register tokens."""
    tokens = (getattr(owner, name, None) for name in _TOKENS)
    return sum(1 if token.ndim == 1 else token.shape[-2] for token in tokens if isinstance(token, Tensor))
