"""The backend ``gather``: attention and its gradients in plain PyTorch, on any device, in bounded memory."""

from __future__ import annotations

from ..registry import register_backend
from .kernels import attend, attend_backward


def why_not(operation: str, *, needs_gradients: bool, **arguments: object) -> str | None:
    """It serves every call, with ``attend_backward`` where gradients are needed."""
    return None


register_backend(
    "gather", kernels={"attend": attend, "attend_backward": attend_backward}, why_not=why_not, automatic=True
)
