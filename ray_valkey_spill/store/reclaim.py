"""Removes stored objects that nobody can need any more, on the word of their owners.

Ray asks only the node that has spilled an object to delete it, and only once. So objects stay
behind when that node dies, when an IO worker is killed between the end of a spill and Ray's hearing
of it, and when a deletion is lost. The owner of an object, the process that created its reference,
knows whether anybody still has one, and the header has the owner's address.

Each node asks for its own objects, and one node of the session asks for those of its dead nodes,
both a slice at a time. An object is removed

- if its owner is dead according to the GCS: Ray itself then refuses to read it;
- if its owner says twice, some time apart, that nobody references it. Once is not enough, because
  an owner may not know yet of an object that a task has just created;
- if it has no value any more, but only its entry in the metadata: its values were evicted, or a
  failover has lost that the entry was removed.

Everything else is no verdict, and keeps the object. Only the copy that was asked for is removed, by
its whole name: a later attempt to spill the same object has another one. What is pending is not
asked for, because Ray does not know of it yet.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    OverflowUnavailableError,
    SpillError,
)
from ray_valkey_spill.format.header import decode_header, decode_without_payload
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName, Place, TierName
from ray_valkey_spill.format.sealing import KeyRing
from ray_valkey_spill.store.cleanup import LEASE
from ray_valkey_spill.store.object_store import (
    FAILURES_IN_A_ROW,
    Failures,
    remove_from,
    tiers_of,
)
from ray_valkey_spill.store.observer import Observer, Reason
from ray_valkey_spill.tiers.base import Stat, Tier
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.overflow_place import SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = [
    "USUAL_PACE",
    "DeadNodes",
    "Left",
    "Owned",
    "Owners",
    "Pace",
    "Reclaim",
    "Reclaimer",
    "Verdict",
    "reclaim_of_dead_nodes",
]


class Verdict(enum.Enum):
    """The answer to whether an object is still needed."""

    REFERENCED = enum.auto()
    UNREFERENCED = enum.auto()
    OWNER_DEAD = enum.auto()
    UNKNOWN = enum.auto()


class Owned(NamedTuple):
    """An object's id, in hex, and the address of its owner, as Ray serializes it."""

    object_id: str
    owner_address: bytes


class Owners(Protocol):
    """Asks a Ray session who is alive and who needs what. Raises nothing."""

    def nodes(self) -> Mapping[str, bool] | None:
        """Return the ids of the nodes, in hex, and whether each is alive; None if unknown.

        Those that started first come first.
        """

    def verdicts(self, wanted: Sequence[Owned]) -> list[Verdict]:
        """Return a verdict for each object, in order. Takes a bounded time."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often and how much is asked. Times are in seconds.

    Attributes:
        age: own objects are asked for from this age on: their owners know of younger ones by Ray's
            own messages.
        confirmation: between two answers that nobody references an object.
        pause: between two passes over the same objects.
        share: a pass over the objects of dead nodes may use one part in so many of a core. So
            passes over very many are rarer.
        settling: from when a node was first seen dead until what its processes were writing is
            removed, and its lease: time for them to end. Its lease must have expired, too.
        between_slices: between two slices, however often the keeper makes a round: it does so every
            ten seconds, and more often after failures.
        own, of_dead: objects in a slice. With those pauses, one of the node's own takes less than
            1 % of a core.
        listing, listing_of_dead: between two listings of a node's files in the overflow. The
            totals are added up again as often as the files of dead nodes are listed.
    """

    age: float = 30.0
    confirmation: float = 15.0
    pause: float = 15.0
    share: float = 8.0
    settling: float = 20.0
    between_slices: float = 9.0
    own: int = 200
    of_dead: int = 5000
    listing: float = 600.0
    listing_of_dead: float = 60.0


USUAL_PACE = Pace()
# Suspects to remember; more are found again later. So are those whose owner does not give its
# second answer within so many seconds.
_MOST_SUSPECTS, _LONGEST_SUSPICION = 50_000, 600.0
# Owners to remember, so that a header is not read in each pass, and seconds until that begins anew:
# only reading the header shows that an object has no value any more.
_MOST_OWNERS, _REMEMBERED = 50_000, 900.0
# What the end of a walk over a dead node counts for, in objects.
_COST_OF_A_NODE = 50
# Passes of `reclaim_of_dead_nodes`, at most.
_MOST_PASSES = 5
# Chunks to look for, at most, because a forged name may claim millions.
_MOST_CHUNKS = 10_000
# Seconds between two checks by a node whether it has to ask for the objects of dead nodes, at most.
_LONGEST_REST = 600.0
# Nodes that make a pass though another one comes before them, and the seconds between two passes of
# the first of them; twice as many for the second.
_STAND_INS, _STAND_IN = 2, 120.0


class _Item(NamedTuple):
    """A stored object, and the bytes counted for it."""

    place: Place
    stored: int

    @classmethod
    def of(cls, entry: Entry, tier: TierName) -> _Item:
        return cls(Place(entry.name, entry.size, tier), entry.stored)


class _Suspect(NamedTuple):
    """An object that nobody references according to one answer.

    Attributes:
        item: the object.
        since: when that answer came.
        due: when to ask again.
    """

    item: _Item
    since: float
    due: float


class Left(NamedTuple):
    """Objects of dead nodes that were asked for and stay.

    Attributes:
        referenced: how many are referenced.
        unknown: how many have an owner who is not known or did not answer.
        failure: why some of the overflow were not asked for, or not removed; None if all were.
    """

    referenced: int
    unknown: int
    failure: OverflowUnavailableError | None = None


class _KnownOwners:
    """The owners of objects that were asked for lately. A name never has another owner."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._owners: dict[str, bytes] = {}

    def get(self, name: ObjectName) -> Owned | None:
        if self._clock() - self._since > _REMEMBERED:
            self._owners.clear()
            self._since = self._clock()
        owner = self._owners.get(self._key(name))
        return None if owner is None else Owned(name.object_id, owner)

    def add(self, name: ObjectName, owner: bytes) -> None:
        if len(self._owners) < _MOST_OWNERS:
            self._owners[self._key(name)] = owner

    def forget(self, name: ObjectName) -> None:
        self._owners.pop(self._key(name), None)

    @staticmethod
    def _key(name: ObjectName) -> str:
        return name.object_id + name.attempt


class Reclaim:
    """Asks for objects, and removes those that nobody can need. For one thread.

    Errors are those of the tiers. What could not be asked for or removed is found again. A file of
    the overflow that cannot be read or removed does not hold up others: that is raised in the end.

    Args:
        valkey, overflow: the tiers of the thread; `overflow` is None if the session has none.
        tiers: the same by name.
        keys, key_ring: to read headers.
        owners: who is asked.
        observer: is notified of what was removed.
        pace: see `Pace`.
        clock: returns a time in seconds.

    Attributes:
        removed: number of objects removed so far.
        asked: how often `ask` got each verdict; None is for objects without a header to read.
    """

    def __init__(
        self,
        valkey: ValkeyTier,
        overflow: SharedOverflow | None,
        tiers: dict[TierName, Tier],
        keys: Keyspace,
        key_ring: KeyRing | None,
        owners: Owners,
        observer: Observer,
        pace: Pace,
        clock: Callable[[], float],
    ) -> None:
        self.valkey = valkey
        self.overflow = overflow
        self.owners = owners
        self.pace = pace
        self.clock = clock
        self._tiers = tiers
        self._keys = keys
        self._key_ring = key_ring
        self._observer = observer
        self._suspects: dict[ObjectName, _Suspect] = {}
        self._known = _KnownOwners(clock)
        self.removed = 0
        self.asked: Counter[Verdict | None] = Counter()
        self._failures = self._new_failures()
        self._unread: set[ObjectName] = set()

    def ask(self, items: Sequence[_Item]) -> None:
        """Ask for objects, and remove those of dead owners; remember the unreferenced ones.

        Those without any value are removed, too.
        """
        with self._begin():
            self._ask(items)

    def _ask(self, items: Sequence[_Item]) -> None:
        owned = list(self._owned(items))
        without = [item for item, each in zip(items, owned) if each is None]
        gone = self._gone(without)
        self._remove("gone", gone)
        self.asked[None] += len(without) - len(gone)
        judged = list(self._judged(items, owned))
        now = self.clock()
        dead = []
        for item, verdict in judged:
            self.asked[verdict] += 1
            if verdict is Verdict.OWNER_DEAD:
                dead.append(item)
            elif verdict is Verdict.UNREFERENCED and len(self._suspects) < _MOST_SUSPECTS:
                due = now + self.pace.confirmation
                self._suspects.setdefault(item.place.name, _Suspect(item, now, due))
        self._remove("owner_dead", dead)

    def _begin(self) -> Failures:
        """Begin to ask, and to collect the failures of single files."""
        self._failures = self._new_failures()
        self._unread.clear()
        return self._failures

    @staticmethod
    def _new_failures() -> Failures:
        return Failures(OverflowUnavailableError, FAILURES_IN_A_ROW)

    def confirm(self) -> bool:
        """Ask again for suspects that are due, and remove those that nobody references.

        Those whose owners do not answer, or of which something failed, are asked for again. A
        failure of one tier does not hold up the other. Returns whether more are due.
        """
        now = self.clock()
        due = (suspect for suspect in self._suspects.values() if suspect.due <= now)
        suspects = list(islice(due, self.pace.of_dead))
        is_more = next(due, None) is not None
        with Failures() as failures:
            for tier in self._tiers:
                with failures.kept(), self._begin():
                    self._confirm([s.item for s in suspects if s.item.place.tier == tier], now)
        return is_more

    def _confirm(self, items: Sequence[_Item], now: float) -> None:
        for item in items:
            suspect = self._suspects.pop(item.place.name)
            if now - suspect.since < _LONGEST_SUSPICION:
                # Last: others come first the next time.
                later = suspect._replace(due=now + self.pace.confirmation)
                self._suspects[item.place.name] = later
        verdicts = dict(self._judged(items, self._owned(items)))
        for item in items:
            is_needed = verdicts.get(item, Verdict.REFERENCED) is Verdict.REFERENCED
            if is_needed and item.place.name not in self._unread:
                self._suspects.pop(item.place.name, None)
        dead = [item for item in items if verdicts.get(item) is Verdict.OWNER_DEAD]
        unreferenced = [item for item in items if verdicts.get(item) is Verdict.UNREFERENCED]
        self._remove("owner_dead", dead)
        self._remove("unreferenced", unreferenced)

    @property
    def suspects(self) -> int:
        """Number of objects that wait for their second answer."""
        return len(self._suspects)

    def _judged(
        self, items: Sequence[_Item], owned: Iterable[Owned | None]
    ) -> Iterator[tuple[_Item, Verdict]]:
        known = [(item, each) for item, each in zip(items, owned) if each]
        if known:
            verdicts = self.owners.verdicts([each for _, each in known])
            yield from ((item, verdict) for (item, _), verdict in zip(known, verdicts))

    def _gone(self, items: Sequence[_Item]) -> list[_Item]:
        """Return the objects in Valkey without any value; none if that is not certain now."""
        known = {item.place.name: item for item in items if item.place.tier == "valkey"}
        names = [name for name in known if name.chunks <= _MOST_CHUNKS]
        with contextlib.suppress(SpillError):
            return [known[name] for name in self.valkey.without_values(names)]
        return []

    def _owned(self, items: Sequence[_Item]) -> Iterator[Owned | None]:
        """Yield the owner of each object; None if its header cannot be read."""
        known = [self._known.get(item.place.name) for item in items]
        new = [item.place for item, owned in zip(items, known) if owned is None]
        in_valkey = self.valkey.headers([place.name for place in new if place.tier == "valkey"])
        for (place, _), owned in zip(items, known):
            if owned is not None:
                yield owned
                continue
            key = self._keys.header(place.name)
            try:
                if place.tier == "valkey":
                    value = next(in_valkey)
                    header = decode_without_payload(value or b"", key, self._key_ring)
                else:
                    self._unread.add(place.name)
                    stat = Stat(None, [])
                    with self._failures.kept():
                        (stat,) = self._tiers[place.tier].stat([place])
                        self._unread.remove(place.name)
                    header, _ = decode_header(stat.header or b"", key, self._key_ring)
            except (LostObjectError, ConfigError):
                yield None
                continue
            if header.object_id != place.name.object_id:
                yield None
                continue
            self._known.add(place.name, header.owner_address)
            yield Owned(header.object_id, header.owner_address)

    def _remove(self, reason: Reason, items: Sequence[_Item]) -> None:
        self._remove_some(reason, [item for item in items if item.place.tier == "valkey"])
        for item in items:
            if item.place.tier == "overflow":
                with self._failures.kept():
                    self._remove_some(reason, [item])

    def _remove_some(self, reason: Reason, items: Sequence[_Item]) -> None:
        if items:
            places = [item.place for item in items]
            remove_from(self._tiers, places, self._observer, stepwise=True)
            self.removed += len(items)
            for item in items:
                self._known.forget(item.place.name)
                self._suspects.pop(item.place.name, None)
            self._observer.reclaimed(reason, len(items), sum(item.stored for item in items))


class _Walk:
    """A walk over the stored objects of a node, a slice at a time: in Valkey, then its files."""

    def __init__(self, reclaim: Reclaim, node: NodeName, *, lists_files: bool) -> None:
        self.node = node
        self.found = self.file_bytes = 0
        self.lists_files = lists_files and reclaim.overflow is not None
        self._reclaim = reclaim
        self._after = b""
        self._files: Iterator[_Item] | None = None

    def take(self, count: int) -> list[_Item]:
        """Return up to `count` objects; none at the end."""
        while self._files is None:
            entries, self._after = self._reclaim.valkey.ledger.stored_after(
                self.node, self._after, count
            )
            if entries:
                self.found += len(entries)
                return [_Item.of(entry, "valkey") for entry in entries]
            if not self._after:
                self._files = iter(self._list())
        items = list(islice(self._files, count))
        self.found += len(items)
        return items

    def _list(self) -> list[_Item]:
        shared = self._reclaim.overflow
        if not self.lists_files or shared is None:
            return []
        # If this fails, the next slice goes on without files, of which then nothing is known.
        self.lists_files, self._files = False, iter(())
        files = [file for file in shared.overflow.files(self.node) if file.is_whole]
        self.lists_files = True
        self.file_bytes = sum(file.entry.stored for file in files)
        return [_Item.of(file.entry, "overflow") for file in files]


class DeadNodes:
    """Passes over the objects of a session's dead nodes.

    Args:
        reclaim: asks and removes.
        session: name of the session.

    Attributes:
        stored: bytes that dead nodes had stored when they were last looked at.
        failure: why something in the overflow was not asked for, or not removed, in this pass.
    """

    def __init__(self, reclaim: Reclaim, session: str) -> None:
        self.stored = 0
        self.failure: OverflowUnavailableError | None = None
        self._reclaim = reclaim
        self._session = session
        self._walks: list[_Walk] = []
        self._file_bytes: dict[NodeName, int] = {}
        self._listed = float("-inf")
        # By dead node: since when it is known to be dead.
        self._since: dict[NodeName, float] = {}
        # Nodes that may still write, dead or not: their leases have not expired.
        self._leased: set[NodeName] = set()

    def begin(self) -> bool:
        """Begin a pass. Return False if it is not known which nodes are dead."""
        now = self._reclaim.clock()
        self.failure = None
        lists_files = now - self._listed >= self._reclaim.pace.listing_of_dead
        names = self._names(lists_files=lists_files)
        ledger = self._reclaim.valkey.ledger
        server_time = ledger.time()
        self._leased = {
            each.node_name
            for each in ledger.leases()
            if abs(each.renewed - server_time) <= 1000 * LEASE
        }
        # After the names: a node is known to the GCS before it stores anything. So one that has
        # just joined is not taken for one that the GCS has forgotten.
        nodes = self._reclaim.owners.nodes()
        if nodes is None:
            return False
        if lists_files:
            self._listed = now
            # Nodes of version 0.1 in the namespace store and remove objects without the totals.
            ledger.recount_totals()
        dead = {name for name in names if not nodes.get(name.node)}
        self._since = {node: self._since.get(node, now) for node in dead}
        self._file_bytes = {n: size for n, size in self._file_bytes.items() if n in dead}
        usages = ledger.usages()
        self.stored = sum(usages[node].stored for node in dead if node in usages)
        self.stored += sum(self._file_bytes.values())
        lists_files = lists_files and self.failure is None
        self._walks = [_Walk(self._reclaim, node, lists_files=lists_files) for node in sorted(dead)]
        return True

    def _names(self, *, lists_files: bool) -> set[NodeName]:
        """Return the session's nodes that have, or may have, stored something."""
        names = self._reclaim.valkey.ledger.node_names() | {*self._file_bytes}
        overflow = self._reclaim.overflow
        if overflow is not None and lists_files:
            with self._without_files():
                names |= overflow.overflow.node_names()
        return {name for name in names if name.session == self._session}

    @contextlib.contextmanager
    def _past_failures(self) -> Iterator[None]:
        try:
            yield
        except OverflowUnavailableError as error:
            self.failure = self.failure or error

    @contextlib.contextmanager
    def _without_files(self) -> Iterator[None]:
        """Go on without the files of this pass if they cannot be listed."""
        with self._past_failures():
            try:
                yield
            except OverflowUnavailableError:
                for walk in self._walks:
                    walk.lists_files = False
                raise

    def go_on(self, count: int) -> bool:
        """Ask for up to about `count` objects; return whether the pass goes on.

        An overflow that cannot be used is no failure: see `failure`.
        """
        while self._walks and count > 0:
            items: list[_Item] = []
            with self._without_files():
                items = self._walks[0].take(count)
            count -= len(items) or _COST_OF_A_NODE
            with self._past_failures():
                if items:
                    self._reclaim.ask(items)
                else:
                    self._end(self._walks.pop(0))
        return bool(self._walks)

    def _end(self, walk: _Walk) -> None:
        """Remove what the processes of a dead node were writing; and the node, if it is empty."""
        node = walk.node
        if walk.lists_files:
            self._file_bytes[node] = walk.file_bytes
        since = self._since.get(node, self._reclaim.clock())
        is_settled = self._reclaim.clock() - since >= self._reclaim.pace.settling
        if not is_settled or node in self._leased:
            return
        is_empty = walk.found == 0 and not self._file_bytes.get(node)
        # Each time: a host that stood still may go on to write.
        self._tidy(walk)
        if is_empty:
            self._reclaim.valkey.ledger.close_account(node)
            if walk.lists_files and self._reclaim.overflow is not None:
                self._reclaim.overflow.overflow.remove_if_empty(node)
                self._file_bytes.pop(node, None)

    def _tidy(self, walk: _Walk) -> None:
        node = walk.node
        ledger = self._reclaim.valkey.ledger
        # The removal opens all connections anew, and asks whoever knows the primary.
        if any(ledger.pending(node)):
            self._reclaim.valkey.remove_half_written(node)
        ledger.release_all(node)
        if self._reclaim.overflow is not None and walk.lists_files:
            self._reclaim.overflow.remove_parts(node, lambda pid: False)


class Reclaimer:
    """The part of a node in reclaiming what its session has left. For one thread.

    Which node asks for the objects of dead nodes needs neither a lock nor a clock that others
    share: of those that are alive according to the GCS and have renewed their leases, it is the one
    that started first, by the GCS's clock. So it stays the same while new nodes come and go. While
    two nodes disagree, both ask, and removals are safe to repeat. The higher a node is in that
    order, the more rarely it checks, so that all nodes of a large session together check about as
    often as a few. Now and then the second and the third node make a pass too: a lease is renewed
    by whatever can, also where no owner can be asked.

    Args:
        reclaim: asks and removes.
        node: this node.

    Attributes:
        of_dead_nodes: bytes that dead nodes have stored, if this node asks for them, else None.
    """

    def __init__(self, reclaim: Reclaim, node: NodeName) -> None:
        self.of_dead_nodes: int | None = None
        self._reclaim = reclaim
        self._node = node
        self._dead = DeadNodes(reclaim, node.session)
        self._own: _Walk | None = None
        self._next = self._own_next = self._dead_next = self._listed = float("-inf")
        self._is_in_pass = self._stands_in = False
        self._passed = reclaim.clock()
        self._seconds = 0.0  # of this pass over the objects of dead nodes, of a core

    def step(self) -> None:
        """Ask for a slice, unless the last one that worked is too young.

        A failure in one part does not hold up the others.

        Raises:
            ServerError, OverflowUnavailableError: the next step continues.
        """
        now = self._reclaim.clock()
        if now < self._next:
            return
        with Failures() as failures:
            for part in (self._reclaim.confirm, self._ask_own, self._ask_of_dead):
                with failures.kept():
                    part()
        self._next = now + self._reclaim.pace.between_slices

    def _ask_own(self) -> None:
        now, pace = self._reclaim.clock(), self._reclaim.pace
        if self._own is None:
            if now < self._own_next:
                return
            lists_files = now - self._listed >= pace.listing
            self._listed = now if lists_files else self._listed
            self._own = _Walk(self._reclaim, self._node, lists_files=lists_files)
        items = self._own.take(pace.own)
        if not items:
            self._own, self._own_next = None, now + pace.pause
        # By the clock with which this node has named them.
        latest = time.time() - pace.age
        self._reclaim.ask([item for item in items if item.place.name.time <= latest])

    def _ask_of_dead(self) -> None:
        now, pace = self._reclaim.clock(), self._reclaim.pace
        if not self._is_in_pass:
            if now < self._dead_next:
                return
            self._dead_next = now + pace.pause
            nodes = self._reclaim.owners.nodes()
            before = self._before(nodes or {})
            if nodes is None or before is None:
                self.of_dead_nodes = None
                return
            if before:
                self._dead_next = now + min(pace.pause * before, _LONGEST_REST)
            self._stands_in = before > 0
            if before > _STAND_INS or now - self._passed < _STAND_IN * before:
                self.of_dead_nodes = None
                return
            if not self._dead.begin():
                return
            self._seconds = 0.0
            self._is_in_pass = True
        started = time.thread_time()
        self._is_in_pass = self._dead.go_on(pace.of_dead)
        self._seconds += time.thread_time() - started
        self.of_dead_nodes = self._dead.stored
        if not self._is_in_pass:
            if self._stands_in:
                self.of_dead_nodes = None
            self._passed = self._reclaim.clock()
            self._dead_next = now + max(pace.pause, pace.share * self._seconds)
            if self._dead.failure is not None:
                raise self._dead.failure

    def _before(self, nodes: Mapping[str, bool]) -> int | None:
        """Return how many nodes come before this one; None if it is not alive itself."""
        if not nodes.get(self._node.node):
            return None
        earlier = {*takewhile(lambda node: node != self._node.node, nodes)}
        ledger = self._reclaim.valkey.ledger
        since = ledger.time() - 1000 * LEASE
        return len(
            {
                lease.node_name.node
                for lease in ledger.leases()
                if lease.node_name.session == self._node.session
                and lease.node_name.node in earlier
                and nodes[lease.node_name.node]
                and lease.renewed >= since
            }
        )


def reclaim_of_dead_nodes(
    config: Config,
    session: str,
    owners: Owners,
    observer: Observer,
    pace: Pace = USUAL_PACE,
    sleep: Callable[[float], None] = time.sleep,
) -> Left | None:
    """Remove what the dead nodes of a running session have left and nobody needs.

    Passes over it until one removes nothing more.

    Args:
        config: server, namespace and overflow.
        session: name of the session.
        owners: of the session.
        observer: is notified of what was removed.
        pace: how long to wait for the second answers.
        sleep: waits for so many seconds.

    Returns:
        What stays; None if it is not known which nodes are dead.

    Raises:
        ServerError: something may be left.
    """
    keys = Keyspace.of(config)
    overflow = OverflowTier.of(config)
    with contextlib.ExitStack() as stack:
        valkey = ValkeyTier(link_to(config), keys)
        stack.callback(valkey.close)
        if overflow is not None:
            stack.callback(overflow.close)
        shared, tiers = tiers_of(NodeName(session, ""), valkey, overflow)
        # Whoever calls this has watched leases, so that processes of dead nodes have had time.
        settled = replace(pace, settling=0.0, listing_of_dead=0.0)
        ring = KeyRing.of(config)
        reclaim = Reclaim(
            valkey, shared, tiers, keys, ring, owners, observer, settled, time.monotonic
        )
        dead = DeadNodes(reclaim, session)
        failure: OverflowUnavailableError | None = None
        for number in range(_MOST_PASSES):
            removed = reclaim.removed
            reclaim.asked.clear()
            if not dead.begin():
                return None
            while dead.go_on(pace.of_dead):
                pass
            failure = _confirm_all(reclaim, sleep) or dead.failure
            # The second pass also removes the nodes that are empty by then.
            if number and reclaim.removed == removed:
                break
        asked = reclaim.asked
        # Of those that were unreferenced at first, what is no suspect any more is referenced now.
        now_referenced = max(0, asked[Verdict.UNREFERENCED] - reclaim.suspects)
        unknown = asked[Verdict.UNKNOWN] + asked[None] + reclaim.suspects
        return Left(asked[Verdict.REFERENCED] + now_referenced, unknown, failure)


def _confirm_all(
    reclaim: Reclaim, sleep: Callable[[float], None]
) -> OverflowUnavailableError | None:
    """Ask for all suspects again, until those that are left have owners who do not answer.

    Returns the first failure of the overflow, if there was one.
    """
    failure: OverflowUnavailableError | None = None
    left = 0
    while reclaim.suspects not in (0, left):
        left = reclaim.suspects
        sleep(reclaim.pace.confirmation)
        is_more = True
        while is_more:
            try:
                is_more = reclaim.confirm()
            except OverflowUnavailableError as error:
                failure = failure or error
                break
    return failure
