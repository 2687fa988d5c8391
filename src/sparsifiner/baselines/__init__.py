"""Other methods that make attention cheaper, to compare with under the same roof."""

from .linformer import linformer
from .tome import merge_tokens

__all__ = ["linformer", "merge_tokens"]
