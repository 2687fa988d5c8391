"""What the build of the site needs beyond its plugins: the command line, other files, and roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
COMMANDS = "<!-- commands -->"
# A comment, so that a page read in the repository shows nothing where the site shows another file.
INCLUDE = re.compile(r"^<!-- include (\S+)(?: (\w+))? -->$", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Put the help of every command, or another file, where a page asks for it."""
    markdown = INCLUDE.sub(_file, markdown)
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def _file(include: re.Match[str]) -> str:
    """The file that a page includes; of a section, what stands between its two marks; YAML as a block of code."""
    name, section = include.groups()
    text = (ROOT / name).read_text()
    if section:
        text = text.split(f"<!-- start {section} -->")[1].split(f"<!-- end {section} -->")[0]
    return f"```yaml\n{text}```" if name.endswith(".yaml") else text


def _commands() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from sparsifiner.cli.app import build_app

    group = typer.main.get_command(build_app())
    with group.make_context("sparsifiner", [], resilient_parsing=True) as context:
        return get_docs_for_click(obj=group, ctx=context, indent=1, name="sparsifiner")


class RolesAsCode(griffe.Extension):
    """Sphinx roles in docstrings, such as ``:func:`record```, as plain code."""

    def on_object(self, *, obj: griffe.Object, **context: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
