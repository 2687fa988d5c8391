"""Importing the library stays cheap, and pulls in nothing that only the report needs."""

import subprocess
import sys

TIMED = "import time, timm; start = time.process_time(); import sparsifiner; print(time.process_time() - start)"
LISTED = """
import timm, sys
before = set(sys.modules)
import sparsifiner
print(*(set(sys.modules) - before))
print(*sparsifiner.methods.METHODS)
"""


def test_import_costs_under_200_ms_of_cpu_more_than_timm() -> None:
    def cost() -> float:
        return float(subprocess.check_output([sys.executable, "-c", TIMED]))

    assert any(cost() < 0.2 for _ in range(3))  # a busy machine may need another try


def test_import_leaves_the_reports_libraries_alone_and_has_the_methods() -> None:
    lines = subprocess.check_output([sys.executable, "-c", LISTED], text=True).splitlines()
    loaded, methods = (set(line.split()) for line in lines)
    assert "sparsifiner.convert" in loaded
    assert not loaded & {"matplotlib", "rich", "typer", "jinja2"}
    assert {"sparsifiner", "paper", "evit"} <= methods
