"""How long to pause between attempts that fail in a row."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Pauses that double with each failure in a row, so that a server is not asked too often.

    Each is drawn from the upper half of its range: those who failed together do not all come back
    together.

    Args:
        first: seconds, the most that the first pause lasts.
        longest: seconds, the most that any lasts.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = self._pause = first
        self._longest = longest

    def next(self) -> float:
        """Seconds to pause for now."""
        pause = self._pause
        self._pause = min(2 * pause, self._longest)
        return pause * random.uniform(0.5, 1.0)

    def renew(self) -> None:
        """Begin anew: an attempt has succeeded."""
        self._pause = self._first
