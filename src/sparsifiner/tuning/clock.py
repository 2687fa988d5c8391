"""The time that a search may take, and what is known of how long its parts take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds since the search began and until it must end.

    Args:
        max_seconds: in all.
    """

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._start = time.monotonic()
        self._took: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def remaining(self) -> float:
        return self.max_seconds - self.elapsed

    def share_left(self, share: float) -> float:
        """Seconds until ``share`` of all time has passed."""
        return share * self.max_seconds - self.elapsed

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Remember how long the block takes as what the next of its ``kind`` will."""
        start = time.monotonic()
        yield
        self.note(kind, time.monotonic() - start)

    def note(self, kind: str, seconds: float) -> None:
        """Remember that something of a ``kind`` took so long; the longest counts."""
        self._took[kind] = max(seconds, self._took.get(kind, 0.0))

    def estimate(self, kind: str, otherwise: float) -> float:
        """Seconds that the next of its ``kind`` is expected to take; ``otherwise`` if there was none yet."""
        return self._took.get(kind, otherwise)

    def allows(self, kind: str, otherwise: float, *, reserve: float = 0.0) -> bool:
        """True if there is time for one more of its ``kind``, with ``reserve`` seconds left after it."""
        return self.estimate(kind, otherwise) + reserve <= self.remaining
