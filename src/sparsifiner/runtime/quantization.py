"""Linear layers in bytes, by torchao."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._utils.messages import one_line
from ..errors import SparsifinerError


def quantize_linears(model: Any) -> None:
    """Hold the linear layers of ``model`` itself in int8, its classifier and predictors aside.

    Weights get one scale per output channel, inputs one per token at run time, so an image's answer does not depend on
    the others in its batch.

    Raises:
        SparsifinerError: if torchao is missing, the model has no linear layer, or torchao refuses one.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise SparsifinerError("int8 linears need torchao; pip install 'sparsifiner[tune]'") from error
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not classifier and ".predictor." not in f".{name}."

    if not any(chosen(module, name) for name, module in model.named_modules()):
        raise SparsifinerError(f"{type(model).__name__} has no linear layer to hold in int8")
    try:
        # Its settings of inductor are for the whole process; those that matter are given where it compiles.
        quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=chosen)
    except Exception as error:
        raise SparsifinerError(f"{type(model).__name__} cannot be held in int8: {one_line(error)[:300]}") from error
