"""The background half of a node: its lease, what killed processes left, and its end."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError
from ray_valkey_spill.format.names import Keyspace, ObjectName, Place, TierName
from ray_valkey_spill.protocol.link import USUAL_SHARING, Sharing
from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.store.lease import NodeLease
from ray_valkey_spill.store.object_store import Failures, ObjectStore, node_name, remove_from
from ray_valkey_spill.store.observer import Observer
from ray_valkey_spill.store.spill import LATE_ARRIVALS
from ray_valkey_spill.store.under_way import UNDER_WAY
from ray_valkey_spill.tiers.base import Tier
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.overflow_place import MissingOverflow, SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = ["Node", "Room"]

# Seconds for which a server that is away is retried: what cannot be done now is done another time.
_PATIENCE = 1.0
_DESTROY_PAUSE = 0.05


class Room(NamedTuple):
    """What is used of what limits a namespace, in bytes.

    Attributes:
        used: what counts for the budget: stored in Valkey, and granted to writers.
        max_bytes: the budget, if there is one.
        memory: of the server; in a cluster, of the shard that is fullest.
    """

    used: int
    max_bytes: int | None
    memory: MemoryInfo


class Node:
    """What is done for a node of a Ray session, beside its objects' way in and out.

    For one thread, and another one for `keep_lease`; `close_idle` is for any. One PID namespace a
    node: what a process has left is told from its id, so all processes that put objects of a node
    must see one another, and be seen by this.

    Args:
        config: as for `ObjectStore`.
        session, node: which node.
        observer: is notified of what was done.
        sharing: when connections are given back.
        beside: the store of the same process, if it has one: its unused connections are closed if
            the server has none left for this.
        patience: seconds for which a server that is away is retried.
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
        impatient = replace(config, retry_timeout=min(config.retry_timeout, patience))
        spare = beside.close_unused if beside is not None else lambda: None
        self._link = link_to(impatient, sharing=sharing, spare=spare)
        lease_link = link_to(impatient, sharing=sharing, spare=spare)
        self._links = self._link, lease_link
        self._valkey = ValkeyTier(self._link, self._keys)
        self._ledger = self._valkey.ledger
        self._lease = NodeLease(self._name, self._ledger)
        self._late_valkey = ValkeyTier(lease_link, self._keys)
        self._late_lease = NodeLease(self._name, self._late_valkey.ledger)
        overflow = beside.overflow if beside is not None else OverflowTier.of(config)
        self._overflow: SharedOverflow | None = None
        if overflow is not None:
            self._overflow = SharedOverflow(overflow, self._name.session, self._ledger)
        self._tiers: dict[TierName, Tier] = {
            "valkey": self._valkey,
            "overflow": self._overflow or MissingOverflow(),
        }

    def close(self) -> None:
        """Drop the connections and the threads; the next operation gets new ones."""
        self._valkey.close()
        self._late_valkey.close()
        if self._overflow is not None:
            self._overflow.overflow.close()

    def close_idle(self) -> None:
        """Give back connections that were not used for a minute. For any thread."""
        for link in self._links:
            link.close_idle()

    @property
    def breaks(self) -> int:
        """How many times a connection has broken, or could not be had."""
        return sum(link.breaks for link in self._links)

    # --- lease ---

    def renew_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """Show that this node lives: see `NodeLease.renew`.

        Args:
            gcs_address: as there.
            is_destroyed: likewise.
        """
        self._lease.renew(gcs_address, is_destroyed)

    def keep_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """As `renew_lease`, in another thread, however long `recover` and the like take.

        A renewal must come round within a lease whatever the other thread does. The connection is
        closed again: renewals by this method are rare.
        """
        try:
            self._late_lease.renew(gcs_address, is_destroyed)
        finally:
            self._late_valkey.close()

    # --- overflow ---

    def probe_overflow(self) -> None:
        """Make sure that the overflow, if there is one, can be used.

        Raises:
            OverflowUnavailableError
        """
        if self._overflow is not None:
            self._overflow.probe()

    def join_overflow(self) -> None:
        """Make sure that this node's overflow, if it has one, is that of the whole session.

        The node needs a lease by then.

        Raises:
            OverflowUnavailableError: it is not, or it cannot be used.
            ServerError: the server cannot answer.
        """
        if self._overflow is not None:
            self._overflow.join()

    def sweep_overflow(self, is_alive: Callable[[int], bool]) -> int | None:
        """Remove what killed processes of this node were writing to the overflow.

        Its files have to be listed for that.

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

    # --- what is left ---

    def recover(self, is_alive: Callable[[int], bool]) -> int:
        """Remove what failed puts of this process, and killed processes of this node, have left.

        Args:
            is_alive: whether a process of this node, given by its id, may still be putting.

        Returns:
            How many objects were removed.

        Raises:
            ServerError: what could not be removed is left for the next time.
        """
        is_left = functools.partial(_is_left, is_alive=is_alive)
        # Before a look at what is pending, because a grant stands for what its writer has written.
        budgets = [(budget, budget.stranded) for budget in UNDER_WAY.budgets(self._name)]
        grants = [w for w in self._ledger.grants_of(self._name) if self._has_ended(w, is_alive)]
        in_doubt = UNDER_WAY.in_doubt(self._name)
        left = {name for page in self._ledger.pending(self._name) for name in page if is_left(name)}
        count = 0
        if left or in_doubt:
            # The server may still have in its sockets what was sent, and carry it out later.
            time.sleep(LATE_ARRIVALS)
            # What is pending now, after its writer was seen dead, was never reported as put; at
            # first the writer may have died between that and this.
            count = self._valkey.remove_half_written(
                self._name, lambda name: name in left and is_left(name)
            )
            self._valkey.remove_objects(in_doubt)
            UNDER_WAY.removed(in_doubt)
        self._ledger.release(self._name, grants)
        for budget, stranded in budgets:
            budget.recovered(stranded)
        return count + len(in_doubt)

    def recover_own(self) -> int:
        """As `recover`, of this process alone."""
        return self.recover(lambda pid: True)

    def give_back(self, idle: float | None = None) -> None:
        """Release what this process is granted, if it has put nothing for a while.

        Args:
            idle: seconds, if not the usual ones.
        """
        for budget in UNDER_WAY.budgets(self._name):
            budget.give_back(self._ledger, *([] if idle is None else [idle]))

    def _has_ended(self, writer: str, is_alive: Callable[[int], bool]) -> bool:
        """Whether the writer of a grant has ended; one that is malformed has."""
        pid = writer.partition("-")[0]
        if not pid.isdecimal():
            return True
        if int(pid) == os.getpid():
            return not UNDER_WAY.has_writer(writer)
        return not is_alive(int(pid))

    def delete(self, urls: Iterable[str]) -> None:
        """Remove objects whose deletion failed, or was cut short.

        Raises:
            ServerError, OverflowUnavailableError: some may be left.
        """
        places: list[Place] = []
        for url in urls:
            try:
                places.append(self._keys.parse_url(url))
            except LostObjectError:
                continue  # it is none of ours
        if any(place.tier == "valkey" for place in places):
            time.sleep(LATE_ARRIVALS)
        remove_from(self._tiers, places, self._observer)

    # --- room ---

    def room(self) -> Room:
        """What the namespace and its server have used.

        Raises:
            ServerError
        """
        used = self._ledger.totals().used
        return Room(used, self._max_bytes, max(self._link.memories(), key=_fullness))

    # --- the end ---

    def destroy(self, is_alive: Callable[[int], bool], patience: float = 5.0) -> int:
        """Remove every object of this node.

        A tier that is away does not hold up the other. What another process is just putting is
        waited for: if it lost its entry in the index and was then killed, nobody could find the
        chunks that it had gone on to write.

        Args:
            is_alive: as for `recover`.
            patience: seconds to wait; what is still being put then stays, and stays in the index.

        Returns:
            How many objects were removed.
        """
        count = 0
        with Failures() as failures:
            with failures.kept():
                count += self._destroy_in_valkey(is_alive, patience)
            if self._overflow is not None:
                with failures.kept():
                    count += self._overflow.overflow.destroy(self._name)
                    self._overflow.leave()
        return count

    def _destroy_in_valkey(self, is_alive: Callable[[int], bool], patience: float) -> int:
        count = 0
        deadline = time.monotonic() + patience
        while True:
            busy = False
            for names in self._ledger.pending(self._name):
                idle = [name for name in names if _is_left(name, is_alive)]
                busy = busy or len(idle) < len(names)
                self._valkey.remove_objects(idle)
                count += len(idle)
            count += self._valkey.remove_stored(self._name)
            if not busy or time.monotonic() > deadline:
                break
            time.sleep(_DESTROY_PAUSE)
        self.give_back(idle=0.0)
        self._ledger.close_account(self._name)
        self._ledger.unlist_if_empty()
        return count


def _is_left(name: ObjectName, is_alive: Callable[[int], bool]) -> bool:
    """Whether nobody writes what is pending any more."""
    if name.writer == os.getpid():
        return name not in UNDER_WAY
    return not is_alive(name.writer)


def _fullness(memory: MemoryInfo) -> float:
    return memory.used / memory.maxmemory if memory.maxmemory else 0.0
