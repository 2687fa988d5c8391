"""What the build of the site needs beyond its plugins: the command line as a page, and roles in docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

COMMANDS = "<!-- commands -->"
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Put the help of every command where a page asks for it."""
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def _commands() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from sparsifiner.cli.main import build_app

    group = typer.main.get_command(build_app())
    with group.make_context("sparsifiner", [], resilient_parsing=True) as context:
        return get_docs_for_click(obj=group, ctx=context, indent=1, name="sparsifiner")


class RolesAsCode(griffe.Extension):
    """Sphinx roles in docstrings, such as ``:func:`record```, as plain code."""

    def on_object(self, *, obj: griffe.Object, **context: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
