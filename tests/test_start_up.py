"""What starting costs: help and usage errors import neither torch nor timm, the library imports its parts when used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparsifiner

SLOW = (
    "torch",
    "timm",
    "torchvision",
    "numpy",
    "matplotlib",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "jinja2",
    "gradio",
)
COMMANDS = (
    "report", "benchmark", "calibrate", "explore", "export", "extract", "info", "pareto", "train", "tune", "validate",
)  # fmt: skip

RUN = """
import json, os, sys, tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from sparsifiner.cli import main
os.chdir(tempfile.mkdtemp())
open("file", "w").close()
open("bad.yaml", "w").write("a: [")
found = []
for arguments in json.loads(sys.argv[1]):
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(arguments)
    except SystemExit as stop:
        code = stop.code
    slow = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    found.append([code, slow, said.getvalue()])
print(json.dumps(found))
"""


def run(calls: list[list[str]]) -> list[tuple[list[str], int, list[str], str]]:
    """Each call's exit code, which slow packages the process has imported by then, and what it said."""
    printed = subprocess.check_output([sys.executable, "-c", RUN, json.dumps(calls), json.dumps(SLOW)], text=True)
    return [(call, *result) for call, result in zip(calls, json.loads(printed), strict=True)]


def test_help_imports_nothing_slow():
    calls = [["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)]
    for call, code, slow, said in run(calls):
        assert slow == [], call
        assert code == (0 if call else 2)
        assert "Usage: " in said or said.startswith("sparsifiner ")
        assert "Traceback" not in said


def test_usage_errors_import_nothing_slow_and_are_one_line():
    keep, size, model = ["--keep-rate", "0"], ["--img-size", "12y"], ["--model", "builtin"]
    calls = [
        ["repport"],
        ["--nonsense"],
        ["report", "--nonsense"],
        ["report", "extra"],
        ["report", *keep],
        ["report", "--keep-rate", "0.1,nan"],
        ["report", "--keep-rate", "0.1,,0.2"],
        ["report", *size],
        ["report", "--img-size", "9" * 5000],
        ["report", "--num-images", "0"],
        ["report", "--num-images", "many"],
        ["report", "--dtype", "int8"],
        ["report", "--device", "tpu"],
        ["report", "--device", "cuda:x"],
        ["report", "--config", "missing.yaml"],
        ["report", "--config", "bad.yaml"],
        ["report", "--config", "."],
        ["report", "--images", "missing"],
        ["report", "--images", "file"],
        ["report", "--output", "file/below"],
        ["benchmark", *keep],
        ["benchmark", *size],
        ["benchmark", "--tokens", "x"],
        ["benchmark", "--dtype", "float33"],
        ["benchmark", "--config", "missing.yaml"],
        ["calibrate"],
        ["calibrate", "--images", "missing", "--output", "out"],
        ["calibrate", "--images", ".", "--output", "file"],
        ["calibrate", "--images", ".", "--output", "out", "--val-images", "missing"],
        ["calibrate", "--images", ".", "--output", "out", "--img-size", "32,64"],
        ["calibrate", "--images", ".", "--output", "out", "--seed", "-1"],
        ["explore", *size],
        ["explore", "--img-size", "32,64"],
        ["explore", "--images", "missing"],
        ["explore", "--images", "file"],
        ["explore", "--config", "bad.yaml"],
        ["explore", "--port", "0"],
        ["explore", "--port", "70000"],
        ["pareto"],
        ["pareto", *model, *keep],
        ["pareto", *model, "a=b"],
        ["pareto", *model, "--recipe", "missing.yaml"],
        ["train"],
        ["train", "--recipe", "missing.yaml"],
        ["train", "--recipe", "cifar10_teachr"],
        ["train", "--recipe", "bad.yaml"],
        ["validate"],
        ["validate", *model, *keep],
        ["validate", *model, "--output", "."],
        ["validate", *model, "--output", "file/below"],
        ["validate", *model, "--config", "missing.yaml"],
        ["info", "--jsn"],
    ]
    for call, code, slow, said in run(calls):
        assert code == 2, (call, said)
        assert slow == [], (call, said)
        assert said.startswith("error: "), (call, said)
        assert said.count("\n") == 1, (call, said)


def cpu_seconds(*arguments: str) -> float:
    """Processor time of a Python process of these arguments; a busy machine does not count."""
    script = "import resource, subprocess, sys\n"
    script += "subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
    script += "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    return float(subprocess.check_output([sys.executable, "-c", script, *arguments]))


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["report", "--keep-rate", "2"]])
def test_help_and_usage_errors_are_fast(arguments):
    """0.2 s where this was written."""
    assert min(cpu_seconds("-m", "sparsifiner", *arguments) for _ in range(3)) < 1.0


def test_info_costs_little_more_than_torch():
    script = "import sys; from sparsifiner.cli import main\ntry: main(['info'])\nexcept SystemExit: pass\n"
    loaded = subprocess.check_output([sys.executable, "-c", script + "print(*sys.modules)"], text=True).split()
    assert "torch" in loaded
    assert not {"timm", "torchvision", "matplotlib", "huggingface_hub", "PIL", "torch._dynamo"} & set(loaded)
    ratios = (cpu_seconds("-m", "sparsifiner", "info") / cpu_seconds("-c", "import torch") for _ in range(3))
    assert any(ratio < 1.5 for ratio in ratios)


def test_import_alone_imports_neither_torch_nor_timm():
    script = "import sys, sparsifiner; dir(sparsifiner); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert not set(SLOW) & set(loaded)


def test_type_checkers_and_the_table_agree():
    tree = ast.parse(Path(sparsifiner.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            declared[name.name] = node.module
    assert sorted(declared) == sparsifiner.__all__
    assert {name: home for name, home in declared.items() if home} == sparsifiner._HOMES


def test_every_public_name_is_there():
    script = (
        "from sparsifiner import *; import sparsifiner; print(*(n for n in sparsifiner.__all__ if n not in globals()))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == []
    assert set(sparsifiner.__all__) <= set(dir(sparsifiner))
    for name in sparsifiner.__all__:
        assert getattr(sparsifiner, name) is getattr(sparsifiner, name)
    with pytest.raises(AttributeError, match="module 'sparsifiner' has no attribute 'sparsfy'"):
        sparsifiner.sparsfy  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'sparsifiner.models' has no attribute 'load'"):
        sparsifiner.models.load  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsifiner, timm",
        "import timm, sparsifiner",
        "import sparsifiner; from timm.models import create_model; import timm",
        "import sparsifiner.models.lvvit; import timm",
        "import sparsifiner.models; import timm",
        "import sparsifiner.saving; import timm",
        "import sparsifiner.attention.layer; import timm",
        "import sparsifiner, threading; t = [threading.Thread(target=__import__, args=['timm']) for _ in range(4)]; "
        "[x.start() for x in t]; [x.join() for x in t]; import timm",
    ],
)
def test_the_models_are_timms_whatever_is_imported_first(imports):
    script = f"{imports}; print(timm.is_model('lvvit_s'), timm.is_model('vit_small_patch14_saliency'))"
    script += (
        "; import importlib.resources, sys; print(importlib.resources.files('timm').joinpath('version.py').is_file())"
    )
    script += "; ours = [f for f in sys.meta_path if type(f).__module__.startswith('sparsifiner')]"
    script += "; print([f for f in ours if f.package in ('timm', 'torch')])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "True True\nTrue\n[]\n"


@pytest.mark.parametrize(
    "imports", ["import sparsifiner, torch", "import torch, sparsifiner", "import sparsifiner.ops, torch"]
)
def test_torch_knows_the_operations_whatever_is_imported_first(imports):
    """``torch.export.load`` needs them, and a program that runs an exported model calls nothing of the library."""
    script = f"{imports}; print(len(dir(torch.ops.sparsifiner)) > 3)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "True\n"


def test_a_package_that_is_missing_is_missing_still():
    script = "from sparsifiner._utils.on_import import import_after\nimport_after('no_such_package', 'x')\n"
    script += "try: import no_such_package\nexcept ModuleNotFoundError as error: print(error)"
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert printed == "No module named 'no_such_package'\n"
