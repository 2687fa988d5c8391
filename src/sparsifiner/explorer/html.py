"""Pieces of the page as HTML: the pictures and the table. What a file or a model is called is escaped."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from .figures import cost_note, cost_rows
from .look import Cost, Look
from .panels import query_view

if TYPE_CHECKING:
    import jinja2


def render_viewer(look: Look, patch: tuple[int, int], layer: int, head: int | None) -> str:
    """The pictures of one query patch; arguments as in :func:`~sparsifiner.explorer.panels.query_view`."""
    view = query_view(look, patch, layer, head)
    width, height = look.image.size
    return _template("viewer.html.jinja").render(view=view, width=width, height=height, heads=look.num_heads)


def render_figures(look: Look, cost: Cost, rounds: int) -> str:
    """The table of costs after some of ``rounds`` runs."""
    note = cost_note(look, cost, rounds)
    return _template("figures.html.jinja").render(name=look.name, rows=cost_rows(cost), note=note)


def render_head(title: str) -> str:
    """The heading, with the name of the model."""
    return _template("head.html.jinja").render(title=title)


def read_asset(name: str) -> str:
    """A style sheet or script of the page."""
    return (resources.files("sparsifiner.explorer") / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(read_asset(name))
