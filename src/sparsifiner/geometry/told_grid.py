"""Patch grids of models that are given cut patches and told the grid of each image: SigLIP 2, the Qwen-VL towers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import SparsifinerError
from .frames import Order, TokenLayout
from .patch_grid import GridHook, PatchGrid, add_grid_hook
from .tiling import Tiling


class ToldGrid(PatchGrid):
    """A patch grid that follows an argument of a module: rows and columns of each image, its last two columns.

    Args:
        shape: rows and columns until the first forward pass.
        patch_size: pixels per patch, rows and columns.
        argument: name of the argument, such as ``spatial_shapes`` or ``grid_thw``.
        position: and its place among the arguments.
        told: path of the module below the one that owns the grid; ``""`` for that one itself.
        order: of the patches of an image in the sequence.
    """

    def __init__(
        self, shape: tuple[int, int], patch_size: tuple[int, int], argument: str, position: int, told: str, order: Order
    ) -> None:
        super().__init__(shape, patch_size, 0)
        self.argument, self.position, self.told, self.order = argument, position, told, order

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("argument", "position", "told", "order")}
        return {**super().__getstate__(), "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).update(state["own"])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each image of the present batch."""
        return getattr(self._thread, "shapes", [self.shape])

    def of_length(self, num_tokens: int) -> tuple[int, int]:
        """The grid of the images of the present batch that have ``num_tokens`` patches.

        Raises:
            SparsifinerError: if there is none, or images of several grids have as many.
        """
        found = {shape for shape in self.shapes if shape[0] * shape[1] == num_tokens}
        if len(found) != 1:
            grids = ", ".join(f"{rows}x{columns}" for rows, columns in sorted(found or set(self.shapes)))
            raise SparsifinerError(
                f"images of {grids} patches have {num_tokens} each, and the layers cannot tell them apart; give them "
                f"to the model one after the other"
                if found
                else f"attention got {num_tokens} tokens, but {self.argument} names grids of {grids}"
            )
        return next(iter(found))

    def layout(self, num_tokens: int) -> TokenLayout:
        return TokenLayout((1, *self.shape), order=self.order)

    def tiling(self, tile: tuple[int, int], num_tokens: int) -> Tiling:
        return self.layout(num_tokens).tiling(tile)

    def heard(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Pre-hook of the module that is told."""
        told = named.get(self.argument)
        if told is None and len(arguments) > self.position:
            told = arguments[self.position]
        if isinstance(told, Tensor):
            self._thread.shapes = [(int(rows), int(columns)) for *_, rows, columns in told.tolist()]

    def attach(self, owner: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self._owner = weakref.ref(owner)
        module = owner.get_submodule(self.told)
        register = partial(module.register_forward_pre_hook, with_kwargs=True)
        add_grid_hook(register, module._forward_pre_hooks, self, "heard")


def find_told_grid(module: nn.Module) -> ToldGrid | None:
    """The grid that follows an argument of ``module``, or None."""
    hooks = [hook.grid for hook in module._forward_pre_hooks.values() if isinstance(hook, GridHook)]
    return next((grid for grid in hooks if isinstance(grid, ToldGrid)), None)
