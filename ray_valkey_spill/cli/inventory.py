"""What is stored, as the backend's own books and the overflow's files tell it. Reads, never writes.

Nothing is searched for on the server: what a look costs depends on what the namespace has, and not
on what others have beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Entry, Keyspace, Owner, Place
from ray_valkey_spill.protocol.server_info import MemoryInfo, ServerInfo
from ray_valkey_spill.store.cleanup import LEASE
from ray_valkey_spill.tiers.ledger import Grant, Usage, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier, StoredFile
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = [
    "Figures",
    "Inventory",
    "Item",
    "NodeFigures",
    "Statistics",
    "age",
    "percent",
    "tier_name",
    "total",
]


def tier_name(overflow: bool) -> str:
    return "overflow" if overflow else "Valkey"


# --- values ---


class Item(NamedTuple):
    """A stored object; `path` is that of its file, if it is in the overflow."""

    entry: Entry
    path: str | None = None

    @property
    def is_in_overflow(self) -> bool:
        return self.path is not None

    def as_dict(self, keys: Keyspace, now: float) -> dict[str, Any]:
        """For JSON; sizes in bytes, age in seconds at `now`, in seconds since the epoch.

        What Ray keeps for a sealed object is the URL and the id of its key.
        """
        name, size, stored = self.entry
        return {
            "session": name.session,
            "node": name.node,
            "object": name.object_id,
            "name": str(name),
            "tier": tier_name(self.is_in_overflow).lower(),
            "key": keys.header(name) if self.path is None else None,
            "path": self.path,
            "url": keys.url(Place(name, size, "overflow" if self.is_in_overflow else "valkey")),
            "chunks": name.chunks,
            "logical_bytes": size,
            "stored_bytes": stored,
            "age_seconds": age(name.time, now),
        }


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over objects, sizes in bytes.

    Attributes:
        objects: how many are stored.
        logical: the length of their data.
        stored: what is counted for them: in Valkey with what the server needs around them, in the
            overflow the length of their files.
        since: when the oldest was spilled, by its node's clock, in seconds since the epoch.
        half_written: how many are being written, or were when their writer was killed.
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
    """Seconds from `since` to `now`; none if the clocks they are from do not agree so far."""
    return max(0.0, now - since)


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """What a node of a session has in each tier.

    `lease_age` tells how many seconds ago it renewed its lease, by the server's clock, if it has
    one.
    """

    owner: Owner
    valkey: Figures = Figures()
    overflow: Figures = Figures()
    lease_age: float | None = None

    @property
    def has_fresh_lease(self) -> bool:
        return self.lease_age is not None and self.lease_age <= LEASE


@dataclass(frozen=True, slots=True)
class Statistics:
    """A look at the whole namespace.

    Attributes:
        now: the server's time, in seconds since the epoch.
        servers: the server, or all that have keys in a cluster.
        root: what every key begins with.
        nodes: those that anything is known of, in order.
        max_bytes: the budget, if the config gives one.
        charged: what counts for a budget: bytes stored in Valkey, and granted to writers.
        grants: of the writers that are at work, or were when they were killed.
    """

    now: float
    address: str
    root: str
    servers: Sequence[ServerInfo]
    nodes: Sequence[NodeFigures]
    max_bytes: int | None
    charged: int
    grants: Sequence[Grant]

    @property
    def sessions(self) -> list[tuple[str, list[NodeFigures]]]:
        grouped = groupby(self.nodes, key=lambda node: node.owner.session)
        return [(session, list(nodes)) for session, nodes in grouped]

    @property
    def memory(self) -> MemoryInfo:
        """That of all servers together."""
        return MemoryInfo.of_all(self.servers)

    @property
    def granted(self) -> int:
        return sum(grant.granted for grant in self.grants)

    @property
    def written(self) -> int:
        """What of that is written, as far as the writers have told."""
        return sum(grant.written for grant in self.grants)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, ages in seconds."""
        memory = self.memory
        return {
            "server": {
                "address": self.address,
                "product": self.servers[0].product,
                "version": self.servers[0].version,
                "shards": len(self.servers),
                "used_bytes": memory.used,
                "maxmemory_bytes": memory.maxmemory or None,
                "used_percent": percent(memory.used, memory.maxmemory),
                "maxmemory_policy": memory.policy,
            },
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
            "sessions": [
                {
                    "session": session,
                    **self._tiers(nodes),
                    "nodes": [
                        {
                            "node": node.owner.node,
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
    """What nodes have together in Valkey, and in the overflow."""
    valkey = overflow = Figures()
    for node in nodes:
        valkey, overflow = valkey + node.valkey, overflow + node.overflow
    return valkey, overflow


def percent(part: int, whole: int | None) -> float | None:
    """None if there is no whole."""
    return 100 * part / whole if whole else None


# --- the look ---


class Inventory:
    """Looks at what a namespace has stored.

    Errors are those of `link.Link.run`, and OverflowUnavailableError.
    """

    def __init__(self, config: Config) -> None:
        self.keys = Keyspace.of(config)
        self._config = config
        self._link = link_to(config)
        self._tier = ValkeyTier(self._link, self.keys)
        self._ledger = self._tier.ledger
        self._overflow = OverflowTier.of(config)
        self._counted: dict[Owner, tuple[Usage, Figures]] = {}

    def close(self) -> None:
        self._link.close()
        if self._overflow is not None:
            self._overflow.close()

    def time(self) -> float:
        """The server's clock, in seconds since the epoch."""
        return self._ledger.time() / 1000

    def owners(self) -> list[Owner]:
        """Everybody who has anything, in any tier, in order."""
        in_overflow = self._overflow.owners() if self._overflow else ()
        return sorted({*self._ledger.owners(), *in_overflow})

    def items(self, wanted: Callable[[Owner], bool] = lambda owner: True) -> Iterator[Item]:
        """What `wanted` owners have stored, one after the other: in Valkey, then in the overflow.

        In memory are a page of the index at a time, and what files one owner has.
        """
        for owner in filter(wanted, self.owners()):
            for page in self._ledger.stored(owner):
                yield from map(Item, page)
            for file in self._files(owner):
                if file.is_whole:
                    yield Item(file.entry, file.path)

    def statistics(self) -> Statistics:
        """Sums over all there is; what has not changed since the last time is not read again."""
        return self._link.confirmed(self._statistics)

    def _statistics(self) -> Statistics:
        usages = self._ledger.usages()
        by_node = self._ledger.grants().values()
        grants = [grant for of_node in by_node for grant in of_node.values()]
        now = self._ledger.time()
        renewed: dict[Owner, int] = {}
        for lease in self._ledger.leases():
            renewed[lease.owner] = max(lease.renewed, renewed.get(lease.owner, 0))
        nodes = []
        for owner in self.owners():
            files = self._files(owner)
            nodes.append(
                NodeFigures(
                    owner,
                    self._figures(owner, usages.get(owner)),
                    Figures.of(
                        (file.entry for file in files if file.is_whole),
                        half_written=sum(not file.is_whole for file in files),
                    ),
                    age(renewed[owner] / 1000, now / 1000) if owner in renewed else None,
                )
            )
        return Statistics(
            now=now / 1000,
            address=str(self._config.address),
            root=self.keys.root,
            servers=list(self._link.infos().values()),
            nodes=nodes,
            max_bytes=self._config.max_bytes,
            charged=sum(usage.stored for usage in usages.values())
            + sum(grant.granted for grant in grants),
            grants=grants,
        )

    def _figures(self, owner: Owner, usage: Usage | None) -> Figures:
        """What an owner has in Valkey. `usage` as it was before: it tells of each change."""
        known = self._counted.get(owner)
        if known is not None and known[0] == usage:
            figures = known[1]
        else:
            figures = Figures.of(entry for page in self._ledger.stored(owner) for entry in page)
            if usage is not None:
                self._counted[owner] = usage, figures
        return figures + Figures(half_written=sum(map(len, self._ledger.pending(owner))))

    def _files(self, owner: Owner) -> list[StoredFile]:
        if self._overflow is None:
            return []
        return sorted(self._overflow.files(owner), key=lambda file: file.path)
