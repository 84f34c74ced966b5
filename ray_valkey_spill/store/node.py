"""The background half of a node: its lease, recovery after killed processes, destruction."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError
from ray_valkey_spill.format.names import Keyspace, ObjectName, Place
from ray_valkey_spill.format.sealing import KeyRing
from ray_valkey_spill.protocol.link import USUAL_SHARING, Sharing
from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.store.lease import NodeLease
from ray_valkey_spill.store.object_store import (
    Failures,
    ObjectStore,
    node_name,
    remove_from,
    tiers_of,
)
from ray_valkey_spill.store.observer import Observer
from ray_valkey_spill.store.reclaim import USUAL_PACE, Owners, Pace, Reclaim, Reclaimer
from ray_valkey_spill.store.spill import LATE_ARRIVALS
from ray_valkey_spill.store.under_way import UNDER_WAY
from ray_valkey_spill.tiers.budget import IDLE
from ray_valkey_spill.tiers.ledger import OUTLIVES_GCS, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = ["Node", "Room"]

# Seconds for which to retry an unavailable server: background work is repeated anyway.
_PATIENCE = 1.0
_DESTROY_PAUSE = 0.05
# Seconds; what a killed writer had begun to write longer ago was put, if it is whole and pending.
_LONGEST_PUT = 600.0
_PID = re.compile("[0-9]{1,10}")


class Room(NamedTuple):
    """The use of a namespace's limits, in bytes.

    Attributes:
        used: bytes that count for the budget: stored in Valkey, or granted to writers.
        max_bytes: the budget; None if there is none.
        memory: memory of the server; in a cluster, of the fullest shard.
    """

    used: int
    max_bytes: int | None
    memory: MemoryInfo


class Node:
    """The background work for a node of a Ray session.

    Not thread-safe, except that a second thread may call `keep_lease`, and any thread `close_idle`.

    Invariant: all processes that put objects of a node share one PID namespace, also with this
    process. The process id in an attempt decides whether its writer is still alive.

    Args:
        config: as for `ObjectStore`.
        session, node: the node.
        observer: is notified of deletions.
        sharing: when connections are given up.
        beside: object store of the same process, if any. Its unused connections are closed if the
            server has none left for this.
        patience: seconds for which to retry an unavailable server.
    """

    def __init__(
        self,
        config: Config,
        session: str,
        node: str,
        observer: Observer | None = None,
        sharing: Sharing = USUAL_SHARING,
        *,
        beside: ObjectStore | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        self._keys = Keyspace.of(config)
        self._name = node_name(session, node)
        self._observer = observer or Observer()
        self._max_bytes = config.max_bytes
        self._key_ring = KeyRing.of(config)
        impatient = replace(config, retry_timeout=min(config.retry_timeout, patience))
        spare = beside.close_unused if beside is not None else lambda: None
        self._link = link_to(impatient, sharing=sharing, spare=spare)
        lease_link = link_to(impatient, sharing=sharing, spare=spare)
        self._links = self._link, lease_link
        self._valkey = ValkeyTier(self._link, self._keys)
        self._ledger = self._valkey.ledger
        self._lease = NodeLease(self._name, self._ledger)
        self._outliving = NodeLease(self._name, self._ledger)
        self._late_valkey = ValkeyTier(lease_link, self._keys)
        self._late_lease = NodeLease(self._name, self._late_valkey.ledger)
        overflow = beside.overflow if beside is not None else OverflowTier.of(config)
        self._overflow, self._tiers = tiers_of(self._name, self._valkey, overflow)

    def close(self) -> None:
        """Close the connections and end the threads; the next operation opens new ones."""
        self._valkey.close()
        self._late_valkey.close()
        if self._overflow is not None:
            self._overflow.overflow.close()

    def close_idle(self) -> None:
        """Close connections that were not used for a minute. Thread-safe."""
        for link in self._links:
            link.close_idle()

    @property
    def breaks(self) -> int:
        """Number of times that a connection broke or could not be opened."""
        return sum(link.breaks for link in self._links)

    # --- lease ---

    def renew_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """Take or renew the node's lease.

        Args:
            gcs_address: as for `NodeLease.renew`.
            is_destroyed: likewise.
        """
        self._lease.renew(gcs_address, is_destroyed)

    def keep_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """As `renew_lease`, in another thread, however long `recover` and the like take.

        Invariant: a renewal comes within every lease, whatever the other thread does. Renewals by
        this method are rare, so it closes its connection again.
        """
        try:
            self._late_lease.renew(gcs_address, is_destroyed)
        finally:
            self._late_valkey.close()

    def note_outliving(self, is_destroyed: Callable[[], bool]) -> None:
        """Take or renew a second lease: the session outlives its GCS, which is on this host.

        Args:
            is_destroyed: as for `NodeLease.renew`.
        """
        self._outliving.renew(OUTLIVES_GCS, is_destroyed)

    # --- overflow ---

    def probe_overflow(self) -> None:
        """Make sure that the overflow, if there is one, can be used.

        Raises:
            OverflowUnavailableError: it cannot be.
        """
        if self._overflow is not None:
            self._overflow.probe()

    def join_overflow(self) -> None:
        """Make sure that this node's overflow, if it has one, is that of the whole session.

        The node must have a lease.

        Raises:
            OverflowUnavailableError: it is not, or it cannot be used.
            ServerError: the server cannot answer.
        """
        if self._overflow is not None:
            self._overflow.join()

    def sweep_overflow(self, is_alive: Callable[[int], bool]) -> int | None:
        """Remove the unfinished files of this node's killed processes from the overflow.

        This lists all files of the node.

        Args:
            is_alive: as for `recover`.

        Returns:
            Bytes of this node's files in the overflow; None if it has none.

        Raises:
            OverflowUnavailableError, ServerError
        """
        if self._overflow is None:
            return None
        return self._overflow.remove_parts(self._name, is_alive)

    # --- recovery ---

    def recover(self, is_alive: Callable[[int], bool]) -> int:
        """Remove the leftovers of this process's failed puts, and of this node's killed processes.

        A server that was started from a snapshot may have lost that objects were settled, and that
        grants were released, long ago. What is pending, but was put for all that can be known, is
        settled again: Ray may need it. Grants of which this process knows nothing are released.

        Args:
            is_alive: whether the process of this node with that id may still put objects.

        Returns:
            The number of removed objects.

        Raises:
            ServerError: some leftovers remain for the next call.
        """
        is_left = functools.partial(_is_left, is_alive=is_alive)
        # Before the pending set is read, because a grant covers what its writer has written.
        budgets = [(budget, budget.stranded) for budget in UNDER_WAY.budgets(self._name)]
        writers = [*self._ledger.grants_of(self._name)]
        grants = [writer for writer in writers if self._has_ended(writer, is_alive)]
        failed, in_doubt = UNDER_WAY.left(self._name)
        left = {name for page in self._ledger.pending(self._name) for name in page if is_left(name)}
        count = 0
        if left or in_doubt:
            # The server may still have in its sockets what was sent, and carry it out later.
            time.sleep(LATE_ARRIVALS)
            self._settle_whole(filter(_may_be_put, left))
            # What is pending now, after its writer was seen dead, was never reported as put; at
            # first the writer may have died between that and this. If a failover has made it
            # pending again, its writer has died before it could `settle_again`.
            count = self._valkey.remove_half_written(
                self._name, lambda name: name in left and is_left(name)
            )
            self._valkey.remove_objects(in_doubt)
        UNDER_WAY.removed(failed, in_doubt)
        self._ledger.release(self._name, grants)
        for writer in {*writers} - {*grants}:
            if (known := UNDER_WAY.budget(writer)) is not None:
                known.release_unknown(self._ledger)
        for budget, stranded in budgets:
            if stranded:  # else a put that is under way would hold this up
                budget.recovered(stranded)
        return count + len({*in_doubt} - left)

    def _settle_whole(self, names: Iterable[ObjectName]) -> None:
        """Settle those of some pending objects that have all their values, and can be read."""
        entries = []
        wanted = [(name, 0) for name in names]
        for (name, _), stat in zip(wanted, self._valkey.measure(wanted)):
            with contextlib.suppress(LostObjectError):
                entries.append(self._valkey.entry(name, stat, self._key_ring))
        if entries:
            self._link.execute(*self._ledger.settlements(self._name, entries))

    def settle_again(self) -> int:
        """Settle objects again that this process has put lately, and that are pending.

        A failover, or a restart, can lose that an object was settled, and keep all its values. What
        is pending is removed once its writer is dead.

        Returns:
            The number of these objects. Costs one look at what is pending, until a look has found
            them settled for a minute.

        Raises:
            ServerError: the next call tries again.
        """
        lately = UNDER_WAY.put_lately(self._name)
        if not lately:
            return 0
        now = time.monotonic()
        pending = {name for page in self._ledger.pending(self._name) for name in page}
        UNDER_WAY.are_settled(lately.keys() - pending, now)
        entries = [lately[name] for name in lately.keys() & pending]
        if entries:
            self._link.execute(*self._ledger.settlements(self._name, entries))
        return len(entries)

    @property
    def has_left_something(self) -> bool:
        """Whether this process has failed attempts of which something may be left."""
        return any(UNDER_WAY.left(self._name)) or any(
            budget.stranded for budget in UNDER_WAY.budgets(self._name)
        )

    def recover_own(self) -> int:
        """As `recover`, for this process only."""
        return self.recover(lambda pid: True)

    def give_back(self, idle: float = IDLE) -> None:
        """Release this process's grants if it has put nothing for `idle` seconds."""
        for budget in UNDER_WAY.budgets(self._name):
            budget.give_back(self._ledger, idle)

    def _has_ended(self, writer: str, is_alive: Callable[[int], bool]) -> bool:
        """Whether the writer of a grant has ended; a malformed name counts as ended."""
        pid = writer.partition("-")[0]
        if not _PID.fullmatch(pid):
            return True
        if int(pid) == os.getpid():
            return UNDER_WAY.budget(writer) is None
        return not is_alive(int(pid))

    def delete(self, urls: Iterable[str]) -> None:
        """Retry deletions that failed or were cut short.

        Raises:
            ServerError, OverflowUnavailableError: some objects may be left.
        """
        places: list[Place] = []
        for url in urls:
            try:
                places.append(self._keys.parse_url(url))
            except LostObjectError:
                continue  # not a URL of this namespace
        if any(place.tier == "valkey" for place in places):
            time.sleep(LATE_ARRIVALS)
        remove_from(self._tiers, places, self._observer)

    def reclaimer(
        self, owners: Owners, pace: Pace = USUAL_PACE, clock: Callable[[], float] = time.monotonic
    ) -> Reclaimer:
        """Return what removes the objects that nobody can need; for the thread of this node.

        Args:
            owners: is asked who is alive and who needs what.
            pace: how often and how much.
            clock: returns a time in seconds.
        """
        reclaim = Reclaim(
            self._valkey,
            self._overflow,
            self._tiers,
            self._keys,
            self._key_ring,
            owners,
            self._observer,
            pace,
            clock,
        )
        return Reclaimer(reclaim, self._name)

    # --- room ---

    def room(self) -> Room:
        """Return the memory used by the namespace and by the server.

        Raises:
            ServerError: the server cannot answer.
        """
        used = self._ledger.totals().used
        return Room(used, self._max_bytes, max(self._link.memories(), key=_fullness))

    # --- the end ---

    def destroy(
        self,
        is_alive: Callable[[int], bool],
        patience: float = 5.0,
        *,
        leave_overflow: bool = True,
    ) -> int:
        """Delete every object of this node.

        A failure of one tier does not hold up the other. This waits for objects that other
        processes are still putting: if one lost its metadata and its writer was then killed, nobody
        could find the chunks written in between.

        Args:
            is_alive: as for `recover`.
            patience: seconds to wait. Objects that are still being put afterwards stay, with their
                metadata and the node's lease.
            leave_overflow: whether to remove the session's token if no other node has a lease. Not
                if the session is removed as a whole: files that cannot be removed are found by it.

        Returns:
            The number of deleted objects.
        """
        count = 0
        with Failures() as failures:
            with failures.kept():
                count += self._destroy_in_valkey(is_alive, patience)
            if self._overflow is not None:
                with failures.kept():
                    count += self._overflow.destroy(self._name)
                    if leave_overflow:
                        self._overflow.leave()
        return count

    def _destroy_in_valkey(self, is_alive: Callable[[int], bool], patience: float) -> int:
        count = 0
        deadline = time.monotonic() + patience
        while True:
            busy = False
            for names in self._ledger.pending(self._name):
                idle = [name for name in names if not _is_written(name, is_alive)]
                busy = busy or len(idle) < len(names)
                self._valkey.remove_objects(idle, stepwise=True)
                count += len(idle)
            count += self._valkey.remove_stored(self._name)
            if not busy or time.monotonic() > deadline:
                break
            time.sleep(_DESTROY_PAUSE)
        self.give_back(idle=0.0)
        if busy:
            # A clean-up finds what stays by the lease, and with that whom to ask.
            return count
        self._ledger.close_account(self._name)
        self._ledger.unlist_if_empty()
        return count


def _is_left(name: ObjectName, is_alive: Callable[[int], bool]) -> bool:
    """Whether a pending object was left by its writer."""
    if name.writer == os.getpid():
        return UNDER_WAY.has_left(name)
    return not is_alive(name.writer)


def _may_be_put(name: ObjectName) -> bool:
    """Whether a pending object that was left by its writer may have been put, long ago."""
    if name.writer == os.getpid():
        return UNDER_WAY.has_forgotten(name)
    return time.time() - name.time > _LONGEST_PUT


def _is_written(name: ObjectName, is_alive: Callable[[int], bool]) -> bool:
    """Whether a pending object may still be written."""
    if name.writer == os.getpid():
        return name in UNDER_WAY
    return is_alive(name.writer)


def _fullness(memory: MemoryInfo) -> float:
    return memory.used / memory.maxmemory if memory.maxmemory else 0.0
