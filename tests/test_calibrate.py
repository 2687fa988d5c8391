"""Calibration: what it gains, that it continues where it stopped, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from conftest import lively
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsifiner
from sparsifiner import SparsifinerConfig, calibrate, from_pretrained, save_pretrained, sparse_layers, sparsify
from sparsifiner._utils.photos import bundled_photos, preprocess
from sparsifiner.calibration import fit as module
from sparsifiner.calibration.budget import allocate
from sparsifiner.calibration.state import State
from sparsifiner.calibration.tail import OFFSETS, best_offsets
from sparsifiner.cli import main
from sparsifiner.geometry.counting import num_kept
from sparsifiner.models import load_model
from sparsifiner.predictors import LowRankConfig
from sparsifiner.reduction.pruning import prune_tokens

PAPER = SparsifinerConfig.paper(keep_rate=0.2, n_down=12)
TILES = SparsifinerConfig(
    keep_rate=0.1, query_tile=(2, 2), mode="sparse", predictor=LowRankConfig(n_down=12), tail=(2, 2)
)
POOLED = SparsifinerConfig(keep_rate=0.1, query_tile=(2, 2), mode="sparse", tail=(2, 2))


def tiny(depth: int = 2, **changes: object) -> nn.Module:
    settings = dict(img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=0)
    return lively(timm.create_model("vit_tiny_patch16_224", **settings, **changes))


def batch(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def quietly(stage: str, done: int, total: int) -> None:
    pass


@cache
def builtin() -> tuple[nn.Module, torch.Tensor]:
    model = load_model("builtin", img_size=(224, 224))
    transform = preprocess(model, (224, 224))
    return model, torch.stack([transform(photo.image) for photo in bundled_photos().photos])


def test_offsets_lower_the_error_of_the_layers_they_were_fitted_to() -> None:
    """Of the photographs fitted only: what carries over to others takes more of them than are shipped."""
    model, photos = builtin()
    sparse = sparsify(model, SparsifinerConfig(keep_rate=0.1))
    result = calibrate(sparse, photos[:2], progress=quietly)
    assert sum(layer.error for layer in result.layers) < 0.99 * sum(layer.error_before for layer in result.layers)
    assert not result.held_out
    assert "final patches, cosine" in str(result)


def test_the_spectral_start_beats_random_weights() -> None:
    model, photos = builtin()
    sparse = sparsify(model, SparsifinerConfig.paper(keep_rate=0.25))
    result = calibrate(sparse, photos[:1], steps=0, progress=quietly)
    errors = [(layer.error_before, layer.error) for layer in result.layers]
    assert sum(after for _, after in errors) < 0.8 * sum(before for before, _ in errors)


@pytest.mark.parametrize("config", [PAPER, TILES])
def test_a_reconstruction_that_does_harm_is_not_kept(config: SparsifinerConfig) -> None:
    found = []
    for changes in (dict(steps=0), dict(steps=3, learning_rate=1e3), dict(steps=20, learning_rate=3e-2)):
        sparse = sparsify(tiny(), config)
        result = calibrate(sparse, batch(), progress=quietly, **changes)
        found.append((weights(sparse), sum(layer.error for layer in result.layers)))
    (start, error), (harmed, _), (fitted, better) = found
    assert same(start, harmed)
    assert not same(start, fitted)
    assert better < error


@settings(max_examples=30, deadline=None)
@given(
    squares=st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=6),
    budget=st.floats(0.02, 1.0),
    candidates=st.integers(4, 400),
)
def test_the_budget_is_spent_to_the_key(squares: list[list[float]], budget: float, candidates: int) -> None:
    rates = tuple(sorted({budget / 3, budget, min(1.0, 3 * budget)}))
    errors = torch.tensor(squares, dtype=torch.float64)[:, : len(rates)]
    given_rates = allocate(errors, rates, budget, candidates)
    assert all(0 < rate <= 1 for rate in given_rates)
    keys = [num_kept(rate, candidates) for rate in given_rates]
    assert sum(keys) == len(squares) * num_kept(budget, candidates)


def test_the_budget_goes_where_the_error_is() -> None:
    rates = (0.1, 0.3, 0.9)
    uneven = torch.tensor([[1.0, 0.5, 0.1], [0.01, 0.005, 0.001], [0.0, 0.0, 0.0]], dtype=torch.float64)
    first, second, third = allocate(uneven, rates, 0.3, 100)
    assert first > second >= third
    even = allocate(torch.tensor([[1.0, 0.5, 0.3]] * 3), rates, 0.3, 100)
    assert max(even) - min(even) < 0.011


def test_keep_rates_per_layer_keep_the_number_of_keys() -> None:
    sparse = sparsify(tiny(depth=3), POOLED)
    result = calibrate(sparse, batch(), keep_rates="per_layer", progress=quietly)
    keys = [num_kept(layer.keep_rate, 64) for layer in result.layers]
    assert sum(keys) == 3 * math.ceil(0.1 * 64)
    with torch.no_grad(), sparsifiner.record(sparse) as seen:
        sparse(batch(1))
    widths = [item.connectivity.num_keys - 1 for item in seen.values() if item.connectivity is not None]
    assert widths == keys


def test_offsets_are_refined_between_those_tried() -> None:
    truth = torch.tensor([[0.234], [-0.5], [1.777]], dtype=torch.float64)
    offsets = best_offsets((OFFSETS.double() - truth).square(), 10**9)
    torch.testing.assert_close(offsets, truth[:, 0].float(), atol=1e-4, rtol=0)
    few = best_offsets((OFFSETS.double() - truth).square(), 2)
    torch.testing.assert_close(few, truth[:, 0].float() / 2, atol=1e-4, rtol=0)
    assert best_offsets(torch.zeros(2, len(OFFSETS)), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("config", "keep_rates"), [(POOLED, "per_layer"), (TILES, "given"), (PAPER, "given")])
def test_a_killed_calibration_continues_to_the_same_weights(
    config: SparsifinerConfig, keep_rates: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    torch.manual_seed(0)
    start = sparsify(tiny(), config)
    arguments = dict(keep_rates=keep_rates, steps=4, progress=quietly)
    whole = copy.deepcopy(start)
    steps: list[str] = []
    calibrate(whole, batch(), **{**arguments, "progress": lambda stage, done, total: steps.append(stage)})
    again = copy.deepcopy(start)
    calibrate(again, batch(), **arguments)
    assert same(weights(again), weights(whole))  # deterministic under a seed

    killed = copy.deepcopy(start)
    untouched = weights(killed)
    for last in range(2, len(steps) + 3, 3):  # killed again and again, a little later each time
        calls = 0

        def kill(stage: str, done: int, total: int, last: int = last) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt

        try:
            calibrate(killed, batch(), state=tmp_path / "state", **{**arguments, "progress": kill})
            break
        except KeyboardInterrupt:
            assert same(weights(killed), untouched)
    assert same(weights(killed), weights(whole))
    assert [layer.config for layer in sparse_layers(killed).values()] == [
        layer.config for layer in sparse_layers(whole).values()
    ]
    with pytest.raises(ValueError, match="another model, other images or other settings"):
        calibrate(copy.deepcopy(start), batch(2), state=tmp_path / "state", **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_saved_with_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0).eval()
    sparse = sparsify(model, SparsifinerConfig(query_tile=(2, 2), predictor=LowRankConfig(n_down=6), tail=(2, 2))).to(
        dtype
    )
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    calibrate(sparse, x, steps=2, keep_rates="per_layer", progress=quietly)
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}
    assert any(layer.predictor.tail_offset.abs().max() > 0 for layer in sparse_layers(sparse).values())
    save_pretrained(sparse, tmp_path)
    back = from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(back(x.to(dtype)), sparse(x.to(dtype)))


def test_all_kinds_of_images_are_taken(tmp_path: Path) -> None:
    photos = bundled_photos(2).photos
    for number, photo in enumerate(photos):
        photo.image.resize((40, 40)).save(tmp_path / f"{number}.png")
    dense = tiny()
    transform = preprocess(dense, (32, 32))
    tensors = torch.stack([transform(photo.image.resize((40, 40))) for photo in photos])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tensors, torch.zeros(2)), batch_size=2)
    results = []
    for images in (tmp_path, sorted(tmp_path.iterdir()), tensors, list(tensors), loader):
        sparse = sparsify(dense, POOLED)
        calibrate(sparse, images, progress=quietly)
        results.append(weights(sparse))
    assert all(same(result, results[0]) for result in results)


def test_pictures_that_cannot_be_read_are_skipped(tmp_path: Path) -> None:
    """In a list as in a folder; with the others alone the result is the same."""
    photos = bundled_photos(2).photos
    for photo in photos:
        photo.image.resize((40, 40)).save(tmp_path / f"b{photo.name}.png")
    good = sorted(tmp_path.iterdir())
    broken = tmp_path / "a.png"
    broken.write_bytes(good[0].read_bytes()[:200])
    dense, results = tiny(), []
    for images in (tmp_path, [broken, *good], [*good[:1], tmp_path / "missing.png", *good[1:]]):
        sparse = sparsify(dense, POOLED)
        with pytest.warns(UserWarning, match="1 files skipped, such as .*(a|missing).png"):
            calibrate(sparse, images, max_images=2, progress=quietly)
        results.append(weights(sparse))
    sparse = sparsify(dense, POOLED)
    calibrate(sparse, good, progress=quietly)
    assert all(same(result, weights(sparse)) for result in results)


def test_one_number_is_a_square_of_pixels(tmp_path: Path) -> None:
    bundled_photos(1).photos[0].image.save(tmp_path / "a.png")
    dense = lively(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, dynamic_img_size=True))
    results = []
    for size in (112, (112, 112)):
        sparse = sparsify(dense, POOLED)
        calibrate(sparse, tmp_path, img_size=size, progress=quietly)
        results.append(weights(sparse))
    assert same(*results)


@pytest.mark.parametrize("config", [PAPER, TILES])
def test_inference_mode_and_frozen_weights_change_nothing(config: SparsifinerConfig) -> None:
    def fitted(*, learns: bool = True) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        sparse = sparsify(tiny(), config).requires_grad_(learns)
        calibrate(sparse, batch(2), steps=2, progress=quietly)
        return weights(sparse)

    expected = fitted()
    assert same(fitted(learns=False), expected)
    with torch.inference_mode():
        assert same(fitted(), expected)


@pytest.mark.parametrize(("count", "chosen"), [(3, [0, 1, 2]), (15, [0, 1, 3, 5, 7, 9, 11, 13])])
def test_few_images_are_evenly_spaced(count: int, chosen: list[int]) -> None:
    images = [torch.tensor(number) for number in range(count)]
    run = module._Run(sparsify(tiny(), POOLED), images, State(None, ""), quietly, seed=0)
    assert [int(image) for image in run._few_images()] == chosen


def test_attention_biases_take_part() -> None:
    dense = lively(timm.create_model("beit_base_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=2)).eval()
    sparse = sparsify(dense, SparsifinerConfig(keep_rate=0.2, query_tile=(2, 2), tail=(2, 2)))
    result = calibrate(sparse, torch.randn(1, 3, 64, 64), progress=quietly)
    assert all(layer.error <= layer.error_before * 1.001 for layer in result.layers)


@pytest.mark.parametrize("config", [POOLED, PAPER, TILES])
@pytest.mark.parametrize("fuse", [False, True])
def test_pruned_models_are_calibrated(config: SparsifinerConfig, fuse: bool) -> None:
    pruned = prune_tokens(tiny(depth=4), keep_rate=0.7, layers=(1, 3), fuse=fuse)
    sparse = sparsify(pruned, config.replace(keep_rate=1.0))
    result = calibrate(sparse, batch(2), steps=2, progress=quietly)
    # With all keys kept, both passes prune the same patches, and attention is the same.
    assert result.before.mean("patch_l2") == pytest.approx(0, abs=1e-5)
    assert result.after.mean("patch_cosine") == pytest.approx(1, abs=1e-5)
    result = calibrate(sparsify(pruned, config), batch(2), steps=2, progress=quietly)
    assert 0 < result.after.mean("patch_l2") < 2
    assert result.after.mean("patch_cosine") > 0.3
    with pytest.raises(ValueError, match="keep rates per layer compare patch by patch, but VisionTransformer prunes"):
        calibrate(sparse, batch(1), keep_rates="per_layer", progress=quietly)


def test_unusable_requests_are_refused_in_one_line(tmp_path: Path) -> None:
    sparse = sparsify(tiny(), POOLED)
    before = weights(sparse)

    def refused(match: str, model: nn.Module = sparse, images: object = None, **changes: object) -> None:
        with pytest.raises(ValueError, match=match) as refusal:
            calibrate(model, batch(1) if images is None else images, progress=quietly, **changes)
        assert "\n" not in str(refusal.value)

    refused("call sparsify", model=tiny())
    refused("keep_rates 'per-layer' is unknown; choose given or per_layer", keep_rates="per-layer")
    refused("start 'pca' is unknown", start="pca")
    refused("steps must be a whole number of at least 0", steps=-1)
    refused("learning_rate must be above 0", learning_rate=0.0)
    refused("max_images must be a whole number of at least 1", max_images=0)
    refused("does not exist", images=tmp_path / "nowhere")
    refused("cannot be read", images=[tmp_path / "nowhere.jpg"])
    refused("there is no image to calibrate on", images=[])
    refused("entry 0 must be a float tensor", images=[torch.zeros(3, 32, 32, dtype=torch.uint8)])
    refused("not finite", images=torch.full((1, 3, 32, 32), float("nan")))
    refused("got int", images=3)
    refused("there is no image to calibrate on", images=torch.empty(0, 3, 32, 32))
    refused("entry 0 of 1 channels do not fit the model, which takes 3", images=torch.zeros(2, 1, 32, 32))
    refused(
        "entry 1 of 64x32 pixels do not fit the model, which takes 32x32", images=[batch(1), torch.zeros(3, 64, 32)]
    )
    bundled_photos(1).photos[0].image.save(tmp_path / "a.png")
    refused(
        "pictures of 64x64 pixels do not fit the model, which takes 32x32", images=[tmp_path / "a.png"], img_size=64
    )
    dynamic = sparsify(tiny(dynamic_img_size=True), POOLED)
    refused("image size 30 is not a multiple", model=dynamic, images=torch.zeros(1, 3, 30, 30))
    refused("image size 0 is not a multiple", model=dynamic, images=torch.zeros(1, 3, 0, 0))
    four_channels = sparsify(tiny(in_chans=4), POOLED)
    refused("pictures of 3 channels do not fit the model, which takes 4", four_channels, images=[tmp_path / "a.png"])
    refused("multiple of the model's 4x4 patches", images=[tmp_path / "x.png"], img_size=(30, 30))
    refused("has nothing to fit", model=sparsify(tiny(), POOLED.replace(tail=None)))
    thresholded = sparsify(tiny(), TILES.replace(predictor=LowRankConfig(n_down=12, score_threshold=0.1)))
    refused("score_threshold keeps any number of keys", model=thresholded, keep_rates="per_layer")
    (tmp_path / "state").write_bytes(b"no state")
    refused("not the state of a calibration", state=tmp_path / "state")
    assert same(weights(sparse), before)


def test_the_command_saves_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["calibrate", *map(str, arguments)])
        return stop.value.code, *capsys.readouterr()

    folder = Path(sparsifiner.__file__).parent / "data" / "photos"
    common = ("--images", folder, "--output", tmp_path / "out", "--img-size", "112", "--num-images", "1")
    code, out, err = call(*common, "--keep-rate", "0.2", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "calibration.json", "model.safetensors", "sparsifiner.json"
    ]  # fmt: skip
    assert all(layer.config.tail.offset for layer in sparse_layers(from_pretrained(tmp_path / "out")).values())
    for arguments, words in (
        (("--images", tmp_path / "none", "--output", tmp_path / "x"), "does not exist"),
        ((*common, "--keep-rates", "some"), "choose given or per_layer"),
    ):
        code, out, err = call(*arguments)
        assert code == 2
        assert words in err
        assert "Traceback" not in err


@pytest.mark.parametrize("worse", [True, False])
def test_a_fit_that_makes_held_out_images_worse_is_not_applied(worse: bool, monkeypatch, caplog) -> None:
    """Whatever was fitted: here an offset that lets the tail drown the kept keys, or the one that was chosen."""
    model = sparsify(tiny(), POOLED)
    before = weights(model)
    if worse:
        monkeypatch.setattr(module, "best_offsets", lambda errors, count: torch.full((errors.shape[0],), 9.0))
    with caplog.at_level("WARNING", "sparsifiner"):
        result = calibrate(model, batch(2), validation=batch(5)[2:], progress=quietly)
    assert result.held_out
    first, last = result.patch_errors
    assert result.applied == (last <= first)
    assert result.to_dict()["applied"] == result.applied
    if worse:
        assert not result.applied
        assert "calibration to 2 images made the held-out images worse" in caplog.text
        assert "the model keeps what it had" in caplog.text
    assert same(weights(model), before) == (not result.applied)


def test_few_images_without_others_are_told(caplog) -> None:
    for count, told in ((1, True), (7, True), (8, False)):
        caplog.clear()
        with caplog.at_level("WARNING", "sparsifiner"):
            result = calibrate(sparsify(tiny(), POOLED), batch(count), progress=quietly)
        assert result.applied
        assert ("others may have become worse" in caplog.text) == told
