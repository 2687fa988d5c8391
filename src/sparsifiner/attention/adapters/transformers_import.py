"""Registration with transformers, by importing this module, which happens when the program has loaded transformers."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any


def connect(modeling: Any) -> None:
    """Register ``attn_implementation="sparsifiner"``, and convert models that are built with it.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """
    base = modeling.PreTrainedModel
    if hasattr(base.post_init, "_sparsifiner"):
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from .transformers import NAME, convert_new, sparse_attention_forward

    original = base.post_init

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        if vars(self.config).get(NAME) is not None or self.config._attn_implementation == NAME:
            convert_new(self)

    post_init._sparsifiner = True  # type: ignore[attr-defined]
    base.post_init = post_init
    modeling.AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


connect(sys.modules["transformers.modeling_utils"])
