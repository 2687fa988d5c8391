"""Registration with transformers, by importing this module, which happens when the program has loaded transformers."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from torch import nn

from ..attention.adapters.transformers import NAME, sparse_attention_forward
from ..config import SparsifinerConfig
from ..convert import densify, is_sparse, sparsify_as_saved


def connect(modeling: Any) -> None:
    """Register ``attn_implementation="sparsifiner"``, and convert models that are built with it.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """
    base = modeling.PreTrainedModel
    if hasattr(base.post_init, "_sparsifiner"):
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    original_init, original = base.__init__, base.post_init

    @wraps(original_init)
    def init(self: Any, *arguments: Any, **settings: Any) -> None:
        name_in_dictionaries(sys.modules[type(self).__module__])
        original_init(self, *arguments, **settings)

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        if vars(self.config).get(NAME) is not None or self.config._attn_implementation == NAME:
            convert_new(self)

    post_init._sparsifiner = True  # type: ignore[attr-defined]
    base.__init__, base.post_init = init, post_init
    modeling.AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def name_in_dictionaries(modeling: Any) -> None:
    """SAM's modules choose the class of their attention from a dictionary of their own, before it can become sparse."""
    for name, classes in list(vars(modeling).items()):
        if name.endswith("VISION_ATTENTION_CLASSES") and "sdpa" in classes:
            classes.setdefault(NAME, classes["sdpa"])


def convert_new(model: Any) -> None:
    """Make a model sparse that was just built from a configuration that asks for it.

    Raises:
        SparsifinerError: if none of its attention can be made sparse although it takes images.
    """
    marker = vars(model.config).get(NAME)
    if marker is None and model.config._attn_implementation != NAME:
        return
    if marker is not None and is_sparse(model):  # a tower was converted with its own settings already
        densify(model, inplace=True)
    if not any(
        isinstance(m, (nn.Conv2d, nn.Conv3d)) or "VisionEmbeddings" in type(m).__name__ for m in model.modules()
    ):
        return  # a part of a larger model
    if is_sparse(model):
        return
    sparsify_as_saved(model, SparsifinerConfig() if marker is None else SparsifinerConfig.from_dict(marker))


connect(sys.modules["transformers.modeling_utils"])
