"""What a command says of an error: a line where users can mend it, a traceback where they cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SparsifinerError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGE = str(Path(__file__).parents[1])


def explain(error: BaseException) -> str | None:
    """What a user has to know about ``error``, in one line; None where it is a defect of the program.

    That is what :class:`SparsifinerError` says, a usage error of the parser, files that the user named and that cannot
    be read or written, and memory that does not suffice.
    """
    if hasattr(error, "format_message"):  # of the command line parser
        return f"{_folded(error.format_message())}; see sparsifiner --help"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or _allocation_failed(error):
        return "out of memory; use a smaller --img-size, a smaller model, or --dtype bfloat16"
    if isinstance(error, SparsifinerError):
        return _folded(str(error)) or type(error).__name__
    reason = explain_file(error) if isinstance(error, OSError) else None
    return None if reason is None else _folded(reason)


def explain_file(error: OSError) -> str | None:
    """The same for files; None where it is none that the user named or printed to."""
    if error.errno is None or str(error.filename or "").startswith(_PACKAGE):
        return None
    reason = error.strerror or os.strerror(error.errno)
    if error.errno in _NO_ROOM:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"cannot write {where}{reason}; make room there, or name another place"
    return None if error.filename is None else f"{error.filename}: {reason}"


@contextmanager
def resumable(say: Callable[[str], object], how: Callable[[], str]) -> Iterator[None]:
    """Long work that goes on where it stopped: an interruption, and a file that cannot be written, say so.

    Args:
        say: prints a line.
        how: what is kept and how to go on, at the time it stopped; empty if nothing is.
    """
    try:
        yield
    except KeyboardInterrupt:
        if kept := how():
            say(kept)
        raise
    except OSError as error:
        kept, reason = how(), explain_file(error)
        if reason is None or not kept:
            raise
        raise SparsifinerError(f"{reason}; {kept}") from error


def _allocation_failed(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _folded(text: str, most: int = 1000) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= most else f"{text[: most - 3]}..."
