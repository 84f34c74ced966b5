"""The attempts that this process is writing, and those that it has put lately.

Its other pending objects can be removed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from weakref import WeakValueDictionary

from ray_valkey_spill.format.names import Entry, NodeName, ObjectName
from ray_valkey_spill.tiers.budget import Budget

__all__ = ["UNDER_WAY", "UnderWay"]

# Seconds for which an object counts as put lately: a failover that loses its settlement has taken
# place, and been noticed, by then. The number of such objects is limited.
_LATELY, _MOST_LATELY = 300.0, 10_000


class UnderWay:
    """Attempts to put objects, and the budgets that pay for them. Thread-safe.

    What is pending on the server is removed if its process is dead, or is this one and the attempt
    is not under way any more. So a failed put that could not clean up has only to end its attempts,
    unless the server may have settled them: then they are in doubt until they are removed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: set[ObjectName] = set()
        # The oldest first, with the times at which they were put.
        self._put: dict[ObjectName, tuple[Entry, float]] = {}
        self._in_doubt: set[ObjectName] = set()
        # By writer. One whose store is gone has ended, and its grant is to be released.
        self._budgets = WeakValueDictionary[str, Budget]()

    def begin(self, names: Iterable[ObjectName]) -> None:
        """Mark attempts as under way, until their `end`."""
        with self._lock:
            self._attempts.update(names)

    def end(self, names: Iterable[ObjectName]) -> None:
        with self._lock:
            self._attempts.difference_update(names)

    def put(self, entries: Iterable[Entry]) -> None:
        """Note objects that were put. Must precede the `end` of their attempts."""
        now = time.monotonic()
        with self._lock:
            self._put.update({entry.name: (entry, now) for entry in entries})
            self._forget_old(now)

    def put_lately(self, node: NodeName) -> dict[ObjectName, Entry]:
        """Return the objects of a node that were put lately."""
        with self._lock:
            self._forget_old(time.monotonic())
            return {
                name: entry
                for name, (entry, _) in self._put.items()
                if (name.session, name.node) == node
            }

    def _forget_old(self, now: float) -> None:
        while self._put:
            name, (_, since) = next(iter(self._put.items()))
            if now - since < _LATELY and len(self._put) <= _MOST_LATELY:
                return
            del self._put[name]

    def __contains__(self, name: ObjectName) -> bool:
        """Whether an attempt is under way."""
        with self._lock:
            return name in self._attempts

    def doubt(self, names: Iterable[ObjectName]) -> None:
        """Note attempts that have failed, and that the server may have settled, or may yet."""
        with self._lock:
            self._in_doubt.update(names)

    def in_doubt(self, node: NodeName) -> list[ObjectName]:
        """The attempts of a node that are in doubt."""
        with self._lock:
            return [name for name in self._in_doubt if (name.session, name.node) == node]

    def removed(self, names: Iterable[ObjectName]) -> None:
        """Note that nothing is left of attempts that were in doubt."""
        with self._lock:
            self._in_doubt.difference_update(names)

    def add(self, writer: str, budget: Budget) -> None:
        """Register a writer's budget. Must precede its first grant."""
        with self._lock:
            self._budgets[writer] = budget

    def has_writer(self, writer: str) -> bool:
        """Whether a writer of this process may still use its grant."""
        with self._lock:
            return writer in self._budgets

    def budgets(self, node: NodeName) -> list[Budget]:
        """Return the budgets of a node's writers in this process."""
        with self._lock:
            return [budget for budget in self._budgets.values() if budget.node == node]


# Shared by the whole process.
UNDER_WAY = UnderWay()
