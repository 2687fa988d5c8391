"""Dense or sparse: decided from shapes, settings and what is known of the machine, never from a clock."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Mode, SparsifinerConfig
from ..geometry.tiling import Tiling
from ..ops.inputs import AttentionInputs
from ..predictors import Predictor
from .cost import sparse_pays


@dataclass(frozen=True)
class Policy:
    """Decides for an attention call whether it runs dense.

    The answer never depends on the batch size: an image's result must not depend on its neighbours.

    Args:
        mode: ``auto``, ``sparse`` or ``dense``, as in ``SparsifinerConfig``.
        dense_below: with ``auto``, inputs of fewer tokens run dense and all others sparse.
    """

    mode: Mode = "auto"
    dense_below: int | None = None

    @classmethod
    def of(cls, config: SparsifinerConfig) -> Policy:
        """The policy that ``config`` asks for."""
        return cls(config.mode, config.dense_below)

    def query_tile(self, grid: tuple[int, int], config: SparsifinerConfig, *, training: bool) -> tuple[int, int]:
        """The query tile of ``config``; 1x1 where the patch grid, rows and columns, has no room and attention is dense.

        A thumbnail, or a strip one patch high, has no room for a tile or a block of the tail.
        """
        no_room = not _has_room(grid, config)
        return (1, 1) if no_room and self._may_run_dense(training) else config.query_tile

    def runs_dense(
        self, inputs: AttentionInputs, config: SparsifinerConfig, predictor: Predictor, *, training: bool
    ) -> bool:
        """Attention of ``inputs`` runs dense.

        In training only where the predictor learns from the undisturbed dense model (the paper's first phase) or the
        mode is ``dense``.
        """
        if self.mode == "dense":
            return True
        if training:
            return predictor.reconstructing
        if self.mode == "sparse":
            return False
        tiling = inputs.tiling
        if not _has_room(tiling.image_grid, config):
            return True
        if self.dense_below is not None:
            return tiling.num_tokens < self.dense_below
        if predictor.bounds_fidelity:
            return False
        heads, head_dim = inputs.q.shape[1], inputs.q.shape[3]
        return not sparse_pays(config, inputs, predictor.score_macs(heads, head_dim, tiling))

    def _may_run_dense(self, training: bool) -> bool:
        return self.mode == "dense" or (self.mode == "auto" and not training)


def _has_room(grid: tuple[int, int], config: SparsifinerConfig) -> bool:
    return all(grid[0] >= height and grid[1] >= width for height, width in config.rectangles)


def check_fit(grid: tuple[int, int], config: SparsifinerConfig) -> None:
    """Refuse settings that stay sparse at every size but whose tiles or tail blocks are larger than the patch grid.

    Args:
        grid: rows and columns of patches.
        config: settings of a layer.
    """
    if config.mode == "sparse":
        for rectangle in config.rectangles:
            Tiling(grid, rectangle)
