"""BatchNorm's running statistics: not those of frozen modules, and the same in all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_frozen_statistics(model: nn.Module) -> None:
    """Evaluation mode for BatchNorm in every module that has parameters of which none learns."""
    for module in model.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if learns and not any(learns):
            for part in module.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()


@torch.no_grad()
def average_statistics(model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Give all processes the same floating-point buffers; each has gathered its own on its own images.

    Args:
        model: with the same buffers in all processes.
        mean: of a tensor over the processes.
    """
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean(buffer))
