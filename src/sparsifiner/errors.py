"""Errors that users can mend."""

from __future__ import annotations


class SparsifinerError(ValueError):
    """A setting, file or input that cannot be served; the message says in one line what was expected and what to do.

    The command line prints it and exits with 2. Anything else that escapes is a bug, and shows its traceback.
    """
