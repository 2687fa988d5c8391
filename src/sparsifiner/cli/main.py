"""The entry point: commands, and every user error as one line on stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``sparsifiner`` and exit: 0 when done, 2 after a user error, 130 when interrupted.

    Args:
        arguments: those of the command line; ``sys.argv`` if None.
    """
    app = build_app()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        except KeyboardInterrupt:
            _say("interrupted; nothing was written")
            code = 130
        except (ValueError, OSError, RuntimeError) as error:
            _say(f"error: {_one_line(error)}")
            code = USER_ERROR
        except Exception as error:
            if not hasattr(error, "format_message"):  # not a usage error of the command line parser
                if type(error).__name__ == "Abort":
                    _say("interrupted; nothing was written")
                    sys.exit(130)
                raise
            _say(f"error: {_one_line(error)}; see sparsifiner --help")
            code = USER_ERROR
    sys.exit(code if isinstance(code, int) else 0)


def build_app() -> Any:
    """The typer application."""
    import typer

    from .report import report

    app = typer.Typer(
        name="sparsifiner",
        help="Sparse, instance-dependent attention for Vision Transformers.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_version)
    app.command()(report)
    return app


def _version() -> None:
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
