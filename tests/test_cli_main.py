"""The command itself: version, ``python -m``, completion."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sparsifiner
from sparsifiner.cli import main


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    assert run(["--version"], capsys) == f"sparsifiner {sparsifiner.__version__}\n"
    assert subprocess.check_output([sys.executable, "-m", "sparsifiner", "--version"], text=True) == (
        f"sparsifiner {sparsifiner.__version__}\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [("sparsifiner tr", {"train"}), ("sparsifiner train --recipe cifar10_sweep", {"cifar10_sweep_longer"})],
)
def test_commands_and_recipes_are_completed(words, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsifiner"])
    monkeypatch.setenv("_SPARSIFINER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit):
        main()
    assert expected <= set(capsys.readouterr().out.split())
