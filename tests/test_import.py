"""Importing the library stays cheap, and pulls in nothing that only the report needs."""

import subprocess
import sys

TIMED = "import sys, time, timm; start = time.process_time(); import sparsifiner; print(time.process_time() - start)"
LISTED = "import timm, sys; before = set(sys.modules); import sparsifiner; print(*(set(sys.modules) - before))"


def test_import_costs_under_200_ms_of_cpu_more_than_timm() -> None:
    times = [float(subprocess.check_output([sys.executable, "-c", TIMED])) for _ in range(3)]
    assert min(times) < 0.2


def test_the_methods_are_there() -> None:
    found = subprocess.check_output(
        [sys.executable, "-c", "import sparsifiner; print(*sparsifiner.methods.METHODS)"], text=True
    )
    assert {"sparsifiner", "paper", "evit"} <= set(found.split())


def test_import_leaves_the_reports_libraries_alone() -> None:
    loaded = set(subprocess.check_output([sys.executable, "-c", LISTED], text=True).split())
    assert "sparsifiner.convert" in loaded
    assert not loaded & {"matplotlib", "rich", "typer", "jinja2"}
