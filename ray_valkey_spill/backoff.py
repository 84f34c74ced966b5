"""Pauses between attempts that fail in a row."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Pauses that double with each failure in a row, so that retries do not load the server.

    Each pause is drawn from the upper half of its range, so that clients that failed together do
    not retry together.

    Args:
        first: upper bound of the first pause, in seconds.
        longest: upper bound of every pause, in seconds.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = self._pause = first
        self._longest = longest

    def next(self) -> float:
        """Return the next pause, in seconds, and double the one after it."""
        pause = self._pause
        self._pause = min(2 * pause, self._longest)
        return pause * random.uniform(0.5, 1.0)

    def renew(self) -> None:
        """Start again with the first pause, after an attempt that succeeded."""
        self._pause = self._first
