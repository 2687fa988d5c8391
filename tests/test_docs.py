"""What README and site print: Python runs and prints what stands below it, commands exist with their options."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import typer

from sparsifiner.attention.adapters import registry as adapters
from sparsifiner.cli.app import build_app
from sparsifiner.models.builtin import BUILTIN
from sparsifiner.ops import backends
from sparsifiner.predictors import registry as predictors

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/quickstart.md",
    "docs/howto/add-a-backend.md",
    "docs/howto/add-a-model.md",
    "docs/howto/add-a-predictor.md",
    "docs/howto/convert.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(?:# +)?(?:accelerate launch .*?-m )?sparsifiner ((?:[^\n\\]|\\\n(?:# +)?)+)", re.MULTILINE)


@pytest.fixture
def without_downloads(tmp_path, monkeypatch):
    """An empty working directory, and the built-in model, which has its shape, in the place of DINOv2's weights."""
    create_model = timm.create_model

    def create(name: str, **settings):
        return create_model(BUILTIN if name == "vit_small_patch14_dinov2" else name, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def registries(monkeypatch):
    """What a page registers is gone afterwards."""
    for module, name in ((adapters, "_ADAPTERS"), (predictors, "_PREDICTORS"), (predictors, "_CONFIGS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    before = backends()
    yield
    assert backends() == before


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("without_downloads", "registries", "one_thread")
def test_python_runs_and_prints_what_the_page_says(page, capsys):
    text = (ROOT / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    names: dict[str, object] = {}
    for block in blocks:
        code, printed = block.groups()
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + code, ROOT / page, "exec"), names)
        shown = capsys.readouterr().out
        assert printed is None or shown == printed, f"{page}, line {line}"


def commands() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages += sorted((ROOT / "src" / "sparsifiner" / "data" / "recipes").glob("*.yaml"))
    found = []
    for page in pages:
        text = page.read_text()
        if page.suffix == ".md":
            text = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
        for match in COMMAND.finditer(text):
            found.append((page.name, re.sub(r"\\\n(# +)?", " ", match[1]).strip()))
    return found


@pytest.mark.parametrize(("page", "command"), [pytest.param(*found, id=found[0]) for found in commands()])
def test_commands_exist_with_their_options(page, command):
    group = typer.main.get_command(build_app())
    name, *arguments = shlex.split(command, comments=True)
    if name.startswith("--"):
        assert name in [option for parameter in group.params for option in parameter.opts]
        return
    with group.make_context("sparsifiner", [name]) as context:
        group.get_command(context, name).make_context(name, arguments, parent=context)


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
