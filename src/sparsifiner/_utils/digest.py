"""Fingerprints of settings and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def digest(parts: Iterable[str | Tensor]) -> str:
    """SHA-256 over texts and over the bytes of tensors, of any shape, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode())
        elif part.numel():
            total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of the tensors of a state dict."""
    return digest(part for name in sorted(state) for part in (name, state[name]))
