"""The benchmarks that measure fidelity, at a size at which a sparse model would run dense by itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import sparsifiner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PHOTOS = Path(sparsifiner.__file__).parent / "data" / "photos"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")
@pytest.mark.parametrize(("name", "where"), [("fidelity", ("mean",)), ("calibration", ("after", "mean"))])
def test_sparse_is_compared_with_dense_and_written_whole(
    name: str, where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setting = next(setting for setting in module.SETTINGS if setting.endswith(", keep 0.1"))
    arguments = [str(PHOTOS), str(tmp_path / "out.json"), "--size", "56", "--only", setting]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(Path, "write_text", None)  # would leave half a file when interrupted
    module.main()
    result = json.loads((tmp_path / "out.json").read_text())[setting]
    for key in where:
        result = result[key]
    assert result["patch_l2"] > 0.01
