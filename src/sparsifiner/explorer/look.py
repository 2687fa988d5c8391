"""One image through a dense model and its sparse version, with all that a page shows of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .._utils.photos import preprocess
from ..attention.attend import LayerRecord, tail_groups
from ..attention.layer import SparseAttention
from ..attention.policy import Policy
from ..convert import always_sparse, set_keep_rate, sparse_layers
from ..errors import SparsifinerError
from ..measure.fidelity import ImageFidelity, compare_features, final_features
from ..measure.flops import FlopReport, count_flops
from ..measure.latency import Timings, compare_latency
from ..ops.connectivity import Connectivity
from ..ops.tail import KeyGroups, Tail
from ..recording import observable_twin, observe
from ..reduction.blocks import refuse_reduced
from ..report.pair import own_size

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
ROUNDS = 3
"""Timed pairs of forward passes per look."""


@dataclass(frozen=True)
class DenseLayer:
    """What a dense layer attended with.

    Args:
        q: queries ``[H, N, D]``.
        k: keys ``[H, N, D]``.
        bias: added to the logits, ``[1 or H, N, N]``, or None.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class SparseLayer:
    """What a sparse layer attended with, and to.

    Args:
        q: queries ``[H, N, D]``.
        k: keys ``[H, N, D]``.
        bias: added to the logits, ``[1 or H, N, N]``, or None.
        connectivity: the kept keys.
        groups: the groups of keys that the tail pools, or None without one.
        tail: their pooled keys and values, or None.
        scale: factor on the logits.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    connectivity: Connectivity
    groups: KeyGroups | None
    tail: Tail | None
    scale: float


@dataclass(frozen=True)
class Dense:
    """The dense half of a look, which no keep rate changes.

    Args:
        x: the preprocessed image ``[1, 3, height, width]``.
        features: final patch features and class feature, as :func:`final_features` returns them.
        layers: one entry per attention layer.
    """

    x: Tensor
    features: tuple[Tensor, Tensor | None]
    layers: list[DenseLayer]


@dataclass(frozen=True)
class Look:
    """One image, dense and sparse; nothing in it changes.

    Args:
        name: of the image.
        original: the image as it came.
        image: as the model saw it, RGB, before normalisation.
        dense: the dense half.
        layers: one entry per sparse layer.
        keep_rate: the rate asked for, or one per layer.
        fidelity: of the final features.
        difference: relative L2 of each final patch feature, sparse against dense, ``[rows, columns]``.
        dense_by_itself: layers that ``mode="auto"`` would run dense at this size, because sparse would not pay.
    """

    name: str
    original: Image
    image: Image
    dense: Dense
    layers: list[SparseLayer]
    keep_rate: float | tuple[float, ...]
    fidelity: ImageFidelity
    difference: Tensor
    dense_by_itself: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.layers[0].connectivity.tiling.grid

    @property
    def num_heads(self) -> int:
        """Heads of a layer, the most that any has."""
        return max(layer.q.shape[0] for layer in self.layers)


@dataclass(frozen=True)
class Cost:
    """What one image costs, dense and sparse.

    Args:
        dense: MACs of the dense model.
        sparse: MACs of the sparse one, counted from the keys it kept.
        timings: forward passes in turn, None before the first.
    """

    dense: FlopReport
    sparse: FlopReport
    timings: Timings | None = None


class Explorer:
    """A dense model and its sparse version, for any number of callers: no call changes what another gets.

    All forward passes run one after the other in one thread, so that callers neither see each other's keep rate nor
    disturb what is timed.

    Args:
        dense: a dense timm model in evaluation mode.
        sparse: its sparse version.

    Raises:
        ValueError: if the model prunes or merges tokens, attends densely by its settings, or has no size of its own.
    """

    def __init__(self, dense: nn.Module, sparse: nn.Module) -> None:
        refuse_reduced(sparse, "pictures of attention")
        layers = sparse_layers(sparse)
        if all(layer.config.mode == "dense" for layer in layers.values()):
            raise SparsifinerError(
                "the model attends densely by its settings (mode='dense'), so it keeps no keys to look at; "
                "save it with mode='auto'"
            )
        self._dense, self._sparse, self._twin = dense, sparse, observable_twin(dense)
        self._own_rates = tuple(layer.predictor.keep_rate for layer in layers.values())
        self._parameter = next(dense.parameters())
        self._preparation = preprocess(dense, own_size(dense))
        self._worker = ThreadPoolExecutor(1, "sparsifiner-explorer")
        self.num_layers, self.num_heads = len(layers), max(layer.num_heads for layer in layers.values())

    @property
    def keep_rate(self) -> float:
        """The model's own, the mean where it has one per layer."""
        return sum(self._own_rates) / len(self._own_rates)

    def look(self, image: Image, name: str, keep_rate: float | None = None, before: Look | None = None) -> Look:
        """One image through both models.

        Args:
            image: RGB, of any size; its centre is seen.
            name: what the page calls it.
            keep_rate: for all layers; the model's own rates if None.
            before: an earlier look, whose dense half is used again if it was at this very image.

        Raises:
            ValueError: if the keep rate is not in (0, 1].
        """
        rate: float | tuple[float, ...] = self._own_rates if keep_rate is None else keep_rate
        same = before is not None and before.original is image
        return self._run(lambda: self._look(image, name, rate, before if same else None))

    def measure(self, look: Look, rounds: int = ROUNDS) -> Iterator[Cost]:
        """What the image of ``look`` costs: MACs at once, then the times after every round.

        A round runs the dense and the sparse model once each; an untimed one comes before. Whoever stops iterating
        stops the measurement.
        """
        found = Cost(*self._run(lambda: self._count(look)))
        yield found
        dense: list[float] = []
        sparse: list[float] = []
        for number in range(rounds):
            timings = self._run(lambda warmup=int(number == 0): self._time(look, warmup))  # type: ignore[misc]
            dense, sparse = [*dense, *timings.dense], [*sparse, *timings.sparse]
            yield Cost(found.dense, found.sparse, Timings(dense, sparse))

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    def _run(self, work: Callable[[], T]) -> T:
        return self._worker.submit(work).result()

    def _look(self, image: Image, name: str, rate: float | tuple[float, ...], before: Look | None) -> Look:
        dense = self._look_dense(image) if before is None else before.dense
        shown = self._preparation.crop(image).convert("RGB") if before is None else before.image
        layers: list[SparseLayer] = []
        dense_by_itself = 0

        def see(_: str, layer: SparseAttention, did: LayerRecord) -> None:
            nonlocal dense_by_itself
            assert did.q is not None
            assert did.k is not None
            assert did.v is not None
            assert did.connectivity is not None
            inputs = layer.inputs(did.q, did.k, did.v, did.attn_bias)
            policy = Policy.of(layer.config)
            dense_by_itself += policy.runs_dense(inputs, layer.config, layer.predictor, training=False)
            groups = tail_groups(layer.config.tail, inputs)
            tail = None
            if groups is not None:
                tail = groups.tail(did.connectivity, layer.predictor.tail_offset, inputs.backend)
            bias = None if did.attn_bias is None else did.attn_bias[0]
            layers.append(SparseLayer(did.q[0], did.k[0], bias, did.connectivity, groups, tail, layer.scale))

        set_keep_rate(self._sparse, rate)
        with torch.inference_mode(), always_sparse(self._sparse), observe(self._sparse, see):
            features = final_features(self._sparse, dense.x)
        fidelity = compare_features(name, dense.features, features)
        distance = (features[0][0] - dense.features[0][0]).norm(dim=-1)
        length = dense.features[0][0].norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        grid = layers[0].connectivity.tiling.grid
        if math.prod(grid) != len(distance):
            raise SparsifinerError(
                f"the model ends with {len(distance)} patches where attention has {grid[0]}x{grid[1]}; the explorer "
                f"shows models whose patches stay in their places"
            )
        difference = (distance / length).view(grid).cpu()
        return Look(name, image, shown, dense, layers, rate, fidelity, difference, dense_by_itself)

    def _look_dense(self, image: Image) -> Dense:
        x = self._preparation(image)[None].to(self._parameter.device, self._parameter.dtype)
        layers: list[DenseLayer] = []

        def see(_: str, layer: SparseAttention, did: LayerRecord) -> None:
            assert did.q is not None
            assert did.k is not None
            layers.append(DenseLayer(did.q[0], did.k[0], None if did.attn_bias is None else did.attn_bias[0]))

        with torch.inference_mode(), observe(self._twin, see):
            features = final_features(self._twin, x)
        return Dense(x, features, layers)

    def _count(self, look: Look) -> tuple[FlopReport, FlopReport]:
        set_keep_rate(self._sparse, look.keep_rate)
        with always_sparse(self._sparse):
            return count_flops(self._dense, look.dense.x), count_flops(self._sparse, look.dense.x)

    def _time(self, look: Look, warmup: int) -> Timings:
        set_keep_rate(self._sparse, look.keep_rate)
        with always_sparse(self._sparse):
            return compare_latency(self._dense, self._sparse, look.dense.x, repeats=1, min_repeats=1, warmup=warmup)
