"""``sparsifiner info`` says what runs here and why the rest does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from huggingface_hub.utils import logging

from sparsifiner._utils import native_module
from sparsifiner.cli import main
from sparsifiner.cli.info import _refusals, machine_lines
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
    lines = run(["info"], capsys).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    for operation, answer in found.items():
        assert table[operation] == list(facts["served"]["cpu"][operation].values())
        assert table[operation][0] == answer["backend"]
        for backend, reason in answer["others"].items():
            (line,) = (line for line in lines if line.split()[:1] == [backend])
            assert reason in line or f"no kernel for {operation}" in reason
    assert max(map(len, lines)) <= 160


def test_refusals_are_told_in_few_words() -> None:
    answers = {
        dtype: {
            name: {"backend": "a", "others": {"b": f"it has no kernel for {name}" if name == "z" else "it is slow"}}
            for name in ("x", "y", "z")
        }
        for dtype in ("float32", "float16")
    }
    answers["float16"]["z"]["others"] = {"c": "it is broken", "b": "it is slow"}
    assert _refusals(answers) == {
        "b": {"anything": "it is slow", "float32 (z)": "no kernel"},
        "c": {"float16 (z)": "it is broken"},
    }


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
    monkeypatch.setattr(native_module, "missing", "there is no compiled module")
    text = run(["info"], capsys)
    assert "CPU kernels: none: there is no compiled module" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  native "))
    assert "there is no compiled module" in line
    facts = json.loads(run(["info", "--json"], capsys))
    choice = facts["choices"][0]
    assert (choice["device"], choice["dtype"], choice["backend"]) == ("cpu", "float32", "gather")
    assert choice["reason"].startswith("native cannot run here: there is no compiled module")


def test_what_needs_no_torch_is_said_before_it_is_imported() -> None:
    """Versions, processor and kernels: within 2 s on any machine, and at once on most."""
    script = "import sys\nfrom sparsifiner.cli.info import machine_lines\n"
    script += "print(*machine_lines(), 'torch' in sys.modules, sep='\\n')"
    *lines, loaded = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert loaded == "False"
    assert lines == machine_lines()
    if cpu.why_missing() is None:
        assert lines[2].startswith(f"CPU kernels: {cpu.level()}")
    with subprocess.Popen([sys.executable, "-X", "importtime", "-m", "sparsifiner", "info"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
    told = next(number for number, line in enumerate(said) if line.startswith("CPU kernels: "))
    torch_line = next(number for number, line in enumerate(said) if line.endswith("| torch"))
    assert told < torch_line
