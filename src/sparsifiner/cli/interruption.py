"""Ctrl-C at any moment of a command: one line and exit code 130, however deep in other libraries it comes."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED = 130
LINE = "interrupted; no half-written file was left"
PATIENCE = 2.0
"""Seconds in which further interruptions are taken for the same one: files are being cleared away."""

_IMPORTING = "importlib._bootstrap"
_FILES = os.path.join("sparsifiner", "_utils", "files.py")


class Interruption:
    """Handler of SIGINT; true once the signal has come, whatever has become of the exception."""

    def __init__(self) -> None:
        self.came: float | None = None
        self.ignored_before = sys.unraisablehook

    def __bool__(self) -> bool:
        return self.came is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Leave at once while modules are imported, and raise ``KeyboardInterrupt`` else.

        Nothing is written during imports, and an exception there is lost or changed where C++ initialises a module.
        """
        now = time.monotonic()
        if self.came is not None and now - self.came < PATIENCE:
            return
        self.came = now
        if _imports(frame):
            leave()
        raise KeyboardInterrupt

    def ignored(self, what: Any) -> None:
        """Told of an exception that cannot be raised where it came (in ``__del__``): an interruption comes again."""
        if self.came is not None and issubclass(what.exc_type, KeyboardInterrupt):
            self.came = None
            again = threading.Timer(0.05, _thread.interrupt_main)  # not from here, where it would be lost, too
            again.daemon = True
            again.start()
        else:
            self.ignored_before(what)


def leave() -> None:
    """Say so and end the process, without what else Python does at its end, which could be interrupted again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    try:
        os.write(
            2, (f"\r\x1b[?25h{LINE}\n" if os.isatty(2) else f"{LINE}\n").encode()
        )  # a progress bar hides the cursor
    finally:
        os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Handle SIGINT while the block runs, unless the program around it has a handler of its own, or ignores it."""
    state = Interruption()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield state
        return
    signal.signal(signal.SIGINT, state.handle)
    sys.unraisablehook = state.ignored
    try:
        yield state
    finally:
        sys.unraisablehook = state.ignored_before
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports(frame: FrameType | None) -> bool:
    """A module is being imported, and no file is being written, in the frames of the main thread."""
    importing = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(_FILES):
            return False
        importing = importing or _IMPORTING in file
        frame = frame.f_back
    return importing
