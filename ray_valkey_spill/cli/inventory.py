"""Lists and sums what is stored, by the ledger and the overflow's files. Never writes.

Nothing is searched for on the server: the cost depends on what the namespace has, and not on what
others have there.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ServerError,
    ServerRefusedError,
    ServerUnavailableError,
    SpillError,
)
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, Place, TierName
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.server_info import MemoryInfo, ServerInfo
from ray_valkey_spill.store.cleanup import LEASE
from ray_valkey_spill.store.liveness import RunningSession
from ray_valkey_spill.tiers.ledger import Grant, Lease, Ledger, Usage, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier, StoredFile
from ray_valkey_spill.tiers.overflow_place import SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = [
    "SORTINGS",
    "Figures",
    "Inventory",
    "Item",
    "NamespaceStatistics",
    "NodeFigures",
    "Overview",
    "OverviewStatistics",
    "Selection",
    "Servers",
    "Statistics",
    "age",
    "percent",
    "total",
]


# Of a node: it renews its lease; it does not; or its session's GCS says that it is dead.
State = Literal["alive", "silent", "dead"]
# Seconds between two questions to the same GCS, and how many are asked at once.
_BETWEEN_QUESTIONS, _ASKED_AT_ONCE = 30.0, 8


# --- values ---


class Item(NamedTuple):
    """A stored object; `path` is the path of its file, if it is in the overflow."""

    entry: Entry
    path: str | None = None

    @property
    def tier(self) -> TierName:
        return "valkey" if self.path is None else "overflow"

    def as_dict(self, keys: Keyspace, now: float) -> dict[str, Any]:
        """For JSON; sizes in bytes, age in seconds at `now`, in seconds since the epoch.

        For a sealed object Ray's own URL also has the id of its key.
        """
        name, size, stored = self.entry
        return {
            "session": name.session,
            "node": name.node,
            "object": name.object_id,
            "name": str(name),
            "tier": self.tier,
            "key": keys.header(name) if self.path is None else None,
            "path": self.path,
            "url": keys.url(Place(name, size, self.tier)),
            "chunks": name.chunks,
            "logical_bytes": size,
            "stored_bytes": stored,
            "age_seconds": age(name.time, now),
        }


# How objects can be ordered: None is the order in which they are read, by node and id.
SORTINGS: Mapping[str, Callable[[Item], float] | None] = {
    "node": None,
    "age": lambda item: item.entry.name.time,
    "size": lambda item: -item.entry.size,
    "stored": lambda item: -item.entry.stored,
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects are wanted, in which order.

    Attributes:
        session: how the names of their sessions begin.
        node: how the ids of their nodes begin.
        tier: "valkey", "overflow", or None for both.
        older_than: seconds; None for any age.
        sort: a key of `SORTINGS`.
        limit: how many at most; None for all.
    """

    session: str = ""
    node: str = ""
    tier: TierName | None = None
    older_than: float | None = None
    sort: str = "node"
    limit: int | None = None

    @property
    def is_everything(self) -> bool:
        """Whether every stored object is selected, whatever the order and the limit."""
        return not (self.session or self.node or self.tier or self.older_than)


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over objects, sizes in bytes.

    Attributes:
        objects: the number of stored objects.
        logical: the length of their data.
        stored: bytes counted for them: in Valkey including the server's overhead, in the overflow
            the length of their files.
        since: when the oldest was spilled, by its node's clock, in seconds since the epoch.
        half_written: the number of objects that are being written, or were when their writer was
            killed.
    """

    objects: int = 0
    logical: int = 0
    stored: int = 0
    since: float | None = None
    half_written: int = 0

    @property
    def ratio(self) -> float | None:
        return self.logical / self.stored if self.stored else None

    @classmethod
    def of(cls, entries: Iterable[Entry], half_written: int = 0) -> Figures:
        objects = logical = stored = 0
        since: float | None = None
        for name, size, counted in entries:
            objects, logical, stored = objects + 1, logical + size, stored + counted
            since = name.time if since is None else min(since, name.time)
        return cls(objects, logical, stored, since, half_written)

    def __add__(self, other: Figures) -> Figures:
        known = [since for since in (self.since, other.since) if since is not None]
        return Figures(
            self.objects + other.objects,
            self.logical + other.logical,
            self.stored + other.stored,
            min(known, default=None),
            self.half_written + other.half_written,
        )

    def as_dict(self, now: float) -> dict[str, Any]:
        return {
            "objects": self.objects,
            "logical_bytes": self.logical,
            "stored_bytes": self.stored,
            "ratio": self.ratio,
            "oldest_age_seconds": None if self.since is None else age(self.since, now),
            "half_written": self.half_written,
        }


def age(since: float, now: float) -> float:
    """Seconds from `since` to `now`; 0 where the clocks that gave them disagree by more."""
    return max(0.0, now - since)


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """What a node of a session has in each tier.

    Attributes:
        node_name: the node.
        valkey, overflow: what it has there.
        lease_age: seconds since it has renewed its lease, by the server's clock; None without one.
        is_dead: whether the GCS of its session says so.
    """

    node_name: NodeName
    valkey: Figures = Figures()
    overflow: Figures = Figures()
    lease_age: float | None = None
    is_dead: bool = False

    @property
    def state(self) -> State:
        if self.has_fresh_lease:
            return "alive"
        return "dead" if self.is_dead else "silent"

    @property
    def stored(self) -> int:
        """Bytes counted for its objects in both tiers."""
        return self.valkey.stored + self.overflow.stored

    @property
    def has_fresh_lease(self) -> bool:
        return self.lease_age is not None and self.lease_age <= LEASE


@dataclass(frozen=True, slots=True)
class Servers:
    """The server, or all primaries of a cluster.

    Attributes:
        address: as the config gives it.
        infos: of each; there is at least one.
        sentinel_service: the name by which Sentinels watch it, if they do.
    """

    address: str
    infos: Sequence[ServerInfo]
    sentinel_service: str | None

    @classmethod
    def of(cls, config: Config, link: Link) -> Servers:
        infos = list(link.infos().values())
        return cls(str(config.address), infos, config.sentinel_service)

    @property
    def memory(self) -> MemoryInfo:
        """The memory of all together."""
        return MemoryInfo.of_all(self.infos)

    @property
    def is_cluster(self) -> bool:
        return self.infos[0].mode == "cluster"

    @property
    def replicas(self) -> int:
        """How many replicas are in step with their primaries."""
        return sum(info.replicas for info in self.infos)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        memory = self.memory
        return {
            "address": self.address,
            "product": self.infos[0].product,
            "version": self.infos[0].version,
            "is_cluster": self.is_cluster,
            "shards": len(self.infos),
            "replicas": self.replicas,
            "sentinel_service": self.sentinel_service,
            "used_bytes": memory.used,
            "maxmemory_bytes": memory.maxmemory or None,
            "used_percent": percent(memory.used, memory.maxmemory),
            "maxmemory_policy": memory.policy,
        }


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of a whole namespace.

    Attributes:
        now: the server's time, in seconds since the epoch.
        servers: where it is.
        root: the beginning of every key.
        nodes: all that have something in the ledger or the overflow, in order.
        max_bytes: the budget, if the config gives one.
        charged: bytes that count for a budget: stored in Valkey, and granted to writers.
        grants: of writers that are writing, or were when they were killed.
    """

    now: float
    servers: Servers
    root: str
    nodes: Sequence[NodeFigures]
    max_bytes: int | None
    charged: int
    grants: Sequence[Grant]

    @property
    def sessions(self) -> list[tuple[str, list[NodeFigures]]]:
        grouped = groupby(self.nodes, key=lambda node: node.node_name.session)
        return [(session, list(nodes)) for session, nodes in grouped]

    @property
    def dead_nodes(self) -> list[NodeFigures]:
        """Those that their sessions' GCS calls dead."""
        return [node for node in self.nodes if node.state == "dead"]

    @property
    def granted(self) -> int:
        return sum(grant.granted for grant in self.grants)

    @property
    def written(self) -> int:
        """Bytes of these that are written, as far as the writers have reported."""
        return sum(grant.written for grant in self.grants)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, ages in seconds."""
        return {
            "server": self.servers.as_dict(),
            "root": self.root,
            "budget": {
                "max_bytes": self.max_bytes,
                "used_bytes": self.charged,
                "used_percent": percent(self.charged, self.max_bytes),
            },
            "grants": {
                "writers": len(self.grants),
                "granted_bytes": self.granted,
                "written_bytes": self.written,
            },
            "dead_nodes": {
                "nodes": len(self.dead_nodes),
                "stored_bytes": sum(node.stored for node in self.dead_nodes),
            },
            "sessions": [
                {
                    "session": session,
                    **self._tiers(nodes),
                    "nodes": [
                        {
                            "node": node.node_name.node,
                            "state": node.state,
                            "lease_age_seconds": node.lease_age,
                            "has_fresh_lease": node.has_fresh_lease,
                            **self._tiers([node]),
                        }
                        for node in nodes
                    ],
                }
                for session, nodes in self.sessions
            ],
            **self._tiers(self.nodes),
        }

    def _tiers(self, nodes: Sequence[NodeFigures]) -> dict[str, Any]:
        valkey, overflow = total(nodes)
        return {"valkey": valkey.as_dict(self.now), "overflow": overflow.as_dict(self.now)}


def total(nodes: Iterable[NodeFigures]) -> tuple[Figures, Figures]:
    """The sums of all nodes, in Valkey and in the overflow."""
    valkey = overflow = Figures()
    for node in nodes:
        valkey, overflow = valkey + node.valkey, overflow + node.overflow
    return valkey, overflow


def percent(part: int, whole: int | None) -> float | None:
    """None if there is no whole."""
    return 100 * part / whole if whole else None


@dataclass(frozen=True, slots=True)
class NamespaceStatistics:
    """One of several namespaces; `statistics` is None if it cannot be read, and `failure` why."""

    name: str
    statistics: Statistics | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class OverviewStatistics:
    """Figures of all namespaces of a server, in order."""

    servers: Servers
    prefix: str
    namespaces: Sequence[NamespaceStatistics]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, ages in seconds. A namespace without statistics has null."""
        return {
            "server": self.servers.as_dict(),
            "key_prefix": self.prefix,
            "namespaces": [
                {
                    "namespace": each.name,
                    "statistics": each.statistics and each.statistics.as_dict(),
                    "failure": each.failure or None,
                }
                for each in self.namespaces
            ],
        }


# --- reading ---


class Inventory:
    """Reads what a namespace has stored.

    Errors are those of `link.Link.run`, and OverflowUnavailableError.

    Args:
        config: server, namespace and overflow.
        ask_gcs: see `gcs.running_at`. Without it, no node is known to be dead.
        waiting: see `link.Link`.
    """

    def __init__(
        self,
        config: Config,
        ask_gcs: Callable[[str], RunningSession | None] = lambda address: None,
        waiting: Callable[[SpillError], None] = lambda error: None,
    ) -> None:
        self._ask_gcs = ask_gcs
        # By address of a GCS: when it was asked, and its answer.
        self._asked: dict[str, tuple[float, RunningSession | None]] = {}
        self.keys = Keyspace.of(config)
        self._config = config
        self._link = link_to(config, waiting=waiting)
        self._tier = ValkeyTier(self._link, self.keys)
        self._ledger = self._tier.ledger
        self._overflow = OverflowTier.of(config)
        self._counted: dict[NodeName, tuple[Usage, Figures]] = {}

    def close(self) -> None:
        self._link.close()
        if self._overflow is not None:
            self._overflow.close()

    def time(self) -> float:
        """The server's clock, in seconds since the epoch."""
        return self._ledger.time() / 1000

    def node_names(self) -> list[NodeName]:
        """All nodes that have something in the ledger or the overflow, in order."""
        in_overflow = self._overflow.node_names() if self._overflow else ()
        return sorted({*self._ledger.node_names(), *in_overflow})

    def unseen(self) -> list[str]:
        """Return the sessions with an overflow that is not given here, or not mounted."""
        sessions = sorted(self._ledger.overflows())
        overflow = self._overflow
        if overflow is None:
            return sessions
        return [
            session
            for session in sessions
            if not SharedOverflow(overflow, session, self._ledger).is_here()
        ]

    def items(
        self,
        wanted: Callable[[NodeName], bool] = lambda node_name: True,
        tier: TierName | None = None,
    ) -> Iterator[Item]:
        """Yield the objects of each wanted node: in Valkey, then in the overflow.

        Holds one page of the index at a time in memory, and the list of one node's files.
        """
        for node_name in filter(wanted, self.node_names()):
            if tier != "overflow":
                for page in self._ledger.stored(node_name):
                    yield from map(Item, page)
            if tier != "valkey":
                for file in self._files(node_name):
                    if file.is_whole:
                        yield Item(file.entry, file.path)

    def select(self, selection: Selection, now: float) -> Iterator[Item]:
        """Yield the selected objects; ages are those at `now`, in seconds since the epoch.

        Sorted objects are all in memory, or as many as the limit allows.
        """
        items = self.items(
            lambda node_name: (
                node_name.session.startswith(selection.session)
                and node_name.node.startswith(selection.node)
            ),
            selection.tier,
        )
        if (least := selection.older_than) is not None:
            items = (item for item in items if age(item.entry.name.time, now) >= least)
        if (key := SORTINGS[selection.sort]) is None:
            return islice(items, selection.limit)
        if selection.limit is None:
            return iter(sorted(items, key=key))
        return iter(heapq.nsmallest(selection.limit, items, key))

    def statistics(self) -> Statistics:
        """Return the sums; reads only what has changed since the last call."""
        return self._link.confirmed(self._statistics)

    def _statistics(self) -> Statistics:
        usages = self._ledger.usages()
        by_node = self._ledger.grants().values()
        grants = [grant for of_node in by_node for grant in of_node.values()]
        now = self._ledger.time()
        renewed: dict[NodeName, int] = {}
        leases = self._ledger.leases()
        for lease in leases:
            renewed[lease.node_name] = max(lease.renewed, renewed.get(lease.node_name, 0))
        nodes = []
        for node_name in self.node_names():
            files = self._files(node_name)
            nodes.append(
                NodeFigures(
                    node_name,
                    self._figures(node_name, usages.get(node_name)),
                    Figures.of(
                        (file.entry for file in files if file.is_whole),
                        half_written=sum(not file.is_whole for file in files),
                    ),
                    age(renewed[node_name] / 1000, now / 1000) if node_name in renewed else None,
                )
            )
        nodes = self._with_deaths(nodes, leases)
        return Statistics(
            now=now / 1000,
            servers=Servers.of(self._config, self._link),
            root=self.keys.root,
            nodes=nodes,
            max_bytes=self._config.max_bytes,
            charged=sum(usage.stored for usage in usages.values())
            + sum(grant.granted for grant in grants),
            grants=grants,
        )

    def _with_deaths(
        self, nodes: Sequence[NodeFigures], leases: Sequence[Lease]
    ) -> list[NodeFigures]:
        """Ask the GCS of each session with a silent node which of its nodes are dead."""
        silent = {node.node_name.session for node in nodes if not node.has_fresh_lease}
        # Together, because each takes seconds where the host does not answer.
        pool = ThreadPoolExecutor(_ASKED_AT_ONCE)
        try:
            asked = pool.map(lambda session: (session, self._running(session, leases)), silent)
            living = {session: running.nodes for session, running in asked if running is not None}
        finally:
            pool.shutdown(cancel_futures=True)
        return [
            replace(node, is_dead=node.node_name.node not in living[node.node_name.session])
            if node.node_name.session in living
            else node
            for node in nodes
        ]

    def _running(self, session: str, leases: Sequence[Lease]) -> RunningSession | None:
        """Return what the GCS of a session says; None if it does not answer."""
        of_session = [lease for lease in leases if lease.node_name.session == session]
        # Whoever has renewed last knows the address of a GCS that has moved.
        of_session.sort(key=lambda lease: -lease.renewed)
        for address in dict.fromkeys(each.gcs_address for each in of_session if each.has_address):
            running = self._running_at(address)
            if running is not None and running.name == session:
                return running
        return None

    def _running_at(self, address: str) -> RunningSession | None:
        """Ask a GCS, at most once in a while: that takes a process and a second."""
        asked, answer = self._asked.get(address, (float("-inf"), None))
        if time.monotonic() - asked >= _BETWEEN_QUESTIONS:
            answer = self._ask_gcs(address)
            self._asked[address] = time.monotonic(), answer
        return answer

    def _figures(self, node_name: NodeName, usage: Usage | None) -> Figures:
        """What a node has in Valkey. `usage` was read before; it differs after every change."""
        known = self._counted.get(node_name)
        if known is not None and known[0] == usage:
            figures = known[1]
        else:
            figures = Figures.of(entry for page in self._ledger.stored(node_name) for entry in page)
            if usage is not None:
                self._counted[node_name] = usage, figures
        return figures + Figures(half_written=sum(map(len, self._ledger.pending(node_name))))

    def _files(self, node_name: NodeName) -> list[StoredFile]:
        if self._overflow is None:
            return []
        return sorted(self._overflow.files(node_name), key=lambda file: file.path)


class Overview:
    """Reads what all namespaces below a key prefix have stored.

    Finds them by the list that their nodes keep on the server. Errors are those of `Inventory`.
    Arguments too, but that no GCS is asked.
    """

    def __init__(
        self, config: Config, waiting: Callable[[SpillError], None] = lambda error: None
    ) -> None:
        self._config = config
        self._waiting = waiting
        self._link = link_to(config, waiting=waiting)
        self._ledger = Ledger(self._link, Keyspace.of(config))
        self._inventories: dict[str, Inventory] = {}

    def close(self) -> None:
        self._link.close()
        for inventory in self._inventories.values():
            inventory.close()

    def statistics(self) -> OverviewStatistics:
        """Return the sums of each namespace, and at least of the config's own."""
        names = sorted({self._config.namespace, *self._ledger.namespaces()})
        return OverviewStatistics(
            Servers.of(self._config, self._link),
            self._config.key_prefix,
            [self._of(name) for name in names],
        )

    def _of(self, namespace: str) -> NamespaceStatistics:
        is_own = namespace == self._config.namespace
        if namespace not in self._inventories:
            self._inventories[namespace] = Inventory(
                # The budget of another namespace is not known here.
                self._config
                if is_own
                else replace(self._config, namespace=namespace, max_bytes=None),
                waiting=self._waiting,
            )
        try:
            return NamespaceStatistics(namespace, self._inventories[namespace].statistics())
        except ServerUnavailableError:
            raise
        except ServerRefusedError:
            return NamespaceStatistics(namespace, None, "this user may not read it")
        except ServerError as error:
            return NamespaceStatistics(namespace, None, str(error))
