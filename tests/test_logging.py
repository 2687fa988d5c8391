"""Long work says what it does through the logger ``sparsifiner``, unless the caller listens otherwise."""

from __future__ import annotations

import logging

import pytest

from sparsifiner.training import train


def test_training_logs_its_steps(recipe, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    config = recipe(phases=[{"name": "joint", "steps": 1, "lr": 1e-3}])
    with caplog.at_level(logging.INFO, logger="sparsifiner"):
        train(config, tmp_path / "run", cpu=True)
    assert any("joint step 1 of 1" in line for line in caplog.messages)
