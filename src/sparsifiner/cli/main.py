"""The entry point: commands, and every user error as one line on stderr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``sparsifiner`` and exit: 0 when done, 2 after a user error, 130 when interrupted.

    Args:
        arguments: those of the command line; ``sys.argv`` if None.
    """
    _silence_retries()
    app = build_app()
    code: Any
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _explain(error)
            if code is None:
                raise
    if code == INTERRUPTED:  # the parser turns the exception into the code
        _say("interrupted; no half-written file was left")
    sys.exit(code if isinstance(code, int) else 0)


def _silence_retries() -> None:
    """A download that fails is told in one line, without Hugging Face's own, unless the user has set how much it says.

    The library read the variable when timm imported it; processes started from here will.
    """
    if "HF_HUB_VERBOSITY" in os.environ:
        return
    from huggingface_hub.utils import logging

    os.environ["HF_HUB_VERBOSITY"] = "error"
    logging.set_verbosity_error()


def _explain(error: Exception) -> int | None:
    """Say what a user has to know about ``error``; the exit code, or None where it is a defect of ours."""
    name = type(error).__name__
    if name == "Abort":
        return INTERRUPTED
    if name == "NoArgsIsHelpError":  # the help has been printed
        return USER_ERROR
    if hasattr(error, "format_message"):  # a usage error of the command line parser
        _say(f"error: {_one_line(error)}; see sparsifiner --help")
        return USER_ERROR
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        _say("error: out of memory; use a smaller --img-size, a smaller model, or --dtype bfloat16")
        return USER_ERROR
    if isinstance(error, (ValueError, OSError)):
        _say(f"error: {_one_line(error)}")
        return USER_ERROR
    return None


def build_app() -> Any:
    """The typer application."""
    from .benchmark import benchmark
    from .calibrate import calibrate
    from .info import info
    from .pareto import pareto
    from .report import report
    from .train import train
    from .validate import validate

    app = typer.Typer(
        name="sparsifiner",
        help="Sparse, instance-dependent attention for Vision Transformers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    app.command()(report)
    app.command()(benchmark)
    app.command()(calibrate)
    app.command()(info)
    app.command()(pareto)
    app.command()(train)
    app.command()(validate)
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


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(message.split()).rstrip(".") or type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **settings: Any) -> None:
    if issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        return
    _say(f"warning: {' '.join(str(message).split())}")
