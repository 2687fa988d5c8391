"""Trackers that cannot be used are told before training."""

from __future__ import annotations

from enum import Enum

import pytest

from sparsifiner.training.recipe_file import from_dict
from sparsifiner.training.trackers import make_accelerator


def refusal(tracker, folder):
    recipe = from_dict({"phases": [{"name": "cls", "steps": 1}], "trackers": [tracker]})
    with pytest.raises(ValueError, match=tracker) as refused:
        make_accelerator(recipe, folder, cpu=True)
    return str(refused.value)


def test_an_accelerate_that_does_not_know_the_tracker_is_told(monkeypatch, tmp_path):
    """1.0 has no trackio, and its refusal was taken for one of the precision."""
    monkeypatch.setattr("accelerate.utils.LoggerType", Enum("LoggerType", {"WANDB": "wandb"}))
    assert refusal("trackio", tmp_path) == (
        "the accelerate installed is too old for the tracker trackio: pip install -U accelerate"
    )


def test_a_folder_of_its_name_is_no_tracker(monkeypatch, tmp_path):
    """wandb makes one where it runs; the run was accepted and nothing tracked."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("wandb", tmp_path) == "the tracker wandb is not installed: pip install wandb"
