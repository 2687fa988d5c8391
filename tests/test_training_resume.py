"""Runs that stop and go on: with the same bits, and never from a state that has diverged."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import same, weights

from sparsifiner.training import engine, train
from sparsifiner.training.data import Samples

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Nothing in the library catches it, as nothing catches a signal."""


def test_a_run_killed_anywhere_and_resumed_ends_with_the_same_bits(recipe, tmp_path, monkeypatch):
    first, second = recipe().to_dict()["phases"]
    config = recipe(phases=[{**first, "keep_rate": [0.5, 0.6]}, second], eval_every=1)  # the second keeps them
    train(config, tmp_path / "whole", cpu=True)
    plain = Samples.__getitem__
    draw = random.Random(7)
    left = [0]

    def dying(self, place):
        left[0] -= self.replace_broken  # training images only; there are 48 in all
        if self.replace_broken and left[0] == 0:
            raise Killed
        return plain(self, place)

    monkeypatch.setattr(Samples, "__getitem__", dying)
    kills = 0
    for _ in range(20):
        left[0] = draw.randint(5, 30) if kills < 5 else -1
        torch.manual_seed(draw.randint(0, 1000))  # what a new process starts with is of no account
        random.seed(draw.randint(0, 1000))
        try:
            result = train(config, tmp_path / "resumed", cpu=True)
            break
        except Killed:
            kills += 1
    assert kills >= 2
    for name in ("model", "ema"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "resumed", name)), name
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "whole", "ema"))
    history = json.loads((tmp_path / "whole" / "history.json").read_text())
    assert result.history == history
    trained = [entry for entry in history if "lr" in entry]
    assert [(entry["phase"], entry["update"]) for entry in trained] == [(0, 1), (0, 2)] + [(1, n) for n in range(1, 5)]
    # A finished run that is started again changes nothing.
    assert train(config, tmp_path / "resumed", cpu=True).history == history
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def test_validation_and_checkpoints_between_steps_leave_training_alone(recipe, tmp_path):
    phases = [{"name": "attn_recon", "epochs": 1}, {"name": "cls", "epochs": 2, "lr": 1e-3}]
    often = recipe(phases=phases, eval_every=1, checkpoint_every=1)
    validated = [entry for entry in train(often, tmp_path / "often", cpu=True).history if "validated" in entry]
    assert [entry["update"] for entry in validated if entry["validated"] == "model"] == [3, 3, 6]
    data = {**often.to_dict()["data"], "val_split": None}
    train(recipe(phases=phases, checkpoint_every=100, data=data), tmp_path / "never", cpu=True)
    for name in ("model", "ema"):
        assert same(weights(tmp_path / "often", name), weights(tmp_path / "never", name)), name


def test_the_gradient_scaler_lives_on_from_phase_to_phase(recipe, tmp_path, monkeypatch):
    """One on the CPU, of powers of two, which change no bit of the gradients."""
    plain = engine.make_accelerator
    live = []

    def scaling(*arguments, **settings):
        accelerator = plain(*arguments, **settings)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        live.append(accelerator.scaler)
        return accelerator

    def die(number, update):
        if number == 1:
            raise Killed

    monkeypatch.setattr(engine, "make_accelerator", scaling)
    phases = [{"name": "attn_recon", "steps": 3}, {"name": "cls", "steps": 3}]
    config = recipe(phases=phases, checkpoint_every=100, data={**recipe().to_dict()["data"], "limit": 80})
    train(config, tmp_path / "whole", cpu=True)
    with pytest.raises(Killed):
        train(config, tmp_path / "resumed", cpu=True, on_update=die)
    saved = torch.load(tmp_path / "resumed" / "checkpoint.pt", weights_only=True)
    assert (saved["phase"], saved["update"]) == (1, 0)
    assert (saved["scaler"]["scale"], saved["scaler"]["_growth_tracker"]) == (16.0, 1)
    train(config, tmp_path / "resumed", cpu=True)
    assert live[2].state_dict() == live[0].state_dict()
    assert live[2].get_scale() == 64.0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


@pytest.mark.parametrize("sparsity", [None, {"preset": "paper", "keep_rate": 0.3}])
@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_diverges_says_so_and_leaves_a_sound_checkpoint(every, sparsity, recipe, tmp_path):
    """The losses of the first step are finite, the weights it makes are as well, and the next loss is not."""
    phases = [{"name": "cls", "steps": 1}, {"name": "cls", "steps": 3, "lr": 1e30}]
    config = recipe(phases=phases, sparsity=sparsity, optimizer="sgd", clip_grad=None, checkpoint_every=every)
    for _ in range(2):  # a run that goes on from the checkpoint diverges in the same way
        with pytest.raises(ValueError, match=r"not finite at step [12] of phase cls; lower lr, set") as refused:
            train(config, tmp_path, cpu=True)
        assert "\n" not in str(refused.value)
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert (saved["phase"], saved["update"]) == (1, 0)
        assert all(value.abs().max() < 100 for value in saved["student"].values())


def test_the_last_step_of_a_run_is_checked_as_well(recipe, tmp_path):
    phases = [{"name": "cls", "steps": 1, "lr": 1e30}]
    with pytest.raises(ValueError, match="the loss loss is not finite at step 1 of phase cls"):
        train(recipe(phases=phases, sparsity=None, optimizer="sgd", clip_grad=None), tmp_path, cpu=True)
    assert not (tmp_path / "model").exists()
