"""Time for tests of what waits for long."""

from __future__ import annotations

from collections.abc import Callable

FOREVER = 10_000.0


class Clock:
    """Stands in for `time`: sleeping takes no time, and is when everything else happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self._plans: list[tuple[float, Callable[[], object]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < FOREVER
        due = [plan for plan in self._plans if plan[0] <= self.now]
        self._plans = [plan for plan in self._plans if plan[0] > self.now]
        for _, action in due:
            action()

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        self._plans.append((seconds, action))

    def every(self, seconds: float, action: Callable[[], object], until: float = FOREVER) -> None:
        for i in range(1, int(until / seconds) + 1):
            self.at(i * seconds, action)
