"""Sweeps that go on: what was interrupted, what is added, and what does not belong in the same folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep_recipes import RECIPE

from sparsifiner.evaluation import run_sweep
from sparsifiner.evaluation.results import load_rows
from sparsifiner.training import DataConfig
from sparsifiner.training.data import Samples

PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "results"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_more_images_methods_and_stages_go_on(sweep, tmp_path, monkeypatch):
    first = {row.cell: list(row.hits) for row in run_sweep(sweep(num_images=10), tmp_path)}
    assert all(len(hits) == 10 for hits in first.values())
    seen = []
    plain = Samples.__getitem__
    monkeypatch.setattr(Samples, "__getitem__", lambda self, place: seen.append(place) or plain(self, place))
    more = sweep(num_images=24, methods=("sparsifiner", "evit", "local"))
    rows = run_sweep(more, tmp_path)
    assert len(seen) == 5 * 14 + 2 * 24
    assert all(row.hits[:10] == first[row.cell] for row in rows if row.cell in first)
    seen.clear()
    assert [row.to_dict() for row in run_sweep(more, tmp_path)] == [row.to_dict() for row in rows]
    assert not seen
    calibrated = run_sweep(sweep(num_images=24, stages=("calibrated",)), tmp_path)
    assert sum(row.cell.stage == "calibrated" for row in calibrated) == 2  # pruning has nothing to calibrate
    whole = run_sweep(more, tmp_path / "other")
    assert {row.cell: row.hits for row in whole} == {row.cell: row.hits for row in rows}


def test_an_interrupted_sweep_goes_on(sweep, tmp_path, monkeypatch):
    expected = [row.hits for row in run_sweep(sweep(batch_size=1), tmp_path / "whole")]
    plain, left = Samples.__getitem__, [40]

    def dying(self, place):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return plain(self, place)

    monkeypatch.setattr(Samples, "__getitem__", dying)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep(batch_size=1), tmp_path / "cut")
    kept = load_rows(tmp_path / "cut")
    assert 24 < sum(len(row.hits) for row in kept.values()) < 40
    assert all(row.mhsa_macs for row in kept.values())
    assert [row.hits for row in run_sweep(sweep(batch_size=1), tmp_path / "cut")] == expected


def test_another_recipe_in_the_same_folder_is_refused(sweep, tmp_path):
    settings = dict(stages=("fine-tuned",), keep_rates=(0.5,), methods=("local",), num_images=4)
    rows = run_sweep(sweep(**settings, recipe=RECIPE), tmp_path)
    other = dataclasses.replace(RECIPE, seed=5)
    with pytest.raises(ValueError, match=r"local-0.5-fine-tuned was trained by another recipe \(seed\)"):
        run_sweep(sweep(**settings, recipe=other), tmp_path)
    with pytest.raises(ValueError, match="another recipe"):  # also where it comes after cells that are not measured yet
        run_sweep(sweep(**{**settings, "methods": ("strided", "local")}, recipe=other), tmp_path)
    assert not (tmp_path / "cells" / "strided-0.5-fine-tuned").exists()
    (tmp_path / "pareto.json").unlink()
    without_consequence = dataclasses.replace(RECIPE, log_every=7)
    assert [row.hits for row in run_sweep(sweep(**settings, recipe=without_consequence), tmp_path)] == [
        row.hits for row in rows
    ]


def test_other_validation_images_are_refused(sweep, folder_of_images, tmp_path):
    """The order of the images depends on how many there are, so rows would not be about the same ones."""
    grown = tmp_path / "images"
    shutil.copytree(folder_of_images, grown)
    data = DataConfig(path=str(grown), img_size=32, workers=0)
    run_sweep(sweep(data=data, num_images=4), tmp_path / "out")
    picture = next((grown / "val").rglob("*.png"))
    shutil.copy(picture, picture.with_stem("another"))
    with pytest.raises(ValueError, match="another validation_images: 24 instead of 25"):
        run_sweep(sweep(data=data, num_images=4), tmp_path / "out")


def test_the_same_number_of_other_images_is_refused(sweep, folder_of_images, tmp_path):
    moved = shutil.copytree(folder_of_images, tmp_path / "images")
    data = DataConfig(path=str(moved), img_size=32, workers=0)
    settings = dict(num_images=4, methods=("local",), keep_rates=(0.5,), stages=("calibrated",))
    run_sweep(sweep(**settings), tmp_path / "out")
    run_sweep(sweep(**{**settings, "num_images": 5}, data=data), tmp_path / "out")  # moving them is no change
    shutil.copy(moved / "val" / "class1" / "0.png", moved / "val" / "class0" / "0.png")
    with pytest.raises(ValueError, match="holds a sweep of other validation images; name another folder"):
        run_sweep(sweep(**settings, data=data), tmp_path / "out")
    shutil.copy(folder_of_images / "val" / "class0" / "0.png", moved / "val" / "class0" / "0.png")
    shutil.copy(moved / "train" / "class1" / "0.png", moved / "train" / "class0" / "0.png")
    with pytest.raises(ValueError, match="local-0.5-calibrated was fitted on other training images"):
        run_sweep(sweep(**settings, data=data), tmp_path / "out")


def test_another_model_of_the_same_name_is_refused(sweep, classifier, tmp_path):
    """What counts are its weights: the same ones under another name go on."""
    folder, again = shutil.copytree(classifier, tmp_path / "teacher"), tmp_path / "again"
    settings = dict(methods=("local",), keep_rates=(0.5,), stages=("fine-tuned",), recipe=RECIPE)
    run_sweep(sweep(**settings, model=str(folder), num_images=4), tmp_path / "out")
    run_sweep(sweep(**settings, model=str(shutil.copytree(folder, again)), num_images=5), tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "norm.bias": weights["norm.bias"] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds a sweep of another model: its weights or its normalisation differ"):
        run_sweep(sweep(**settings, model=str(folder)), tmp_path / "out")
    (tmp_path / "out" / "pareto.json").unlink()
    with pytest.raises(ValueError, match="local-0.5-fine-tuned was fitted to another model"):
        run_sweep(sweep(**settings, model=str(folder)), tmp_path / "out")


def test_a_row_holds_answers_of_one_model(sweep, tmp_path):
    """Where the folder of a fitted model is gone, another recipe is refused, and a row of other weights starts anew."""
    settings = dict(methods=("local",), keep_rates=(0.5,), stages=("fine-tuned",))
    run_sweep(sweep(**settings, recipe=RECIPE, num_images=4), tmp_path)
    shutil.rmtree(tmp_path / "cells")
    with pytest.raises(ValueError, match=r"local-0.5-fine-tuned was trained by another recipe \(seed\)"):
        run_sweep(sweep(**settings, recipe=dataclasses.replace(RECIPE, seed=5), num_images=8), tmp_path)
    kept = json.loads((tmp_path / "pareto.json").read_text())
    assert kept["rows"][1]["fit"]["recipe"]["phases"][0]["steps"] == 2
    kept["rows"][1] |= {"weights": "as another machine trained them", "hits": "AA=="}
    (tmp_path / "pareto.json").write_text(json.dumps(kept))
    said = []
    anew = run_sweep(sweep(**settings, recipe=RECIPE, num_images=8), tmp_path, say=said.append)[1]
    assert any("measured anew, the weights that gave its 4 answers are gone" in line for line in said)
    assert anew.hits == run_sweep(sweep(**settings, recipe=RECIPE, num_images=8), tmp_path / "whole")[1].hits


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="a source distribution has no benchmarks")
@pytest.mark.parametrize("name", ["cifar10", "cifar10-300-steps", "cifar10-900-steps"])
def test_published_sweeps_are_read_and_not_added_to(sweep, tmp_path, name):
    rows = load_rows(PUBLISHED / name)
    assert all(row.images >= 500 for row in rows.values())
    shutil.copy(PUBLISHED / name / "pareto.json", tmp_path)
    kept = json.loads((tmp_path / "pareto.json").read_text())
    (tmp_path / "pareto.json").write_text(json.dumps({**kept, **sweep().common_settings()}))
    with pytest.raises(ValueError, match="of an older version, which did not record validation_images") as refusal:
        run_sweep(sweep(), tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("moment", ["in the fit", "while the model is written"])
def test_an_interrupted_calibration_goes_on(sweep, tmp_path, monkeypatch, moment):
    """Also of a method whose predictor starts from random weights, which come again as they were."""
    wanted = sweep(methods=("paper",), keep_rates=(0.25,), stages=("training-free", "calibrated"), num_images=8)
    whole = run_sweep(wanted, tmp_path / "whole")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = "calibration.fit.reconstruction_loss" if moment == "in the fit" else "saving.write_together"
    monkeypatch.setattr(f"sparsifiner.{place}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(wanted, tmp_path / "again")
    monkeypatch.undo()
    torch.rand(3)
    assert [row.hits for row in run_sweep(wanted, tmp_path / "again")] == [row.hits for row in whole]
