"""The patch grid of models whose patches come from a convolution, wherever that stands in the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .frames import TokenLayout
from .patch_grid import GridHook, PatchGrid, add_grid_hook


class ConvGrid(PatchGrid):
    """A patch grid that follows one convolution: what it returns, ``[B, C, (frames,) rows, columns]``, is the grid.

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

    @property
    def layout(self) -> TokenLayout:
        """The order of the present sequence."""
        state = self.current
        prefix = self.num_prefix_tokens - self.num_suffix_tokens
        return TokenLayout((state.num_frames, *state.shape), prefix, num_suffix_tokens=self.num_suffix_tokens)

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
        return find_conv_grid(owner.get_submodule(self.conv)) is self


def find_conv_grid(conv: nn.Module) -> ConvGrid | None:
    """The grid that follows the convolution ``conv``, or None."""
    hooks = [hook.grid for hook in conv._forward_hooks.values() if isinstance(hook, GridHook)]
    return next((grid for grid in hooks if isinstance(grid, ConvGrid)), None)


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
