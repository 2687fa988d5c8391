"""The dense model in OpenVINO, a rival that is measured beside the others where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._utils.messages import one_line
from ..errors import SparsifinerError


class OpenVinoModel(nn.Module):
    """A dense model compiled by OpenVINO, for batches of one shape.

    Args:
        compiled: OpenVINO's model of ``forward_features``.
        dense: the model it was made from.
        precision: in which it computes.
    """

    def __init__(self, compiled: Any, dense: nn.Module, precision: str) -> None:
        super().__init__()
        self._compiled, self.precision = compiled, precision
        self.num_prefix_tokens = getattr(dense, "num_prefix_tokens", 0)
        self.cls_token = getattr(dense, "cls_token", None)

    def forward_features(self, x: Tensor) -> Tensor:
        """Final tokens ``[B, N, C]``."""
        return torch.from_numpy(self._compiled(x.numpy())[0].copy())

    def forward(self, x: Tensor) -> Tensor:
        """The same, without the head."""
        return self.forward_features(x)


class _Features(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(x)
        return tokens


def openvino_model(dense: nn.Module, x: Tensor) -> OpenVinoModel | None:
    """``dense`` in OpenVINO's own choice of precision, for the shape of ``x``; None where OpenVINO is not installed.

    Raises:
        SparsifinerError: if OpenVINO cannot take the model.
    """
    try:
        import openvino
    except ImportError:
        return None
    try:
        with torch.no_grad():
            model = openvino.convert_model(_Features(dense).eval(), example_input=x, input=[list(x.shape)])
        compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    except Exception as error:
        raise SparsifinerError(one_line(error)[:200]) from error
    return OpenVinoModel(compiled, dense, precision)
