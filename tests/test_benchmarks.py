"""The benchmarks that measure fidelity, at a size at which a sparse model would run dense by itself; and the grid."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import sparsifiner
import sparsifiner.evaluation

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PHOTOS = Path(sparsifiner.__file__).parent / "data" / "photos"


pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")


def benchmark(name: str) -> Any:
    """The script of that name as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "where"), [("fidelity", ("mean",)), ("calibration", ("after", "mean"))])
def test_sparse_is_compared_with_dense_and_written_whole(
    name: str, where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark(name)
    setting = next(setting for setting in module.SETTINGS if setting.endswith(", keep 0.1"))
    arguments = [str(PHOTOS), str(tmp_path / "out.json"), "--size", "56", "--only", setting]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(Path, "write_text", None)  # would leave half a file when interrupted
    module.main()
    result = json.loads((tmp_path / "out.json").read_text())[setting]
    for key in where:
        result = result[key]
    assert result["patch_l2"] > 0.01


def test_parts_of_a_grid_become_one_sweep_that_goes_on(sweep, tmp_path: Path) -> None:
    grid = benchmark("cifar10")
    names = [name for name, *_ in grid.grid()]
    assert len(set(names)) == len(names)
    parts, whole = tmp_path / "parts", sweep(methods=("sparsifiner", "evit"), keep_rates=(0.25, 0.5))
    sparsifiner.evaluation.run_sweep(dataclasses.replace(whole, methods=("dense",)), parts / "dense-1-training-free")
    for method in whole.methods:
        part = dataclasses.replace(whole, methods=(method,))
        lines = grid.measure(part, parts / method, parts / "dense-1-training-free")
        assert [line.partition(":")[0] for line in lines] == [f"{method}-{rate}-training-free" for rate in (0.25, 0.5)]
        rows = grid.put_together(parts, tmp_path)
    assert next(cell.name for cell in rows) == "dense-1-training-free"
    assert len(rows) == 5
    written, said = (tmp_path / "pareto.json").read_text(), []
    sparsifiner.evaluation.run_sweep(whole, tmp_path, say=said.append)
    assert not said
    assert (tmp_path / "pareto.json").read_text() == written
