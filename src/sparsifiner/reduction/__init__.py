"""Other methods that make attention cheaper, to compare with under the same roof."""

from .linformer import linformer
from .merging import merge_tokens
from .settings import apply_baseline, baseline_parameters, baseline_settings

__all__ = ["apply_baseline", "baseline_parameters", "baseline_settings", "linformer", "merge_tokens"]
