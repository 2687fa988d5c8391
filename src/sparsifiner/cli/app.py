"""The typer application: the commands, one module each."""

from __future__ import annotations

from typing import Annotated

import typer

from .benchmark import benchmark
from .calibrate import calibrate
from .explore import explore
from .export import export
from .extract import extract
from .info import info
from .pareto import pareto
from .report import report
from .train import train
from .tune import tune
from .validate import validate


def build_app() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="sparsifiner",
        help="Sparse, instance-dependent attention for Vision Transformers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    commands = (report, benchmark, calibrate, explore, export, extract, info, pareto, train, tune, validate)
    for command in commands:
        app.command()(command)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"sparsifiner {__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse, instance-dependent attention for Vision Transformers."""
