"""What the losses were, between two log lines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Meter:
    """Means of the losses since the last log line."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, total: Tensor, parts: dict[str, Tensor]) -> None:
        for name, value in {"loss": total, **parts}.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.float()
        self.count += 1

    def check(self, phase: str, done: int) -> None:
        """Stop before a checkpoint of a run that went wrong takes the place of a sound one."""
        for name, value in self.sums.items():
            if not torch.isfinite(value):
                raise ValueError(
                    f"the loss {name} is not finite at step {done} of phase {phase}; lower lr, set clip_grad, "
                    f"or use precision=bf16 instead of fp16"
                )

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all processes; counting starts anew."""
        names = list(self.sums)
        values = reduce(torch.stack([self.sums[name] for name in names]) / self.count).tolist()
        self.sums, self.count = {}, 0
        return dict(zip(names, values, strict=True))
