"""Fidelity, latency, break-even and memory."""

from __future__ import annotations

import math
import time

import pytest
import timm
import torch

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner.measure import BreakEven, Timings, break_even, interleave, measure_fidelity, measure_memory
from sparsifiner.measure.accuracy import paired_drop
from sparsifiner.measure.crossover import BreakEvenPoint


def pair(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    dense = timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 0, **settings}).eval()
    return dense, sparsifiner.sparsify(
        dense, SparsifinerConfig(mode="sparse", keep_rate=0.1, query_tile=(2, 2), tail=None)
    )


def test_equal_models_have_no_error():
    dense, sparse = pair()
    sparsifiner.set_keep_rate(sparse, 1.0)
    fidelity = measure_fidelity(dense, sparse, [torch.randn(3, 64, 64)], ["a.jpg"])
    assert fidelity.mean("patch_l2") < 1e-5
    assert fidelity.mean("class_cosine") == pytest.approx(1.0, abs=1e-5)
    assert fidelity.density == {"blocks.0.attn": 1.0, "blocks.1.attn": 1.0}


def test_mean_and_worst_over_images_are_those_of_the_features():
    dense, sparse = pair()
    images = torch.randn(3, 3, 64, 64) * torch.tensor([0.1, 1.0, 5.0]).view(3, 1, 1, 1)
    fidelity = measure_fidelity(dense, sparse, images, ["a", "b", "c"])
    with torch.no_grad():
        want, got = dense.forward_features(images)[:, 1:], sparse.forward_features(images)[:, 1:]
    errors = [((g - w).norm() / w.norm()).item() for w, g in zip(want, got, strict=True)]
    cosines = [torch.cosine_similarity(w, g, dim=-1).mean().item() for w, g in zip(want, got, strict=True)]
    assert [image.patch_l2 for image in fidelity.images] == pytest.approx(errors, rel=1e-3)
    assert fidelity.worst("patch_l2") == pytest.approx(max(errors), rel=1e-3)
    assert fidelity.worst("patch_cosine") == pytest.approx(min(cosines), rel=1e-3)
    assert fidelity.worst_image("patch_cosine") == "abc"[cosines.index(min(cosines))]
    assert fidelity.mean("patch_cosine") == pytest.approx(sum(cosines) / 3, rel=1e-3)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_medium_patch16_reg4_gap_256"])
def test_models_without_class_token_have_no_class_feature(name):
    dense, sparse = pair(name)
    fidelity = measure_fidelity(dense, sparse, [torch.randn(3, 64, 64)])
    assert fidelity.mean("class_l2") is None
    assert fidelity.worst("class_cosine") is None
    assert fidelity.mean("patch_l2") > 0


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        measure_fidelity(*pair(), [])


def test_runs_alternate_after_warm_up():
    order = []
    timings = interleave(lambda: order.append("d"), lambda: order.append("s"), repeats=3, warmup=1)
    assert "".join(order) == "dsdsdsds"
    assert len(timings.dense) == len(timings.sparse) == 3


def test_runs_stop_when_time_is_over_but_not_before_the_minimum():
    timings = interleave(lambda: time.sleep(0.01), lambda: None, repeats=50, warmup=0, max_seconds=0.0, min_repeats=2)
    assert len(timings.dense) == 2


def test_ratios_are_dense_over_sparse():
    timings = Timings(dense=[1.0, 2.0, 9.0], sparse=[1.0, 4.0, 4.0])
    assert timings.speedup == 0.5
    assert timings.paired_speedup == 1.0


@pytest.mark.parametrize(
    ("crossing", "tokens"),
    [(0, 197), (700, 730), (10**9, None)],  # sides 14, 18, 22, 28, 32; 27 and 25 lie in between
)
def test_break_even_is_the_smallest_size_from_which_sparse_wins(monkeypatch, crossing, tokens):
    def measured(layer, side, repeats):
        count = 1 + side**2
        return BreakEvenPoint(count, side * 16, dense_s=1.0, sparse_s=0.5 if count >= crossing else 2.0)

    monkeypatch.setattr("sparsifiner.measure.crossover._measure_layer", measured)
    found = break_even(pair()[1], max_tokens=1024)
    assert found.num_tokens == tokens
    assert found.reached == (tokens is not None)
    assert found.max_tokens == 1025
    assert found.max_image_size == 512
    assert ("not faster sparse up to 1025 tokens (512 px)" in str(found)) == (tokens is None)


def test_break_even_measures_the_layer_and_leaves_the_model_alone():
    _, sparse = pair()
    found = break_even(sparse, max_tokens=400, repeats=1)
    assert isinstance(found, BreakEven)
    measured = [point.num_tokens for point in found.points]
    assert measured == sorted(measured)
    assert {197, 325} <= set(measured)  # where sparse wins in between, sizes in between are measured as well
    assert all(point.dense_s > 0 and point.sparse_s > 0 for point in found.points)
    assert sparse.blocks[0].attn.grid.shape == (4, 4)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_no_break_even_is_told_of_layers_with_a_bias(name):
    _, sparse = pair(name)
    assert break_even(sparse, max_tokens=400, repeats=1) is None


def test_the_interval_of_a_drop_stays_within_all_images():
    right, wrong = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    assert paired_drop(right, wrong)[1][1] == 1.0
    assert paired_drop(wrong, right)[1][0] == -1.0


class Hungry(torch.nn.Module):
    """Holds ``mebibytes`` for the length of a forward pass."""

    def __init__(self, mebibytes: int) -> None:
        super().__init__()
        self.mebibytes = mebibytes

    def forward(self, x):
        return torch.ones(self.mebibytes, 2**18).sum() + x.sum()


def test_peak_memory_is_what_the_forward_pass_adds():
    peak = measure_memory(Hungry(200), torch.zeros(1))
    assert math.isclose(peak.forward_bytes / 2**20, 200, abs_tol=20)
    assert peak.weight_bytes == 0
    assert "fresh process" in peak.method


class Unpicklable(Hungry):
    def __reduce__(self):
        raise TypeError("not today")


def test_a_model_that_cannot_be_pickled_is_an_error_in_one_line():
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        measure_memory(Unpicklable(1), torch.zeros(1))


class Broken(Hungry):
    def forward(self, x):
        raise ValueError("no forward today")


def test_the_reason_of_a_failed_process_is_handed_on():
    with pytest.raises(RuntimeError, match="no forward today"):
        measure_memory(Broken(1), torch.zeros(1))
