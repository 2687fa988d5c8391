"""The entry point: commands, and every user error as one line on stderr."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from .failures import explain
from .interruption import INTERRUPTED, LINE, Interruption, interruptible, leave

DONE, USER_ERROR, NO_READER = 0, 2, 141


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``sparsifiner`` and exit.

    The exit code is 0 when done, 2 after a user error (one line on stderr), 1 after a defect of the program (a
    traceback), 130 when interrupted, 141 where what reads its output has left (``sparsifiner info | head -1``).

    Args:
        arguments: those of the command line; ``sys.argv`` if None.
    """
    with interruptible() as interruption:
        try:
            code = _main(arguments, interruption)
        except BaseException:
            if not interruption:
                raise
            code = INTERRUPTED
        if interruption and code != DONE:
            code = INTERRUPTED  # other libraries have made something else of it
        if code == INTERRUPTED:
            if arguments is None:
                leave()
            _say(LINE)
    sys.exit(code)


def _main(arguments: Sequence[str] | None, interruption: Interruption) -> int:
    _silence_retries()
    for stream in (sys.stdout, sys.stderr):  # an old terminal shows another letter, and the command goes on
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    before = threading.excepthook
    threading.excepthook = _thread_failed
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(arguments, interruption)
    finally:
        threading.excepthook = before


def _run(arguments: Sequence[str] | None, interruption: Interruption) -> int:
    code: Any = DONE
    try:
        from .app import build_app

        code = build_app()(args=None if arguments is None else list(arguments), standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # or Python does at its end, when nothing can be said any more
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # the parser's own, where what reads the output has left
        return NO_READER if stop.code == 1 else USER_ERROR
    except BrokenPipeError as error:
        if error.filename is not None:
            _say(f"error: {explain(error)}")
            return USER_ERROR
        _discard_output()
        return NO_READER
    except Exception as error:
        name = type(error).__name__
        if interruption or name == "Abort":  # what others make of an interruption, the parser among them
            return INTERRUPTED
        if name == "NoArgsIsHelpError":  # the help has been printed
            return USER_ERROR
        message = explain(error)
        if message is None:
            raise
        if isinstance(error, OSError) and error.filename is None:
            _discard_output()
        _say(f"error: {message}")
        return USER_ERROR
    return code if isinstance(code, int) else DONE


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A writer in the background (TensorBoard's) whose disk is full: the next call of it says so, in one line."""
    if failed.exc_value is None or explain(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _discard_output() -> None:
    """Let nothing more be written where writing has failed; Python would try at its end, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silence_retries() -> None:
    """A download that fails is told in one line, without Hugging Face's own, unless the user has set how much it says.

    The library reads the variable when it is imported.
    """
    if "HF_HUB_VERBOSITY" in os.environ:
        return
    os.environ["HF_HUB_VERBOSITY"] = "error"
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **settings: Any) -> None:
    if issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        return
    _say(f"warning: {' '.join(str(message).split())}")
