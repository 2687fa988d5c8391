"""What a predictor chooses without the kernels that score and select in one pass."""

from unittest.mock import patch

from torch import Tensor

from sparsifiner import Connectivity, Tiling
from sparsifiner.ops.cpu import binding
from sparsifiner.ops.tail import tail_groups
from sparsifiner.predictors import Predictor


def choose_by_torch(
    predictor: Predictor, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, scale: float
) -> Connectivity:
    """The same choice as ``predictor(q, k, v, tiling, scale)``, from scores that torch computes."""
    stakes = predictor.stakes(tail_groups(predictor.config, k, v, tiling), tiling)
    with patch.object(binding, "_missing", "left out by a test"):
        return predictor.choose(q, k, stakes, tiling, scale, None)
