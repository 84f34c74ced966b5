"""The object store: puts, fetches and deletes a node's objects in both tiers. Knows no Ray.

Objects that Valkey has no room for are put into the overflow. `store.node` removes the leftovers of
operations that an unavailable server or a killed process has cut short. `format.packing` cuts,
compresses and seals objects.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    ServerFullError,
    SpillError,
    UnconfirmedError,
)
from ray_valkey_spill.format.codec import checksum
from ray_valkey_spill.format.header import Header, decode_header, key_id
from ray_valkey_spill.format.names import (
    Entry,
    Keyspace,
    NodeName,
    ObjectName,
    Place,
    TierName,
    new_attempt,
)
from ray_valkey_spill.format.packing import Packer, Receive, SourceObject, unpack_chunk
from ray_valkey_spill.format.sealing import Key, KeyRing
from ray_valkey_spill.protocol.link import USUAL_SHARING, Sharing
from ray_valkey_spill.store.lease import NodeLease
from ray_valkey_spill.store.observer import Loss, Observer
from ray_valkey_spill.store.spill import Batch
from ray_valkey_spill.store.under_way import UNDER_WAY
from ray_valkey_spill.tiers.base import Stat, Tier
from ray_valkey_spill.tiers.budget import Budget, Payments
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.overflow_place import MissingOverflow, SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = [
    "FAILURES_IN_A_ROW",
    "Failures",
    "ObjectStore",
    "StoredObject",
    "node_name",
    "problems",
    "remove_from",
    "tiers_of",
]


# Files in a row that the overflow may fail to read or remove before the others are left, too.
FAILURES_IN_A_ROW = 3

_NOT_OF_A_COMPONENT = re.compile(r"[^A-Za-z0-9_-]")


class StoredObject(NamedTuple):
    """An object that was found, and checked as far as possible without its chunks.

    Attributes:
        place: place of the object.
        header: header of the object.
        payload: payload of an inline object, else empty.
        seconds: time that it took to find it.
    """

    place: Place
    header: Header
    payload: memoryview
    seconds: float = 0.0


class _Lost(NamedTuple):
    """An object that is lost, with the reason."""

    error: LostObjectError
    reason: Loss
    tier: TierName


class Failures:
    """Collects the errors of several attempts. The end of its `with` raises the first one.

    Args:
        kind: the errors to collect; others are raised at once.
        in_a_row: number of failed attempts in a row of which the last one is raised at once.
    """

    def __init__(self, kind: type[SpillError] = SpillError, in_a_row: float = math.inf) -> None:
        self._kind = kind
        self._most_in_a_row = in_a_row
        self._in_a_row = 0
        self._first: SpillError | None = None

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised == (None, None, None) and self._first is not None:
            raise self._first

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except self._kind as error:
            self._first = self._first or error
            self._in_a_row += 1
            if self._in_a_row >= self._most_in_a_row:
                raise
        else:
            self._in_a_row = 0


class ObjectStore:
    """Objects of one node of one Ray session, for the main thread of an IO worker.

    Not thread-safe, except for `close_idle` and `close_unused`. Connects on first use. `Node` is
    the background half.

    Args:
        config: server, key prefix, chunk size, compression and limits.
        session, node: node of the objects that this store puts.
        observer: is notified of finished operations, losses and waits.
        sharing: when connections are given up.
        overflow: that of another store of the process, if any: it is used, and not closed.

    Attributes:
        keys: the names of its objects, on the server and in urls.
        link: the connections.
        packer: compresses, seals and checks chunks.
        valkey, overflow: the tiers. The latter is None without an `overflow_uri`.
    """

    def __init__(
        self,
        config: Config,
        session: str,
        node: str,
        observer: Observer | None = None,
        sharing: Sharing = USUAL_SHARING,
        *,
        overflow: OverflowTier | None = None,
    ) -> None:
        self.keys = Keyspace.of(config)
        self.node = node_name(session, node)
        self._observer = observer or Observer()
        self.packer = Packer(config, self.keys)
        self._key_ring = KeyRing.of(config)
        self.link = link_to(config, sharing=sharing, waiting=self._observer.waiting)
        self.valkey = ValkeyTier(self.link, self.keys)
        self._lease = NodeLease(self.node, self.valkey.ledger)
        self._has_own_overflow = overflow is None
        self.overflow = OverflowTier.of(config) if overflow is None else overflow
        self._overflow, self._tiers = tiers_of(self.node, self.valkey, self.overflow)
        self._writer = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._budget = self._new_budget(config)
        UNDER_WAY.add(self._writer, self._budget)
        self._failure: SpillError | None = None

    def _new_budget(self, config: Config) -> Budget:
        advice = "or wait until references are dropped" + (
            "" if config.overflow_uri else ", or give an overflow_uri"
        )
        return Budget(
            self.link, self.valkey.ledger, self.node, self._writer, config.max_bytes, advice
        )

    def close(self) -> None:
        """Close the connections and end the threads; the next operation opens new ones."""
        self.valkey.close()
        self.packer.close()
        if self.overflow is not None and self._has_own_overflow:
            self.overflow.close()

    def close_idle(self) -> None:
        """Close connections that were not used for a minute. Thread-safe."""
        self.link.close_idle()

    def close_unused(self) -> None:
        """Close connections that no operation uses now. Thread-safe."""
        self.link.close_unused()

    @property
    def breaks(self) -> int:
        """Number of times that a connection broke or could not be opened."""
        return self.link.breaks

    @contextlib.contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """Limit the retries of operations that begin within to `seconds`."""
        with self.link.hurried(seconds):
            yield

    def begin_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """Take the node's lease before the first `put`, because no IO worker may have done so yet.

        Args:
            gcs_address: as for `NodeLease.renew`.
            is_destroyed: likewise.
        """
        if not self._lease.is_held:
            self._lease.renew(gcs_address, is_destroyed)

    def give_back(self) -> None:
        """Release what this store is granted for its next objects. Errors as `link.Link.run`."""
        self._budget.give_back(self.valkey.ledger, idle=0.0)

    # --- put ---

    def put(self, sources: Sequence[SourceObject]) -> tuple[list[str], SpillError | None]:
        """Put objects.

        Returns:
            The URLs of the objects that were put, a prefix of `sources`; and the error that stopped
            the rest, or None. Nothing is left of the rest, unless the server cannot be reached or
            refuses to remove it: then `Node.recover` removes it. Once thousands of objects have
            failed so, nothing more is put until it has.
        """
        if UNDER_WAY.has_left_much and self._failure is not None:
            return [], self._failure
        urls, self._failure = self._put(sources)
        return urls, self._failure

    def _put(self, sources: Sequence[SourceObject]) -> tuple[list[str], SpillError | None]:
        try:
            key = self._key_ring.current()[0] if self._key_ring is not None else None
        except ConfigError as error:
            return [], _without_frames(error)
        sealed = None if key is None else key.id
        started = time.perf_counter()
        with self.valkey.operation():
            stored, failure = self._put_in_valkey(sources, key)
            if isinstance(failure, UnconfirmedError):
                stored, failure = self._put_in_valkey(sources, key)
        self._notify_put("valkey", stored, started)
        places = [Place(entry.name, entry.size, "valkey", sealed) for entry in stored]
        if self._overflow is not None and isinstance(failure, ServerFullError):
            rest, started = sources[len(stored) :], time.perf_counter()
            stored, failure = self._put_in_overflow(self._overflow, rest, key)
            self._notify_put("overflow", stored, started)
            places += [Place(entry.name, entry.size, "overflow", sealed) for entry in stored]
        return [self.keys.url(place) for place in places], failure

    def _put_in_valkey(
        self, sources: Sequence[SourceObject], key: Key | None
    ) -> tuple[list[Entry], SpillError | None]:
        names = self._new_names(sources)
        size = sum(len(source.data) for source in sources)
        with (
            contextlib.closing(self.packer.pack(zip(sources, names), key)) as values,
            Batch(self.valkey, self._budget, self.node, names, size) as batch,
        ):
            batch.write(Payments(self._budget, values))
            batch.commit()
        return batch.stored, _without_frames(batch.failure)

    def _put_in_overflow(
        self, overflow: SharedOverflow, sources: Sequence[SourceObject], key: Key | None
    ) -> tuple[list[Entry], SpillError | None]:
        names = self._new_names(sources)
        stored: list[Entry] = []
        try:
            with contextlib.closing(self.packer.pack(zip(sources, names), key)) as values:
                for entry in overflow.write(values):
                    stored.append(entry)
        except SpillError as error:
            return stored, _without_frames(error)
        return stored, None

    def _new_names(self, sources: Sequence[SourceObject]) -> list[ObjectName]:
        return [
            ObjectName(
                *self.node,
                _component(source.object_id),
                new_attempt(),
                self.packer.chunk_count(len(source.data)),
            )
            for source in sources
        ]

    def _notify_put(self, tier: TierName, stored: Sequence[Entry], started: float) -> None:
        if stored:
            logical = sum(entry.size for entry in stored)
            counted = sum(entry.stored for entry in stored)
            seconds = time.perf_counter() - started
            self._observer.done("spill", tier, len(stored), logical, counted, seconds)

    # --- fetch ---

    def find(self, url: str, object_id: str) -> StoredObject:
        """Look up an object, and check it as far as possible without its chunks.

        Then call `fill` to receive the chunks, or `leave` to drop those under way.

        Raises:
            LostObjectError: the object is gone, damaged, in a newer format, or another one; or it
                is not sealed although this node has an encryption_key_file.
            ConfigError: it is sealed with a key that this node does not have (yet).
        """
        (found,) = self._find_page([(self._locate(url), object_id)])
        if isinstance(found, LostObjectError):
            raise found
        return found

    def find_all(
        self, wanted: Iterable[tuple[str, str]]
    ) -> Iterator[StoredObject | LostObjectError]:
        """Look up objects by URL and id, as `find`; yields a LostObjectError instead of raising it.

        Fill each object before you take the next one, or not at all. Inline objects come with their
        headers, and are received while earlier ones are used.
        """
        located = ((self._locate(url), object_id) for url, object_id in wanted)
        for inline, group in groupby(located, key=_is_inline):
            together = list(group)
            for page in [together] if inline else [[each] for each in together]:
                yield from self._find_page(page)

    def _locate(self, url: str) -> Place | LostObjectError:
        try:
            return self.keys.parse_url(url)
        except LostObjectError as error:
            return error

    def _find_page(
        self, page: Sequence[tuple[Place | LostObjectError, str]]
    ) -> Iterator[StoredObject | LostObjectError]:
        """Look up objects of one tier."""
        started = time.perf_counter()
        places = [place for place, _ in page if isinstance(place, Place)]
        stats = self._tiers[places[0].tier].stat(places) if places else iter(())
        for place, object_id in page:
            found = (
                _Lost(place, "foreign", "valkey")
                if isinstance(place, LostObjectError)
                else self._checked(place, object_id, next(stats), started)
            )
            if isinstance(found, _Lost):
                self._observer.lost(found.reason, found.tier)
                yield found.error
            else:
                yield found
            started = time.perf_counter()

    def _checked(
        self, place: Place, object_id: str, stat: Stat, started: float
    ) -> StoredObject | _Lost:
        try:
            if stat.header is None:
                raise LostObjectError("its header is gone")
            if key_id(stat.header) != place.key_id:
                raise LostObjectError("its header is not sealed with the key that it was put with")
            key = "" if self._key_ring is None else self.keys.header(place.name)
            header, payload = decode_header(stat.header, key, self._key_ring)
            for problem in problems(place.name, object_id, header, payload, stat, [place.size]):
                raise LostObjectError(problem)
        except LostObjectError as error:
            self._tiers[place.tier].close_reading()
            return _Lost(self._lost(place, error), _loss(stat), place.tier)
        except ConfigError:
            self._tiers[place.tier].close_reading()
            raise
        return StoredObject(place, header, payload, time.perf_counter() - started)

    def fill(self, found: StoredObject, target: memoryview) -> None:
        """Receive the object's data into `target`, which has exactly its size.

        If this raises, the content of `target` is undefined.

        Raises:
            LostObjectError: a chunk is missing or damaged, also when read a second time.
            ServerError, OverflowUnavailableError: as `link.Link.run`, and as `Tier.read`.
        """
        header, started = found.header, time.perf_counter()
        try:
            if header.inline:
                unpack_chunk(header.chunks[0], found.payload, target)
            else:
                self._fill_checked(found, target)
        except LostObjectError as error:
            raise self._lost(found.place, error) from error
        seconds = found.seconds + time.perf_counter() - started
        self._observer.done(
            "restore", found.place.tier, 1, header.size, header.stored_size, seconds
        )

    def leave(self, found: StoredObject) -> None:
        """Do not receive an object that was found, or no more of it."""
        self._tiers[found.place.tier].close_reading()

    def _fill_checked(self, found: StoredObject, target: memoryview) -> None:
        header = found.header
        tier = self._tiers[found.place.tier]
        sizes = [chunk.stored_size for chunk in header.chunks]
        numbers: Sequence[int] = range(len(header.chunks))

        def unpack(receive: Receive) -> Sequence[int]:
            return self.packer.unpack(header, target, numbers, receive)

        numbers = tier.read(found.place, sizes, unpack)
        if numbers:
            # Read them once more: a bit may have flipped on the way here.
            numbers = tier.read(found.place, sizes, unpack)
        if numbers:
            raise LostObjectError(
                f"chunk {numbers[0]} of {len(header.chunks)} is damaged "
                f"({'wrong checksum' if header.seal is None else 'broken seal'})"
            )

    # --- delete ---

    def delete(self, urls: Iterable[str]) -> list[str]:
        """Delete objects; a missing object is not an error.

        Returns:
            The URLs that are not of this package and namespace.

        Raises:
            ServerError, OverflowUnavailableError: some objects may be left.
        """
        places, foreign = [], []
        for url in urls:
            try:
                places.append(self.keys.parse_url(url))
            except LostObjectError:
                foreign.append(url)
        remove_from(self._tiers, places, self._observer)
        return foreign

    def mark_lost(self, found: StoredObject) -> None:
        """Make every later `find` of a damaged object fail at once."""
        self._tiers[found.place.tier].mark_lost(found.place)

    # --- helpers ---

    def _lost(self, place: Place, error: LostObjectError) -> LostObjectError:
        where = self.keys.url(place).partition("?")[0]
        return LostObjectError(
            f"object {place.name.object_id}, spilled as {where}, is lost: {error}"
        )


def node_name(session: str, node: str) -> NodeName:
    """Return the name of a session's node in keys."""
    return NodeName(_component(session), _component(node))


def tiers_of(
    node: NodeName, valkey: ValkeyTier, overflow: OverflowTier | None
) -> tuple[SharedOverflow | None, dict[TierName, Tier]]:
    """Return what one thread of a node sees of the session's overflow, if any, and all tiers.

    Args:
        node: the node.
        valkey: of the thread.
        overflow: of the process; None if there is none.
    """
    shared = None if overflow is None else SharedOverflow(overflow, node.session, valkey.ledger)
    return shared, {"valkey": valkey, "overflow": shared or MissingOverflow()}


def remove_from(
    tiers: dict[TierName, Tier],
    places: Sequence[Place],
    observer: Observer,
    *,
    stepwise: bool = False,
) -> None:
    """Delete objects. A failure of one tier does not hold up the others.

    The observer is notified only if no tier failed, because a failed deletion is repeated as a
    whole.

    Args:
        tiers: by name.
        places: the objects.
        observer: is notified of deletions.
        stepwise: see `ValkeyTier.remove_objects`.

    Raises:
        ServerError, OverflowUnavailableError: some objects may be left.
    """
    removals = []
    with Failures() as failures:
        for name, tier in tiers.items():
            of_tier = [place for place in places if place.tier == name]
            if of_tier:
                started = time.perf_counter()
                with failures.kept():
                    tier.remove(of_tier, stepwise=stepwise)
                    removals.append((name, of_tier, time.perf_counter() - started))
    for name, of_tier, seconds in removals:
        size = sum(place.size for place in of_tier)
        observer.done("delete", name, len(of_tier), size, None, seconds)


def problems(
    name: ObjectName,
    object_id: str,
    header: Header,
    payload: memoryview,
    stat: Stat,
    sizes: Iterable[int],
) -> Iterator[str]:
    """Yield the problems of an object that can be found without reading its chunks.

    Args:
        name: name of the attempt.
        object_id: id of the expected object.
        header: the decoded header.
        payload: payload of an inline object, opened if it was sealed; else empty.
        stat: what the tier has of the object.
        sizes: lengths of its data according to other sources.
    """
    if header.object_id != object_id:
        yield f"its header is that of object {header.object_id:.80}"
    for size in sizes:
        if size != header.size:
            yield f"its header gives {header.size} bytes, not {size}"
    if name.chunks != (0 if header.inline else len(header.chunks)):
        yield f"its header gives {len(header.chunks)} chunks, not {name.chunks}"
    for number, (chunk, found) in enumerate(zip(header.chunks, stat.chunk_sizes)):
        if not found:
            yield f"chunk {number} of {name.chunks} is gone from the server"
        elif found != chunk.stored_size:
            yield f"chunk {number} has {found} bytes, not {chunk.stored_size}"
    if stat.payload is not None and stat.payload != (0 if header.inline else header.stored_size):
        yield f"its file has {stat.payload} bytes of chunks, not {header.stored_size}"
    sealed = header.seal is not None
    if header.inline and not sealed and checksum(payload) != header.chunks[0].checksum:
        yield "its data are damaged (wrong checksum)"


def _loss(stat: Stat) -> Loss:
    """Return why an object with this stat is lost."""
    # If only the header is gone, the object was found damaged before: see `mark_lost`.
    is_marked = stat.header is None and len(stat.chunk_sizes) > 0 and all(stat.chunk_sizes)
    return "damaged" if stat.is_whole or is_marked else "missing"


def _without_frames(failure: SpillError | None) -> SpillError | None:
    """Return `failure` without the tracebacks of it and of its causes.

    Their frames refer to the caller's memory, and to the failure in turn, so plasma would get its
    buffers back only at the next garbage collection.
    """
    error: BaseException | None = failure
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    return failure


def _is_inline(located: tuple[Place | LostObjectError, str]) -> bool:
    place, _ = located
    return isinstance(place, Place) and place.tier == "valkey" and place.name.chunks == 0


def _component(text: str) -> str:
    """Return `text` as a component of a key, without separators of keys and of Ray's URLs."""
    return _NOT_OF_A_COMPONENT.sub("_", text) or "_"
