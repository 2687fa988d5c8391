"""How the attention layers of one model learn the patch grid of the current input."""

from __future__ import annotations

from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from ..errors import SparsifinerError
from .subset import SubsetTiling
from .tiling import Tiling


class PatchGrid:
    """The patch grid of the input being processed, shared by all sparse layers below one patch embedding.

    It is a forward hook of the patch embedding, because attention layers see a flat sequence and cannot
    tell a 16x64 grid from a 32x32 one. One model instance serves one input size at a time: threads that
    feed different sizes concurrently need a copy of the model each. Where tokens are pruned it also knows
    which patches each image of the batch still holds; such a model serves one thread at a time.

    Args:
        shape: rows and columns the model was built for, used until the first forward pass.
        patch_size: pixels per patch, rows and columns.
        num_prefix_tokens: tokens that precede the patches in the sequence.
    """

    def __init__(self, shape: tuple[int, int], patch_size: tuple[int, int], num_prefix_tokens: int) -> None:
        self.shape = shape
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        # By length of the sequence, which shrinks wherever tokens go, so that a layer that runs again
        # (activation checkpointing) finds the patches it saw the first time, until the next forward pass.
        self.kept: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to one forward pass; ``torch.export`` leaves fake tensors there."""
        return {**vars(self), "kept": {}}

    @property
    def num_patches(self) -> int:
        return self.shape[0] * self.shape[1]

    def follow(self, other: PatchGrid) -> None:
        """Take over what another grid saw in its latest forward pass, to attend to that pass's tokens."""
        self.shape, self.kept = other.shape, dict(other.kept)

    def tiling(self, tile: tuple[int, int], num_tokens: int) -> Tiling:
        """The query tiles of a sequence of ``num_tokens`` tokens, of the patches that it still holds."""
        positions = self.kept.get(num_tokens)
        if positions is None:
            return Tiling(self.shape, tile, self.num_prefix_tokens)
        return SubsetTiling.of(positions, self.shape, tile, self.num_prefix_tokens, num_tokens)

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept = {}
        if output.ndim == 4:  # [B, rows, columns, C], as timm returns it for dynamic image sizes
            self.shape = (output.shape[1], output.shape[2])
            return
        height, width = inputs[0].shape[-2:]
        shape = (height // self.patch_size[0], width // self.patch_size[1])
        # Padded images and convolutional stems follow the size the embedding was built for.
        self.shape = shape if shape[0] * shape[1] == output.shape[1] else tuple(patch_embed.grid_size)


def find_grid(owner: Any) -> PatchGrid | None:
    """The patch grid that already follows the patch embedding of ``owner``, or None."""
    hooks = owner.patch_embed._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, PatchGrid)), None)


def follow_grid(owner: Any) -> PatchGrid:
    """The patch grid of ``owner``, a timm model with ``patch_embed``; not hooked in yet where there was none."""
    embed = owner.patch_embed
    return find_grid(owner) or PatchGrid(
        tuple(embed.grid_size), tuple(getattr(embed, "patch_size", (1, 1))), owner.num_prefix_tokens
    )


def check_size(size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Refuse a size, rows and columns in pixels, that the patches do not divide; the error names near ones."""
    if any(side < patch or side % patch for side, patch in zip(size, patch_size, strict=True)):
        near = []
        for up in (0, 1):
            rows, columns = (
                max(patch, (side // patch + (up and side % patch > 0)) * patch)
                for side, patch in zip(size, patch_size, strict=True)
            )
            near.append(str(rows) if rows == columns else f"{rows}x{columns}")
        wanted = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
        raise SparsifinerError(
            f"image size {wanted} is not a multiple of the model's {patch_size[0]}x{patch_size[1]} patches; "
            f"use {' or '.join(dict.fromkeys(near))}"
        )


def check_image_size(model: Any, size: tuple[int, int]) -> None:
    """:func:`check_size` for ``model``: timm's patch embeddings leave out the pixels that fill no patch, unless they
    pad the image."""
    embed = getattr(model, "patch_embed", None)
    patch_size = getattr(embed, "patch_size", None)
    if patch_size is not None and not getattr(embed, "dynamic_img_pad", False):
        check_size(size, to_2tuple(patch_size))


def drop_unused_grids(model: nn.Module) -> None:
    """Take out the hooks of patch grids that no layer of ``model`` looks at any more."""
    used = {id(vars(module)["grid"]) for module in model.modules() if "grid" in vars(module)}
    for module in model.modules():
        hooks = module._forward_hooks
        for handle in [n for n, hook in hooks.items() if isinstance(hook, PatchGrid) and id(hook) not in used]:
            del hooks[handle]
