"""Finds how many bytes a connection keeps under way: the fewest that keep the wire busy. Pure."""

from __future__ import annotations

import statistics

__all__ = ["Pacer"]

# A trial multiplies or divides the limit by _STEP. A higher limit is kept only if it delivers at
# least _FASTER times the bytes per second, a lower one if it delivers at least _SLOWER times.
_STEP = 1.5
_FASTER, _SLOWER = 1.04, 0.98
# A trial alternates rounds with the current limit and rounds with the other one, _ROUNDS of each.
# A round measures _LIMITS_PER_ROUND times the limit, after the first limit's worth of bytes, which
# does not count.
_ROUNDS, _LIMITS_PER_ROUND = 3, 4
# Rounds until the next trial after one that changed nothing: at first, and at most.
_FIRST_REST, _LONGEST_REST = 16, 256


class Pacer:
    """Adjusts the limit for the bytes under way while data flow. Not thread-safe.

    Bytes under way occupy the server's memory, and its other clients wait for them. So the pacer
    raises the limit only if the delivery rate rises with it, and lowers the limit if the rate does
    not fall.

    Args:
        least, most: bounds of the limit, in bytes.
        start: initial limit, in bytes.

    Attributes:
        limit: bytes that may be under way now.
    """

    def __init__(self, least: int, most: int, start: int) -> None:
        self._least, self._most = least, most
        self._base = self._other = min(max(start, least), most)
        self.limit = self._base
        self._rates: tuple[list[float], list[float]] = ([], [])
        # What falls in a row are compared with, lest each takes its share.
        self._before_falls = 0.0
        self._rest, self._next_rest = 1, _FIRST_REST
        self._is_rising = True
        self._bytes, self._since = 0, 0.0

    def interrupt(self) -> None:
        """Record that less than the limit is under way: the rate then says nothing about it."""
        self._bytes = 0

    def deliver(self, size: int, now: float) -> None:
        """Record a delivery that happened while the limit was used in full.

        Args:
            size: delivered bytes.
            now: seconds, by any monotonic clock.
        """
        before = self._bytes
        self._bytes += size
        if before < self.limit <= self._bytes:
            # The bytes under way when the round began are now delivered.
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
            self._end_trial(statistics.median(other), statistics.median(base))
        else:
            self.limit = self._other if len(other) < len(base) else self._base

    def _begin_trial(self) -> None:
        changed = self._base * _STEP if self._is_rising else self._base / _STEP
        self._other = int(min(max(changed, self._least), self._most))
        self._rates = [], []
        if self._other == self._base:
            self._change_nothing()

    def _end_trial(self, other: float, base: float) -> None:
        if self._is_rising:
            is_better, self._before_falls = other >= _FASTER * base, 0.0
        else:
            self._before_falls = max(self._before_falls, base)
            is_better = other >= _SLOWER * self._before_falls
        if is_better:
            self._base, self._next_rest = self._other, _FIRST_REST
            self.limit = self._base
            self._begin_trial()
        else:
            self._change_nothing()

    def _change_nothing(self) -> None:
        """Keep the limit. Try a lower one at once after a failed rise; otherwise rest first."""
        self.limit, self._before_falls = self._base, 0.0
        self._is_rising = not self._is_rising
        if self._is_rising or self._base == self._least:
            self._is_rising = True
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        else:
            self._begin_trial()
