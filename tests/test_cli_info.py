"""``sparsifiner info`` says what runs here and why the rest does not."""

from __future__ import annotations

import json

import pytest
from huggingface_hub.utils import logging

from sparsifiner.cli import main
from sparsifiner.ops import OPERATIONS, cpu


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_retries_of_downloads_are_silent_unless_the_user_asks(capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_VERBOSITY", "info")
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        run(["info"], capsys)
        assert logging.get_verbosity() == logging.INFO
        monkeypatch.delenv("HF_HUB_VERBOSITY")
        run(["info"], capsys)
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(before)


def test_facts_agree_with_the_library(capsys) -> None:
    facts = json.loads(run(["info", "--json"], capsys))
    assert facts["native"]["level"] == cpu.level()
    assert facts["native"]["levels"] == cpu.levels()
    assert facts["native"]["missing"] == cpu.why_missing()
    chosen = {choice["dtype"]: choice["backend"] for choice in facts["choices"] if choice["device"] == "cpu"}
    assert chosen["float16"] == "gather"
    assert chosen["float32"] == ("native" if cpu.why_missing() is None else "gather")


def test_every_operation_has_a_backend_and_the_others_a_reason(capsys) -> None:
    facts = json.loads(run(["info", "--json"], capsys))
    found = facts["operations"]["cpu"]
    assert set(found) == set(OPERATIONS)
    assert found["attend_backward"] == {
        "backend": "gather",
        "others": {"native": "it has no kernel for attend_backward"},
    }
    assert found["topk"]["backend"] == ("native" if cpu.why_missing() is None else "reference")
    text = run(["info"], capsys)
    for operation, answer in found.items():
        assert answer["backend"] in text
        for backend, reason in answer["others"].items():
            line = next(line for line in text.splitlines() if line.strip().startswith(f"not {backend}: {reason}"))
            assert operation in line


@pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))
def test_every_level_runs_or_says_why_not(capsys) -> None:
    levels = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
    assert sorted([*cpu.levels(), *cpu.missing_levels()]) == sorted(levels)
    text = run(["info"], capsys)
    for level, reason in cpu.missing_levels().items():
        assert reason
        assert f"not {level}: {reason}" in text
        with pytest.raises(ValueError, match=f'"{level}" is not available here'), cpu.force_level(level):
            pass


def test_a_missing_module_is_explained(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cpu.binding, "_missing", "there is no compiled module")
    text = run(["info"], capsys)
    assert "native kernels: no: there is no compiled module" in text
    assert "auto, cpu, float32: gather: native cannot run here: there is no compiled module" in text
