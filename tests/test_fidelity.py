"""Training-free fidelity of the built-in model on real photographs at 504 px: the floors the product promises."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner._utils.photos import bundled_photos, preprocess
from sparsifiner.measure.fidelity import measure_fidelity
from sparsifiner.models import load_model

PHOTOS = 3


@cache
def model_and_photos() -> tuple[nn.Module, torch.Tensor, list[str]]:
    model = load_model("builtin", img_size=(504, 504))
    photos = bundled_photos(PHOTOS).photos
    transform = preprocess(model, (504, 504))
    return model, torch.stack([transform(photo.image) for photo in photos]), [photo.name for photo in photos]


@cache
def fidelity(config: SparsifinerConfig) -> tuple[float, float]:
    model, photos, names = model_and_photos()
    measured = measure_fidelity(model, sparsify(model, config), photos, names)
    cosine, relative_l2 = measured.mean("patch_cosine"), measured.mean("patch_l2")
    assert cosine is not None
    assert relative_l2 is not None
    return cosine, relative_l2


@pytest.mark.parametrize(("keep_rate", "min_cosine", "max_l2"), [(0.1, 0.994, 0.1), (0.25, 0.998, 0.06)])
def test_the_training_free_default_keeps_the_features(keep_rate: float, min_cosine: float, max_l2: float) -> None:
    cosine, relative_l2 = fidelity(SparsifinerConfig(keep_rate=keep_rate))
    assert cosine >= min_cosine
    assert relative_l2 <= max_l2


def test_instance_dependence_beats_a_fixed_window_and_the_tail_matters() -> None:
    cosine, _ = fidelity(SparsifinerConfig(keep_rate=0.1))
    local, _ = fidelity(SparsifinerConfig(keep_rate=0.1, predictor="local"))
    truncated, _ = fidelity(SparsifinerConfig(keep_rate=0.1, tail=None))
    assert 1 - local > 4 * (1 - cosine)
    assert 1 - truncated > 20 * (1 - cosine)
