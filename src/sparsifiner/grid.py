"""How the attention layers of one model learn the patch grid of the current input."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class PatchGrid:
    """The patch grid of the input being processed, shared by all sparse layers below one patch embedding.

    It is a forward hook of the patch embedding, because attention layers see a flat sequence and cannot
    tell a 16x64 grid from a 32x32 one. One model instance serves one input size at a time: threads that
    feed different sizes concurrently need a copy of the model each.

    Args:
        shape: rows and columns the model was built for, used until the first forward pass.
        patch_size: pixels per patch, rows and columns.
        num_prefix_tokens: tokens that precede the patches in the sequence.
    """

    def __init__(self, shape: tuple[int, int], patch_size: tuple[int, int], num_prefix_tokens: int) -> None:
        self.shape = shape
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4:  # [B, rows, columns, C], as timm returns it for dynamic image sizes
            self.shape = (output.shape[1], output.shape[2])
            return
        height, width = inputs[0].shape[-2:]
        shape = (height // self.patch_size[0], width // self.patch_size[1])
        # Padded images and convolutional stems follow the size the embedding was built for.
        self.shape = shape if shape[0] * shape[1] == output.shape[1] else tuple(patch_embed.grid_size)
