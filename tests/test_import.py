"""Importing the library stays cheap, and pulls in nothing that only the report needs."""

import subprocess
import sys


SCRIPT = "import sys, time, timm; start = time.perf_counter(); import sparsifiner; print(time.perf_counter() - start)"


def test_import_takes_under_200_ms_more_than_timm() -> None:
    times = [float(subprocess.check_output([sys.executable, "-c", SCRIPT])) for _ in range(3)]
    assert min(times) < 0.2


def test_import_leaves_the_reports_libraries_alone() -> None:
    heavy = {"matplotlib", "rich", "typer", "jinja2"}
    code = f"import timm, sys; before = set(sys.modules); import sparsifiner; print(*({heavy} & set(sys.modules) - before))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
