"""How many bytes a connection keeps under way: the fewest that keep the wire busy. Pure."""

from __future__ import annotations

import statistics

__all__ = ["Pacer"]

# How the limit changes in a trial, and what it is tried for. More is kept only where bytes are
# delivered faster by that much, and less unless they are delivered slower by this much.
_STEP = 1.5
_FASTER, _SLOWER = 1.04, 0.98
# Rounds with the limit and as many with the other one, in turn, make a trial; in each round so many
# times the limit is delivered, after as much as the limit was that is not counted.
_ROUNDS, _LIMITS_PER_ROUND = 3, 4
# Rounds between trials that change nothing: at first, and at most.
_FIRST_REST, _LONGEST_REST = 16, 256


class Pacer:
    """Finds, while data flow, the limit for the bytes under way. Not thread-safe.

    Bytes under way lie in the server's memory, and whoever else uses the server waits for them. So
    a limit is only raised where the rate of delivery rises with it, and lowered where it does not
    fall.

    Args:
        least, most: bytes, the bounds of the limit.
        start: bytes, the limit at first.

    Attributes:
        limit: bytes that may be under way now.
    """

    def __init__(self, least: int, most: int, start: int) -> None:
        self._least, self._most = least, most
        self._base = self._other = min(max(start, least), most)
        self.limit = self._base
        self._rates: tuple[list[float], list[float]] = ([], [])
        self._rest, self._next_rest = 1, _FIRST_REST
        self._is_rising = True
        self._bytes, self._since = 0, 0.0

    def interrupt(self) -> None:
        """Note that less than the limit is under way, so that the rate says nothing about it."""
        self._bytes = 0

    def deliver(self, size: int, now: float) -> None:
        """Note that `size` bytes were delivered while as many as allowed were under way.

        Args:
            size: bytes.
            now: seconds, by any clock that runs evenly.
        """
        before = self._bytes
        self._bytes += size
        if before < self.limit <= self._bytes:
            # What was under way when the round began is delivered.
            self._since, self._bytes = now, self.limit
        elif self._bytes >= (1 + _LIMITS_PER_ROUND) * self.limit:
            rate = (self._bytes - self.limit) / max(now - self._since, 1e-9)
            self._bytes = 0
            self._end_round(rate)

    def _end_round(self, rate: float) -> None:
        if self._rest:
            self._rest -= 1
            if not self._rest:
                self._begin_trial()
            return
        base, other = self._rates
        (base if self.limit == self._base else other).append(rate)
        if len(other) == len(base) == _ROUNDS:
            self._end_trial(statistics.median(other) / statistics.median(base))
        else:
            self.limit = self._other if len(other) < len(base) else self._base

    def _begin_trial(self) -> None:
        changed = self._base * _STEP if self._is_rising else self._base / _STEP
        self._other = int(min(max(changed, self._least), self._most))
        self._rates = [], []
        if self._other == self._base:
            self._change_nothing()

    def _end_trial(self, gain: float) -> None:
        if gain >= (_FASTER if self._is_rising else _SLOWER):
            self._base, self._next_rest = self._other, _FIRST_REST
            self.limit = self._base
            self._begin_trial()
        else:
            self._change_nothing()

    def _change_nothing(self) -> None:
        """Try the other direction, at once after a rise, else after a rest."""
        self.limit = self._base
        self._is_rising = not self._is_rising
        if self._is_rising or self._base == self._least:
            self._is_rising = True
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        else:
            self._begin_trial()
