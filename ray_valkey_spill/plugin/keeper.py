"""The background work of an IO worker, and of its node.

A node has up to eight IO workers. The one that holds the lock file keeps the node: it renews the
lease, cleans up after killed IO workers, and measures. Each IO worker does for itself only what no
other can do.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ray_valkey_spill.errors import OverflowUnavailableError, SpillError
from ray_valkey_spill.plugin.background import Background
from ray_valkey_spill.plugin.deferred import DeferredRestores
from ray_valkey_spill.plugin.deletions import DeletionJournal
from ray_valkey_spill.plugin.ending import Guard
from ray_valkey_spill.plugin.metrics import Metrics
from ray_valkey_spill.plugin.outage import OVERFLOW, VALKEY, Outages
from ray_valkey_spill.plugin.proc import is_alive
from ray_valkey_spill.plugin.process import gcs_address, in_spill_worker, is_connected
from ray_valkey_spill.store.cleanup import RENEWAL
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import FAILURES_IN_A_ROW, Failures, ObjectStore
from ray_valkey_spill.store.reclaim import Owners

__all__ = ["Keeper", "NodeLock"]

logger = logging.getLogger("ray_valkey_spill")

_SUFFIX = ".keeper"
# Seconds between two rounds, each of which renews the lease; and between attempts after a failure.
_BETWEEN_ROUNDS, _BETWEEN_ATTEMPTS = RENEWAL, 2.0
# Invariant: a renewal comes within every lease, whatever else the threads do. A round can take
# longer than a lease, with many objects to remove or a slow overflow. So another thread renews the
# lease if nobody has for this many seconds.
_LATEST_RENEWAL = 2 * RENEWAL
# Seconds between two looks of an IO worker that does not keep the node at what it has left.
_BETWEEN_LOOKS = 300.0
# Seconds between two listings of the overflow.
_BETWEEN_SWEEPS = 600.0
_ATTEMPTS_PER_WARNING = 6
_DELETED_TOGETHER = 100
# Seconds between two checks whether an IO worker that has just started is connected.
_BETWEEN_STARTS = 0.2
# Seconds without a renewal after which a node that no process keeps has ended.
_ABANDONED = 600.0


class NodeLock:
    """A file lock that one IO worker of a node holds until it ends: the one that keeps the node.

    The file's modification time is the time of the latest renewal of the lease. If the file cannot
    be opened or locked, each IO worker keeps the node.

    Args:
        directory: returns the directory of shared files, or None if there is none.
        name: prefix of the names of this node's files: its id.
    """

    def __init__(self, directory: Callable[[], Path | None], name: str) -> None:
        self._directory = directory
        self._name = name
        self._file: int | None = None

    def announce(self) -> None:
        """Make the file: by it, the end of a session knows which nodes ran on this host."""
        if (file := self._open()) is not None:
            os.close(file)

    def take(self) -> bool:
        """Take the lock unless another process has it; return whether this one has it now."""
        if self._file is not None or (file := self._open()) is None:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:
            os.close(file)
            return True
        self._file = file
        return True

    def drop(self) -> None:
        """Release the lock."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def note_renewal(self) -> None:
        """Record for the node's other IO workers that its lease was renewed."""
        if (path := self._path()) is not None:
            with contextlib.suppress(OSError):
                path.touch()

    def since_renewal(self) -> float:
        """Return the seconds since the node's latest renewal; infinity if none is known."""
        if (path := self._path()) is not None:
            with contextlib.suppress(OSError):
                age = time.time() - path.stat().st_mtime
                # The clock was set back if the age is negative.
                return age if age >= 0 else float("inf")
        return float("inf")

    def remove_abandoned(self, is_dead: Callable[[str], bool]) -> None:
        """Remove the files of nodes that died long ago and shared this directory.

        Nodes on one host do, and a killed one leaves its files behind.

        Args:
            is_dead: whether the node with that id is certain to be dead.
        """
        directory = self._directory()
        if directory is None:
            return
        for path in list(directory.glob(f"*{_SUFFIX}")):
            other = NodeLock(self._directory, path.stem)
            with contextlib.suppress(OSError):
                # While the server is away, nobody renews a lease.
                if path.stem != self._name and other._is_abandoned() and is_dead(path.stem):
                    # The lock comes last: if this process is killed, the next one continues.
                    files = {*directory.glob(f"{path.stem}[-.]*")} - {path}
                    for file in [*files, path]:
                        _remove(file)
            other.drop()

    def _is_abandoned(self) -> bool:
        """Whether nobody keeps the node any more, whose lock this process has then."""
        since = self.since_renewal()
        is_old = _ABANDONED <= since < float("inf")
        return is_old and self.take() and self._file is not None

    def _open(self) -> int | None:
        if (path := self._path()) is not None:
            with contextlib.suppress(OSError):
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        return None

    def _path(self) -> Path | None:
        directory = self._directory()
        return directory and directory / f"{self._name}{_SUFFIX}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Keeper:
    """Two threads for an IO worker's background work. `start` starts them.

    Args:
        node: the node.
        store: this process's object store.
        lock: see `NodeLock`.
        guard: of the session.
        journal: pending deletions.
        deferred: deferred restores.
        outages: gets failures and successes.
        metrics: gets failures and measurements.
        is_destroyed: whether the session's data are being removed, or were.
        storing: holds up that removal; see `guardian.storing`.
        needs: returns the resources needed to read the object of a URL, its tier first.
        owners: see `reclaim`.
    """

    def __init__(
        self,
        node: Node,
        store: ObjectStore,
        lock: NodeLock,
        guard: Guard,
        journal: DeletionJournal,
        deferred: DeferredRestores,
        outages: Outages,
        metrics: Metrics,
        is_destroyed: Callable[[], bool],
        storing: Callable[[], AbstractContextManager[bool]],
        needs: Callable[[str], Sequence[str]],
        owners: Owners,
    ) -> None:
        self._node = node
        self._store = store
        self._lock = lock
        self._guard = guard
        self._journal = journal
        self._deferred = deferred
        self._outages = outages
        self._metrics = metrics
        self._is_destroyed = is_destroyed
        self._storing = storing
        self._needs = needs
        self._owners = owners
        self._reclaimer = node.reclaimer(owners)
        self._rounds = Background(self._do_round)
        self._lease = Background(self._keep_lease, "lease")
        self._failed_rounds = 0
        # The first renewal is left to the round.
        self._renewed = time.monotonic()
        self._cannot_join = False
        self._swept = float("-inf")
        # When this process last looked for what it has left, and how many breaks there were.
        self._recovered, self._breaks = time.monotonic(), 0
        self._in_overflow: int | None = None

    def start(self) -> None:
        """Start the threads unless they run. If one cannot start, the next call tries again."""
        self._rounds.start()
        self._lease.start()

    def clean_up_soon(self) -> None:
        """Remove the leftovers of a failed operation of this process as soon as possible."""
        self._rounds.wake()

    def stop(self) -> None:
        """End the threads after their work in progress, and release the lock."""
        self._rounds.stop()
        self._lease.stop()
        self._lock.drop()

    # --- rounds ---

    def _do_round(self) -> float:
        """Do one round; return the seconds until the next one.

        Where one step fails, the others are tried all the same.

        Raises:
            Exception: one that no step should raise, after all steps.
        """
        if not is_connected():
            return _BETWEEN_STARTS
        self._store.close_idle()
        self._node.close_idle()
        self._outages.forget()
        failure: SpillError | None = None
        unexpected: Exception | None = None
        for step in self._steps():
            try:
                step()
            except SpillError as error:
                # Operations with the same failure have reported it already, but there may be none.
                self._metrics.failed("recover", error)
                failure = failure or error
            except Exception as error:
                unexpected = unexpected or error
        self._metrics.looked(self._store.breaks + self._node.breaks)
        if unexpected is not None:
            raise unexpected
        if failure is None:
            self._failed_rounds = 0
            return _BETWEEN_ROUNDS
        self._failed_rounds += 1
        if self._failed_rounds % _ATTEMPTS_PER_WARNING == 0:
            logger.warning("leftovers of failed operations cannot be removed yet: %s", failure)
        return min(self._failed_rounds * _BETWEEN_ATTEMPTS, _BETWEEN_ROUNDS)

    def _steps(self) -> list[Callable[[], None]]:
        if self._lock.take():
            return [
                self._guard.ensure,
                self._renew_lease,
                self._note_outliving,
                self._remove_abandoned,
                self._join_overflow,
                self._measure_room,
                self._adopt_deletions,
                self._settle_again,
                self._recover,
                *self._steps_of_each(),
                self._sweep_overflow,
                self._reclaim,
            ]
        return [self._settle_again, self._recover_own, *self._steps_of_each()]

    def _steps_of_each(self) -> list[Callable[[], None]]:
        return [self._adopt_restores, self._node.give_back, self._delete_again]

    def _settle_again(self) -> None:
        self._node.settle_again()

    def _renew_lease(self) -> None:
        with self._storing() as may_store:
            if not may_store:
                return
            self._node.renew_lease(gcs_address(), self._is_destroyed)
        self._note_renewal()

    def _note_outliving(self) -> None:
        if self._guard.outlives_gcs:
            with self._storing() as may_store:
                if may_store:
                    self._node.note_outliving(self._is_destroyed)

    def _note_renewal(self) -> None:
        self._renewed = time.monotonic()
        self._lock.note_renewal()
        self._metrics.renewed_lease()
        self._outages.over(VALKEY, "leases")

    def _remove_abandoned(self) -> None:
        nodes = functools.cache(self._owners.nodes)

        def is_dead(node: str) -> bool:
            alive = nodes()
            return alive is not None and not alive.get(node)

        self._lock.remove_abandoned(is_dead)

    def _join_overflow(self) -> None:
        """Join the overflow, and report it if it cannot be used, before a spill needs it."""
        try:
            with self._storing() as may_store:
                # Joining would give a session that is being removed its token again.
                if not may_store:
                    return
                self._node.join_overflow()
        except OverflowUnavailableError as error:
            self._cannot_join = True
            self._outages.failed(OVERFLOW, "spills and restores", error)
            raise
        # After the first success this step asks only the server: it proves nothing about the
        # overflow any more.
        if self._cannot_join:
            self._cannot_join = False
            self._outages.over(OVERFLOW, "spills and restores")

    def _measure_room(self) -> None:
        with contextlib.suppress(SpillError):  # the next round measures again
            self._metrics.found_room(self._node.room())

    def _adopt_deletions(self) -> None:
        """Take over what killed IO workers of the node had still to delete."""
        self._journal.adopt(is_alive)

    def _adopt_restores(self) -> None:
        """Take over what killed IO workers of the node had put off.

        A spill worker does not: Ray's `put_file_like_object` holds the GIL while plasma makes room
        for an object, and plasma may wait for just this process to spill.
        """
        if not in_spill_worker():
            self._deferred.adopt(lambda url: [*self._needs(url), VALKEY][0])

    def _recover(self) -> None:
        self._node.recover(is_alive)

    def _recover_own(self) -> None:
        # A server that starts from a snapshot does not say what it has lost.
        breaks, now = self._store.breaks + self._node.breaks, time.monotonic()
        is_due = breaks != self._breaks or now - self._recovered >= _BETWEEN_LOOKS
        if is_due or self._node.has_left_something:
            self._node.recover_own()
            self._breaks, self._recovered = breaks, now

    def _delete_again(self) -> None:
        """Retry deletions that failed. A failure of one tier does not hold up the other."""
        failure: SpillError | None = None
        left = sorted(self._journal.left(), key=self._tier_of)
        for tier, of_tier in itertools.groupby(left, key=self._tier_of):
            urls = list(of_tier)
            try:
                for start in range(0, len(urls), _DELETED_TOGETHER):
                    page = urls[start : start + _DELETED_TOGETHER]
                    with self._storing() as may_delete:
                        if not may_delete:  # they must not come between the steps of a removal
                            return
                        try:
                            self._node.delete(page)
                            self._journal.done(page)
                        except OverflowUnavailableError as error:
                            failure = failure or error
                            self._delete_singly(page)
                    if tier:
                        self._outages.over(tier, "deletions")
            except SpillError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _delete_singly(self, urls: Sequence[str]) -> None:
        """Delete objects of the overflow, one of which cannot be deleted: it comes last next time.

        Raises:
            OverflowUnavailableError: several in a row cannot be deleted.
        """
        failures = Failures(OverflowUnavailableError, FAILURES_IN_A_ROW)
        for url in urls:
            self._journal.postpone(url)
            with failures.kept():
                self._node.delete([url])
                self._journal.done([url])

    def _tier_of(self, url: str) -> str:
        return [*self._needs(url), ""][0]

    def _sweep_overflow(self) -> None:
        if time.monotonic() - self._swept >= _BETWEEN_SWEEPS:
            self._in_overflow = self._node.sweep_overflow(is_alive)
            self._swept = time.monotonic()
        if self._in_overflow is not None:
            self._metrics.found_in_overflow(self._in_overflow)

    def _reclaim(self) -> None:
        """Remove objects that nobody can need any more: see `reclaim`."""
        try:
            self._reclaimer.step()
        finally:
            if self._reclaimer.of_dead_nodes is not None:
                self._metrics.found_of_dead_nodes(self._reclaimer.of_dead_nodes)

    # --- the lease, however long a round takes ---

    def _keep_lease(self) -> float:
        """Renew the lease if no round has in time; return the seconds until the next check."""
        if not is_connected():
            return _BETWEEN_STARTS
        ago = min(time.monotonic() - self._renewed, self._lock.since_renewal())
        if ago < _LATEST_RENEWAL:
            return _LATEST_RENEWAL - ago
        try:
            with self._storing() as may_store:
                if not may_store:
                    return _LATEST_RENEWAL
                self._node.keep_lease(gcs_address(), self._is_destroyed)
        except SpillError:  # a round reports it if it lasts
            return _BETWEEN_ATTEMPTS
        self._note_renewal()
        return _LATEST_RENEWAL
