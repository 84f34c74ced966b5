"""What becomes of this process's attempts to put objects."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from weakref import WeakValueDictionary

from ray_valkey_spill.format.names import Entry, NodeName, ObjectName
from ray_valkey_spill.tiers.budget import Budget

__all__ = ["UNDER_WAY", "UnderWay"]

# Objects whose settlement may have to be repeated; of older ones it is found out whether they were
# put: see `UnderWay.has_forgotten`.
_MOST_PUT = 10_000
# Seconds within which a failover takes place that can lose a settlement.
_SETTLED_FOR_GOOD = 60.0
# Failed attempts to remember before `has_left_much`; Ray spills up to 2,000 objects at once.
_MOST_FAILED = 20_000


class UnderWay:
    """Attempts to put objects, and the budgets that pay for them. Thread-safe.

    An attempt ends in one of three ways. It is put: its settlement can still be lost in a failover,
    which makes it pending again. Or it has failed, and nothing is left of it. Or it has failed, and
    what is left is to be removed: if it is pending, and also if not where the server may have
    settled it, or has lost that it was pending. Then it is in doubt.
    """

    def __init__(self) -> None:
        self._began = time.time()
        self._lock = threading.Lock()
        self._attempts: set[ObjectName] = set()
        # The oldest first, with the times at which they were put.
        self._put = OrderedDict[ObjectName, tuple[Entry, float]]()
        self._failed: set[ObjectName] = set()
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

    def __contains__(self, name: ObjectName) -> bool:
        """Whether an attempt is under way."""
        with self._lock:
            return name in self._attempts

    def has_left(self, name: ObjectName) -> bool:
        """Whether a pending object of this process id is left by its writer.

        It is unless its attempt is under way, or was put lately.
        """
        with self._lock:
            return name not in self._attempts and name not in self._put

    def has_forgotten(self, name: ObjectName) -> bool:
        """Whether a pending object of this process id was put, as far as is still known here.

        If so, the server has lost that it was settled long ago: it was started from a snapshot.
        """
        with self._lock:
            known = self._attempts, self._put, self._failed, self._in_doubt
            return name.time >= self._began and not any(name in each for each in known)

    # --- what was put ---

    def put(self, entries: Iterable[Entry]) -> None:
        """Note objects that were put. Must precede the `end` of their attempts."""
        now = time.monotonic()
        with self._lock:
            for entry in entries:
                self._put[entry.name] = entry, now
            while len(self._put) > _MOST_PUT:
                self._put.popitem(last=False)

    def put_lately(self, node: NodeName) -> dict[ObjectName, Entry]:
        """Return the objects of a node that may have to be settled again."""
        with self._lock:
            return {
                name: entry
                for name, (entry, _) in self._put.items()
                if (name.session, name.node) == node
            }

    def are_settled(self, names: Iterable[ObjectName], now: float) -> None:
        """Note objects that were put and not pending at a time, by `time.monotonic()`."""
        with self._lock:
            for name in names:
                _, since = self._put.get(name, (None, now))
                if now - since > _SETTLED_FOR_GOOD:
                    del self._put[name]

    # --- what has failed ---

    def fail(self, names: Iterable[ObjectName]) -> None:
        """Note attempts that have failed and may have left something.

        Must precede their `end`.
        """
        with self._lock:
            self._failed.update(names)

    def doubt(self, names: Iterable[ObjectName]) -> None:
        """Note failed attempts of which something may be left that is not pending."""
        with self._lock:
            self._in_doubt.update(names)

    def left(self, node: NodeName) -> tuple[list[ObjectName], list[ObjectName]]:
        """Return a node's failed attempts that may have left something, and those in doubt."""
        with self._lock:
            failed, in_doubt = (
                [name for name in names if (name.session, name.node) == node]
                for names in (self._failed, self._in_doubt)
            )
        return failed, in_doubt

    def removed(self, failed: Iterable[ObjectName], in_doubt: Iterable[ObjectName]) -> None:
        """Note that nothing is left of what `left` has returned."""
        with self._lock:
            self._failed.difference_update(failed)
            self._in_doubt.difference_update(in_doubt)

    @property
    def has_left_much(self) -> bool:
        """Whether so many have failed that some must be cleaned up before more are made."""
        with self._lock:
            return max(len(self._failed), len(self._in_doubt)) >= _MOST_FAILED

    # --- budgets ---

    def add(self, writer: str, budget: Budget) -> None:
        """Register a writer's budget. Must precede its first grant."""
        with self._lock:
            self._budgets[writer] = budget

    def budget(self, writer: str) -> Budget | None:
        """Return the budget of a writer of this process; None if its store is gone."""
        with self._lock:
            return self._budgets.get(writer)

    def budgets(self, node: NodeName) -> list[Budget]:
        """Return the budgets of a node's writers in this process."""
        with self._lock:
            return [budget for budget in self._budgets.values() if budget.node == node]


# Shared by the whole process.
UNDER_WAY = UnderWay()
