"""Distance of a sparse model's features from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SparsifinerError
from ..recording import record
from ..reduction.blocks import refuse_reduced


@dataclass(frozen=True)
class ImageFidelity:
    """Final features of one image, sparse against dense.

    Args:
        name: the image.
        patch_l2: ``|sparse - dense| / |dense|`` over all final patch features.
        patch_cosine: cosine of dense and sparse feature, mean over the patches.
        class_l2: relative L2 of the class feature; None in a model without class token.
        class_cosine: its cosine, or None.
    """

    name: str
    patch_l2: float
    patch_cosine: float
    class_l2: float | None = None
    class_cosine: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """Fidelity over a set of images; an error is worst where it is largest, a cosine where it is smallest.

    Args:
        images: one entry per image, in order.
        density: query-key pairs each sparse layer kept over all pairs, mean over the images, by layer path.
    """

    images: list[ImageFidelity]
    density: dict[str, float]

    def _values(self, term: str) -> list[float]:
        values = [getattr(image, term) for image in self.images]
        return [value for value in values if value is not None]

    def mean(self, term: str) -> float | None:
        """Mean of ``patch_l2``, ``patch_cosine``, ``class_l2`` or ``class_cosine``; None where there is none."""
        values = self._values(term)
        return sum(values) / len(values) if values else None

    def worst(self, term: str) -> float | None:
        """The worst image's value of the same terms."""
        values = self._values(term)
        if not values:
            return None
        return min(values) if term.endswith("cosine") else max(values)

    def worst_image(self, term: str = "patch_cosine") -> str | None:
        """Name of the image that ``worst`` comes from."""
        worst = self.worst(term)
        return next((image.name for image in self.images if worst is not None and getattr(image, term) == worst), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        terms = ("patch_l2", "patch_cosine", "class_l2", "class_cosine")
        return {
            "mean": {term: self.mean(term) for term in terms},
            "worst": {term: self.worst(term) for term in terms},
            "worst_image": {term: self.worst_image(term) for term in terms},
            "density_per_layer": self.density,
            "images": [asdict(image) for image in self.images],
        }


def measure_fidelity(
    dense: nn.Module, sparse: nn.Module, images: Iterable[Tensor], names: Sequence[str] | None = None
) -> Fidelity:
    """Compare the final features (after the last norm) of two models, image by image, in float32.

    Args:
        dense: a timm model, in evaluation mode.
        sparse: its sparse version.
        images: preprocessed images ``[3, height, width]`` or batches ``[B, 3, height, width]``.
        names: a name per image; numbers if None.

    Raises:
        ValueError: if there is no image, a model has no ``forward_features``, or one prunes or merges tokens.
    """
    for model in (dense, sparse):
        refuse_reduced(model, "fidelity figures")
    results: list[ImageFidelity] = []
    density: dict[str, list[float]] = {}
    for batch in images:
        x = batch if batch.ndim == 4 else batch[None]
        for image in x.split(1):
            name = names[len(results)] if names is not None else str(len(results))
            expected = final_features(dense, image)
            with record(sparse) as seen:
                got = final_features(sparse, image)
            for layer, item in seen.items():
                density.setdefault(layer, []).append(1.0 if item.connectivity is None else item.connectivity.density())
            results.append(compare_features(name, expected, got))
    if not results:
        raise SparsifinerError("there is no image to measure fidelity on; give at least one")
    return Fidelity(results, {layer: sum(values) / len(values) for layer, values in density.items()})


def final_features(model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Final patch features ``[B, patches, C]`` and class feature ``[B, C]`` (None without class token), float32."""
    if not hasattr(model, "forward_features"):
        raise SparsifinerError(
            f"{type(model).__name__} has no forward_features; fidelity needs a timm Vision Transformer"
        )
    forward: Any = model.forward_features
    with torch.no_grad():
        tokens: Tensor = forward(x)
    prefix: int = getattr(model, "num_prefix_tokens", 0)
    has_class = prefix > 0 and getattr(model, "cls_token", None) is not None
    return tokens[:, prefix:].float(), tokens[:, 0].float() if has_class else None


def compare_features(
    name: str, dense: tuple[Tensor, Tensor | None], sparse: tuple[Tensor, Tensor | None]
) -> ImageFidelity:
    """The fidelity of one image from its features, dense and sparse, as :func:`final_features` returns them."""
    patch_l2, patch_cosine = _distance(dense[0], sparse[0])
    if dense[1] is None or sparse[1] is None:
        return ImageFidelity(name, patch_l2, patch_cosine)
    return ImageFidelity(name, patch_l2, patch_cosine, *_distance(dense[1], sparse[1]))


def _distance(dense: Tensor, sparse: Tensor) -> tuple[float, float]:
    """Relative L2 over everything, and the mean cosine over the last dimension."""
    relative = (sparse - dense).norm() / dense.norm().clamp(min=torch.finfo(dense.dtype).tiny)
    return relative.item(), F.cosine_similarity(dense, sparse, dim=-1).mean().item()
