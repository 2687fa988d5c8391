"""Mean losses between two log lines, and the check that they still are numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._utils.messages import one_line
from ..errors import SparsifinerError


@contextmanager
def watched(phase: str, done: int) -> Iterator[None]:
    """Tell NaN that the selection of keys refuses as what it is while training: the run has diverged."""
    try:
        yield
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise _diverged(f"attention ({one_line(error)})", phase, done) from error


def _diverged(what: str, phase: str, done: int) -> SparsifinerError:
    return SparsifinerError(
        f"{what} is not finite at step {done} of phase {phase}; lower lr, set clip_grad, or use precision=bf16 "
        f"instead of fp16"
    )


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
        """Refuse losses that are not finite."""
        for name, value in self.sums.items():
            if not torch.isfinite(value):
                raise _diverged(f"the loss {name}", phase, done)

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all processes; counting starts anew."""
        names = list(self.sums)
        values = reduce(torch.stack([self.sums[name] for name in names]) / self.count).tolist()
        self.sums, self.count = {}, 0
        return dict(zip(names, values, strict=True))
