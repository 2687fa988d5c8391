"""A minute of every fuzzer, and every seed that has found something; ``benchmarks/fuzz.py`` has the long form."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import fuzz_commands
import fuzz_files
import fuzz_operator
import fuzz_settings
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

FUZZERS = {"operator": fuzz_operator, "settings": fuzz_settings, "commands": fuzz_commands, "files": fuzz_files}
"""That of surgery has a file of its own."""
SHARES = {"operator": 20, "settings": 60, "commands": 16, "files": 80}
"""Cases of one test, a second or two."""
FOUND = {
    "settings": [1028, 1830, 2242, 5050, 504766],  # bfloat16 attention beside a float32 predictor; a threshold of 2**70
    "commands": [84, 500449],  # a word and a file of thousands of letters told in full
    "files": [
        342,
        2589,
        4725,
        7480,
        9283,
    ],  # torch's long messages; lists as names; negative sizes; counts beyond reason
}
"""Seeds that have found something, with what it was."""


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", FUZZERS)
def test_random_use(name: str, part: int) -> None:
    for seed in range(part * SHARES[name], (part + 1) * SHARES[name]):
        assert FUZZERS[name].run(seed).startswith(f"seed {seed}: ")


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in FOUND.items() for seed in seeds])
def test_what_was_found_stays_mended(name: str, seed: int) -> None:
    FUZZERS[name].run(seed)


def test_fuzzers_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is off, settings that crash, a reader that does: none of them may pass."""
    import torch

    from sparsifiner.ops.registry import _BACKENDS

    gather = _BACKENDS["gather"]
    attend = gather.kernels["attend"]
    with monkeypatch.context() as patch:
        off = {"attend": lambda *arguments: attend(*arguments) * 1.001}
        patch.setitem(vars(gather), "kernels", {**gather.kernels, **off})
        with pytest.raises(AssertionError, match="units off"):
            [fuzz_operator.run(seed) for seed in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_settings, "sparsify", lambda model, config: torch.zeros(0)[3])
        with pytest.raises(AssertionError, match="IndexError"):
            [fuzz_settings.run(seed) for seed in range(20)]
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_files, "READERS", {"flat.json": lambda path: json.loads(path.read_text())["keep_rate"]})
        with pytest.raises(AssertionError, match="Error"):
            [fuzz_files.run(seed) for seed in range(50)]
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_commands, "main", lambda words: sys.exit(1))
        with pytest.raises(AssertionError, match="exit code 1"):
            fuzz_commands.run(0)


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="a source distribution has no benchmarks")
def test_the_long_form_writes_what_it_tried_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_benchmarks import benchmark

    module = benchmark("fuzz")
    wrong = ModuleType("fuzz_wrong")

    def run(seed: int) -> str:
        if seed % 2:
            raise AssertionError(f"seed {seed}: odd")
        return f"seed {seed}: even"

    vars(wrong)["run"] = run
    monkeypatch.setitem(sys.modules, "fuzz_wrong", wrong)
    module.fuzz(["wrong"], 0.2, 6, tmp_path / "found.json")
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["tried"]["wrong"] >= 10
    (entry,) = result["found"]
    assert entry["fuzzer"] == "wrong"
    assert entry["seeds"] == [7, 9, 11, 13, 15]
    assert entry["message"] == "seed 7: odd"
    for name in module.NAMES:
        assert callable(importlib.import_module(f"fuzz_{name}").run)
