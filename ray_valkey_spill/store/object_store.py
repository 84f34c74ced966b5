"""The object store: puts, fetches and deletes a node's objects in both tiers. Knows no Ray.

What Valkey has no room for goes to the overflow. What is cut short, by a server that is away or a
process that is killed, is made good by `ObjectStore.recover`. How objects are cut, compressed and
sealed is told in `packing`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import NamedTuple, Self, TypeGuard, TypeVar

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    OverflowUnavailableError,
    ServerFullError,
    ServerUnavailableError,
    SpillError,
    UnconfirmedError,
)
from ray_valkey_spill.format.codec import checksum
from ray_valkey_spill.format.header import Header, decode_header, key_id
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName, Owner, Place, new_attempt
from ray_valkey_spill.format.packing import (
    INLINE_LIMIT,
    Packer,
    Receive,
    SourceObject,
    Values,
    unpack_chunk,
)
from ray_valkey_spill.format.sealing import Key, KeyRing
from ray_valkey_spill.protocol.link import USUAL_SHARING, Link, Sharing
from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.store.observer import Loss, Observer, Tier
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.budget import Budget
from ray_valkey_spill.tiers.ledger import Ledger, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.overflow_place import SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = ["ObjectStore", "Room", "StoredObject", "problems"]

# What is looked up in one round trip.
_OBJECTS_PER_PAGE = 16
_DESTROY_PAUSE = 0.05
_LATE_ARRIVALS = 1.0
_RECOVERY_PATIENCE = 1.0
_ABANDONED = 10_000
_BETWEEN_RECOUNTS = 600.0

_T = TypeVar("_T")


class StoredObject(NamedTuple):
    """An object that was found, and checked as far as that goes without reading its chunks.

    `payload` is that of an inline object, else empty; `seconds` is what it took to find it.
    """

    place: Place
    header: Header
    payload: memoryview
    seconds: float = 0.0


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


class _Lost(NamedTuple):
    """Stands for an object that was not found."""

    error: LostObjectError
    reason: Loss
    tier: Tier


class _Removal(NamedTuple):
    """What was removed of a tier: how many objects, the bytes of their data, and how fast."""

    tier: Tier
    objects: int
    logical: int
    seconds: float


class _Failures:
    """What failed of several things that are tried whatever becomes of the others.

    The end of its `with` raises the first.
    """

    def __init__(self) -> None:
        self._first: SpillError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised == (None, None, None) and self._first is not None:
            raise self._first

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except SpillError as error:
            self._first = self._first or error


class ObjectStore:
    """Objects of one node of one Ray session.

    For one thread at a time, a second one for the methods that say so, such as `recover`, and a
    third one for `keep_lease`; each has a connection of its own. Connections are opened by the
    first operation.

    Args:
        config: where, under which prefix, and how chunks are cut and compressed.
        session, node: whose the objects are that this store puts.
        observer: is told of what was done.
        sharing: when connections are given back.
    """

    def __init__(
        self,
        config: Config,
        session: str,
        node: str,
        observer: Observer | None = None,
        sharing: Sharing = USUAL_SHARING,
    ) -> None:
        self.keys = Keyspace.of(config)
        self._observer = observer or Observer()
        self._owner = Owner(_component(session), _component(node))
        self._packer = Packer(config, self.keys)
        self._key_ring = KeyRing.of(config)
        # What this cannot do now in the background is done another time.
        impatient = replace(config, retry_timeout=min(config.retry_timeout, _RECOVERY_PATIENCE))
        link = link_to(config, sharing=sharing, waiting=self._observer.waiting)
        recovery_link = link_to(impatient, sharing=sharing, spare=link.close_unused)
        lease_link = link_to(impatient, sharing=sharing, spare=link.close_unused)
        self._links = link, recovery_link, lease_link
        self._tier = ValkeyTier(link, self.keys)
        self._recovery = ValkeyTier(recovery_link, self.keys)
        self._lease = ValkeyTier(lease_link, self.keys)
        self._budget = self._new_budget(config, link)
        self._max_bytes = config.max_bytes
        overflow = OverflowTier.of(config)
        self._overflow = SharedOverflow(overflow, self._owner.session) if overflow else None
        self._has_lease = self._looked_for_parts = False
        self._recount_at = self._look_at_overflow_at = float("-inf")
        self._in_overflow: int | None = None
        # What put() could not remove, for recover(). Bounded, for an outage can be long; the rest
        # stays pending, and goes once this process has ended, or with the session.
        self._abandoned: deque[ObjectName] = deque(maxlen=_ABANDONED)
        self._abandoned_grants: deque[str] = deque(maxlen=_ABANDONED)

    def _new_budget(self, config: Config, link: Link) -> Budget:
        writer = f"{self._owner}:{os.getpid()}-{os.urandom(4).hex()}"
        advice = "or wait until references go" + (
            "" if config.overflow_uri else ", or give an overflow_uri"
        )
        ledger = Ledger(link, self.keys)
        data_link, *_ = self._links
        return Budget(link, ledger, writer, config.max_bytes, advice, lambda: data_link.under_way)

    def close(self) -> None:
        """Drop the connections and the threads; the next operation gets new ones."""
        self._tier.close()
        self._recovery.close()
        self._lease.close()
        self._packer.close()
        if self._overflow is not None:
            self._overflow.close()

    def close_idle(self) -> None:
        """Give back connections that were not used for a minute. For any thread."""
        for link in self._links:
            link.close_idle()

    @property
    def has_left_some(self) -> bool:
        """Whether `recover` has something to do that a failed put has left."""
        return bool(self._abandoned)

    @property
    def breaks(self) -> int:
        """How many times a connection has broken, or could not be had."""
        return sum(link.breaks for link in self._links)

    @contextlib.contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """Let what begins meanwhile retry a server that is away for at most so many seconds."""
        link, *_ = self._links
        with link.hurried(seconds):
            yield

    # --- put ---

    def put(self, sources: Sequence[SourceObject]) -> tuple[list[str], SpillError | None]:
        """Store `sources`.

        Returns:
            The URLs of as many of them, from the first on, as are stored now; and what kept the
            rest from it, or None. Nothing is left of the rest, or `recover` will remove it: a
            server that cannot be reached cannot be cleaned up.
        """
        try:
            key = self._key_ring.current()[0] if self._key_ring is not None else None
        except ConfigError as error:
            return [], _without_frames(error)
        sealed = None if key is None else key.id
        started = time.perf_counter()
        with self._tier.operation():
            stored, failure = self._put_in_valkey(sources, key)
            if isinstance(failure, UnconfirmedError):
                stored, failure = self._put_in_valkey(sources, key)
        self._tell_of_put("valkey", stored, started)
        places = [Place(entry.name, entry.size, False, sealed) for entry in stored]
        if self._overflow is not None and isinstance(failure, ServerFullError):
            rest, started = sources[len(stored) :], time.perf_counter()
            stored, failure = self._put_in_overflow(rest, key)
            self._tell_of_put("overflow", stored, started)
            places += [Place(entry.name, entry.size, True, sealed) for entry in stored]
        return [self.keys.url(place) for place in places], failure

    def _tell_of_put(self, tier: Tier, stored: Sequence[Entry], started: float) -> None:
        if stored:
            logical = sum(entry.size for entry in stored)
            counted = sum(entry.stored for entry in stored)
            seconds = time.perf_counter() - started
            self._observer.done("spill", tier, len(stored), logical, counted, seconds)

    def _put_in_valkey(
        self, sources: Sequence[SourceObject], key: Key | None
    ) -> tuple[list[Entry], SpillError | None]:
        names = [self._new_name(source) for source in sources]
        size = sum(len(source.data) for source in sources)
        values = Values(self._packer.pack(zip(sources, names), key, self._budget))
        stored: list[Entry] = []
        failure: SpillError | None = None
        breaks = self._tier.breaks
        self._budget.expect(size)
        try:
            with contextlib.closing(values):
                if not values.begin():
                    # Where there is no room, not even a registration may be written.
                    names = []
                elif size <= INLINE_LIMIT:
                    stored += self._tier.write_at_once(self._owner, values.of_whole_objects())
                else:
                    self._tier.register(names)
                    for entry in self._tier.write(values):
                        stored.append(entry)
            failure = values.failure
        except ServerUnavailableError as error:
            self._abandon(names)
            return [], _without_frames(error)
        except SpillError as error:
            failure = self._as_unconfirmed(error, breaks)
        try:
            if self._tier.breaks != breaks:
                # The server may still carry out what it got over a connection that broke, and so
                # write what is removed here.
                time.sleep(_LATE_ARRIVALS)
            self._tier.remove(names[len(stored) :])
            if size > INLINE_LIMIT:
                self._tier.settle(self._owner, stored)
            self._tier.confirm(stored, breaks)
        except SpillError as error:
            try:
                self._tier.remove(names)
            except SpillError:
                self._abandon(names)
            return [], _without_frames(failure or self._as_unconfirmed(error, breaks))
        finally:
            # What stays granted by mistake is corrected with the next grant or release.
            with contextlib.suppress(SpillError):
                self._budget.release()
        return stored, _without_frames(failure)

    def _as_unconfirmed(self, error: SpillError, breaks: int) -> SpillError:
        """`error`; but what is lost after a failover is put again, and not the node's destruction.

        A primary that has just become one may know of no registration.
        """
        lost = isinstance(error, LostObjectError) and self._tier.breaks != breaks
        return UnconfirmedError(error.message) if lost else error

    def _abandon(self, names: Sequence[ObjectName]) -> None:
        """Leave objects to `recover`, and what was granted for them."""
        self._abandoned += names
        self._abandoned_grants += self._budget.abandon()

    def _put_in_overflow(
        self, sources: Sequence[SourceObject], key: Key | None
    ) -> tuple[list[Entry], SpillError | None]:
        names = [self._new_name(source) for source in sources]
        stored: list[Entry] = []
        try:
            with contextlib.closing(self._packer.pack(zip(sources, names), key)) as values:
                for entry in self._reachable_overflow().write(values):
                    stored.append(entry)
        except SpillError as error:
            return stored, _without_frames(error)
        return stored, None

    def _new_name(self, source: SourceObject) -> ObjectName:
        chunks = self._packer.chunk_count(len(source.data))
        return ObjectName(*self._owner, _component(source.object_id), new_attempt(), chunks)

    # --- get ---

    def find(self, url: str, object_id: str) -> StoredObject:
        """Look an object up, and check all that can be checked without reading its chunks.

        Raises:
            LostObjectError: if it is gone, damaged, of a newer format, or not the one meant; or not
                sealed, though this node has an encryption_key_file.
            ConfigError: if it is sealed with a key that this node does not have (yet).
        """
        (found,) = self.find_all([(url, object_id)])
        if isinstance(found, LostObjectError):
            raise found
        return found

    def find_all(
        self, wanted: Iterable[tuple[str, str]]
    ) -> Iterator[StoredObject | LostObjectError]:
        """Look objects up, given their URLs and ids, as `find`; what is lost is no exception here.

        Inline objects, which come with their headers, are received while earlier ones are used.
        """
        located = ((self._locate(url), object_id) for url, object_id in wanted)
        for inline, group in groupby(located, key=_is_inline):
            # What is found of the others is used to ask for chunks, over the same connection.
            size = None if inline else _OBJECTS_PER_PAGE
            while page := list(islice(group, size)):
                found = _timed(self._find_page(page))
                for each in found if inline else list(found):
                    if isinstance(each, _Lost):
                        self._observer.lost(each.reason, each.tier)
                        yield each.error
                    else:
                        yield each

    def _locate(self, url: str) -> Place | LostObjectError:
        try:
            return self.keys.parse_url(url)
        except LostObjectError as error:
            return error

    def _find_page(
        self, page: Sequence[tuple[Place | LostObjectError, str]]
    ) -> Iterator[StoredObject | _Lost]:
        places = [place for place, _ in page if _is_in_valkey(place)]
        stats = self._tier.stat([(p.name, 0 if p.name.chunks else p.size) for p in places])
        for place, object_id in page:
            if isinstance(place, LostObjectError):
                yield _Lost(place, "foreign", "valkey")
            elif place.overflow:
                yield self._checked(place, object_id, self._stat_in_overflow(place))
            else:
                yield self._checked(place, object_id, next(stats))

    def _stat_in_overflow(self, place: Place) -> Stat:
        """What is there of an object in the overflow.

        Without asking the server whether this is the session's overflow, as long as the object is
        there: nothing is lost by reading it while the server is away.
        """
        if self._overflow is not None:
            with contextlib.suppress(OverflowUnavailableError):  # once more, below
                stat = self._overflow.overflow.stat(place)
                if stat.header is not None:
                    return stat
        return self._reachable_overflow().stat(place)

    def _reachable_overflow(self, ledger: Ledger | None = None) -> OverflowTier:
        """The session's overflow; `ledger` is that of another thread, if this is called in one.

        Raises:
            OverflowUnavailableError
        """
        if self._overflow is None:
            raise OverflowUnavailableError(
                "an object was spilled to the overflow, and this node has no overflow_uri",
                "Give every node the same overflow_uri",
            )
        return self._overflow.joined(ledger or self._tier.ledger)

    def _checked(self, place: Place, object_id: str, stat: Stat) -> StoredObject | _Lost:
        try:
            if stat.header is None:
                raise LostObjectError("its header is gone")
            if key_id(stat.header) != place.key_id:
                raise LostObjectError("its header is not sealed with the key that it was put with")
            key = self.keys.header(place.name)
            header, payload = decode_header(stat.header, key, self._key_ring)
            for problem in problems(place.name, object_id, header, payload, stat, [place.size]):
                raise LostObjectError(problem)
        except LostObjectError as error:
            return _Lost(self._lost(place, error), _loss(stat), _tier_of(place))
        return StoredObject(place, header, payload)

    def fill(self, found: StoredObject, target: memoryview) -> None:
        """Receive the object's data into `target`, which has exactly its size.

        `target`'s content is undefined unless this returns.

        Raises:
            LostObjectError: if a chunk is missing or damaged, also when fetched a second time.
            ServerError, OverflowUnavailableError: as `link.Link.run`, and as the overflow tells.
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
            "restore", _tier_of(found.place), 1, header.size, header.stored_size, seconds
        )

    def _fill_checked(self, found: StoredObject, target: memoryview) -> None:
        header = found.header

        def unpack(receive: Receive) -> Sequence[int]:
            damaged = self._packer.unpack(header, target, range(len(header.chunks)), receive)
            # Once more: it may have been the way here that flipped a bit.
            return damaged and self._packer.unpack(header, target, damaged, receive)

        if found.place.overflow:
            sizes = [chunk.stored_size for chunk in header.chunks]
            assert self._overflow is not None  # where it was found
            damaged = self._overflow.overflow.read(found.place, sizes, unpack)
        else:
            damaged = unpack(functools.partial(self._tier.read, found.place.name))
        if damaged:
            raise LostObjectError(
                f"chunk {damaged[0]} of {len(header.chunks)} is damaged "
                f"({'wrong checksum' if header.seal is None else 'broken seal'})"
            )

    # --- delete ---

    def delete(self, urls: Iterable[str]) -> list[str]:
        """Remove objects; what is not there is no error.

        Returns:
            The URLs that are none of ours.

        Raises:
            ServerError, OverflowUnavailableError: some may be left.
        """
        places, foreign = self._places(urls)
        self._tell_of_removals(self._remove(self._tier, places))
        return foreign

    def _places(self, urls: Iterable[str]) -> tuple[list[Place], list[str]]:
        """The objects that `urls` name, and those of `urls` that are none of ours."""
        places, foreign = [], []
        for url in urls:
            try:
                places.append(self.keys.parse_url(url))
            except LostObjectError:
                foreign.append(url)
        return places, foreign

    def _remove(self, valkey: ValkeyTier, places: Sequence[Place]) -> list[_Removal]:
        """Remove objects of both tiers; `valkey` is that of the thread which this is called in.

        A tier that is away does not hold up the removals of the other.
        """
        in_valkey = [place for place in places if not place.overflow]
        in_overflow = [place for place in places if place.overflow]
        removals = []
        with _Failures() as failures:
            if in_valkey:
                with failures.kept():
                    started = time.perf_counter()
                    valkey.remove(place.name for place in in_valkey)
                    removals.append(_removal("valkey", in_valkey, started))
            if in_overflow:
                with failures.kept():
                    started = time.perf_counter()
                    overflow = self._reachable_overflow(valkey.ledger)
                    for place in in_overflow:
                        overflow.remove(place)
                    removals.append(_removal("overflow", in_overflow, started))
        return removals

    def _tell_of_removals(self, removals: Iterable[_Removal]) -> None:
        """Only once nothing can fail any more that would have them done again."""
        for tier, objects, logical, seconds in removals:
            self._observer.done("delete", tier, objects, logical, None, seconds)

    def mark_lost(self, found: StoredObject) -> None:
        """Let every later `find` of an object that turned out damaged fail at once."""
        if found.place.overflow:
            self._reachable_overflow().remove(found.place)
        else:
            self._tier.remove_header(found.place.name)

    def renew_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """Show that this node lives, so that nobody takes what it has stored for remains.

        This may run in another thread, as `recover`.

        Args:
            gcs_address: where to ask whether the session runs, should all its leases run out.
            is_destroyed: whether the node's data were destroyed: there is to be no lease then. That
                must be so before they are. A server may also have lost a lease with all its data.
        """
        self._renew_lease(self._recovery.ledger, gcs_address, is_destroyed)

    def keep_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """As `renew_lease`, in a third thread, however long `recover` and the like take.

        The connection is closed again: renewals by this method are rare.
        """
        try:
            self._renew_lease(self._lease.ledger, gcs_address, is_destroyed)
        finally:
            self._lease.close()

    def begin_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """As `renew_lease`, before the first `put` and in its thread: nobody may know of the node
        yet, nor where its GCS is.
        """
        if not self._has_lease:
            self._renew_lease(self._tier.ledger, gcs_address, is_destroyed)

    def _renew_lease(
        self, ledger: Ledger, gcs_address: str, is_destroyed: Callable[[], bool]
    ) -> None:
        if self._has_lease and ledger.renew(self._owner, gcs_address, new=False):
            return
        self._has_lease = not is_destroyed() and ledger.renew(self._owner, gcs_address, new=True)

    def probe_overflow(self) -> None:
        """Make sure that the overflow, if there is one, can be used.

        Raises:
            OverflowUnavailableError
        """
        if self._overflow is not None:
            self._overflow.probe()

    def join_overflow(self) -> None:
        """Make sure that this node's overflow, if it has one, is that of the whole session.

        This may run in another thread, as `recover`. The node needs a lease by then.

        Raises:
            OverflowUnavailableError: it is not, or it cannot be used.
            ServerError: the server cannot tell.
        """
        if self._overflow is not None:
            self._overflow.join(self._recovery.ledger)

    def recover(self, is_alive: Callable[[int], bool]) -> int:
        """Remove what failed puts left, and those of killed processes of this node.

        This may run in another thread, over a connection of its own. A tier that is away does not
        hold up the other.

        Args:
            is_alive: whether a process of this node, given by its id, may still be putting.

        Returns:
            How many objects were removed.

        Raises:
            ServerError, OverflowUnavailableError: what could not be removed is left for the next
                time.
        """
        count = 0
        try:
            with _Failures() as failures:
                with failures.kept():
                    count += self._recover_valkey(is_alive)
                with failures.kept():
                    self._remove_parts(is_alive)
        finally:
            self._recovery.close()
        return count

    def delete_again(self, urls: Iterable[str]) -> None:
        """Remove objects whose deletion failed, or was cut short. Errors as `delete`.

        This may run in another thread, as `recover`.
        """
        places, _ = self._places(urls)
        if not places:
            return
        if not all(place.overflow for place in places):
            time.sleep(_LATE_ARRIVALS)
        try:
            self._tell_of_removals(self._remove(self._recovery, places))
        finally:
            self._recovery.close()

    def _recover_valkey(self, is_alive: Callable[[int], bool]) -> int:
        """Remove what failed puts and those of killed processes left in Valkey."""
        # Grants first: `_abandon`, in the other thread, adds them after what was written of them.
        grants = {*_all_of(self._abandoned_grants)}
        left = _all_of(self._abandoned)
        removed, count = False, len(left)
        try:
            # Before a look at what is pending, for a grant stands for what its writer has written.
            grants |= self._grants_of_the_dead(is_alive)
            dead = self._pending_of_the_dead(is_alive)
            if dead or left:
                # The server may still have in its sockets what was sent, and carry it out later.
                time.sleep(_LATE_ARRIVALS)
            self._recovery.remove(left)
            if dead:
                # What is pending now, after its writer was seen dead, was never reported as put; at
                # first the writer may have died between that and this.
                count += self._recovery.remove_half_written(
                    self._owner, lambda name: name in dead and not is_alive(name.writer)
                )
            self._recovery.ledger.release([*grants])
            removed = True
            if time.monotonic() > self._recount_at:
                self._recovery.ledger.recount(self._owner)
                self._recount_at = time.monotonic() + _BETWEEN_RECOUNTS
        finally:
            if not removed:
                self._abandoned.extendleft(left)
                self._abandoned_grants.extendleft(grants)
        return count

    def _remove_parts(self, is_alive: Callable[[int], bool]) -> None:
        """Remove what killed processes of this node were writing to the overflow, once.

        Whose writer dies from then on, another process will be started in its place.
        """
        if self._overflow is not None and not self._looked_for_parts:
            overflow = self._reachable_overflow(self._recovery.ledger)
            overflow.remove_parts(self._owner, is_alive)
            self._looked_for_parts = True

    def _pending_of_the_dead(self, is_alive: Callable[[int], bool]) -> set[ObjectName]:
        pages = self._recovery.ledger.pending(self._owner)
        return {name for page in pages for name in page if not is_alive(name.writer)}

    def _grants_of_the_dead(self, is_alive: Callable[[int], bool]) -> set[str]:
        writers = [writer.rpartition(":") for writer in self._recovery.ledger.grants()]
        return {
            f"{owner}:{process}"
            for owner, _, process in writers
            if owner == str(self._owner) and not is_alive(int(process.partition("-")[0]))
        }

    def room(self) -> Room:
        """What the namespace and its server have used.

        This may run in another thread, as `recover`.

        Raises:
            ServerError
        """
        _, link, _ = self._links
        ledger = self._recovery.ledger
        stored = sum(usage.stored for usage in ledger.usages().values())
        granted = sum(grant.granted for grant in ledger.grants().values())
        return Room(stored + granted, self._max_bytes, max(link.memories(), key=_fullness))

    def in_overflow(self) -> int | None:
        """Bytes of this node's files in the overflow, if it has one, as of the last ten minutes.

        They have to be listed. This may run in another thread, as `recover`.

        Raises:
            OverflowUnavailableError, ServerError
        """
        if self._overflow is not None and time.monotonic() > self._look_at_overflow_at:
            overflow = self._reachable_overflow(self._recovery.ledger)
            self._in_overflow = sum(file.entry.stored for file in overflow.files(self._owner))
            self._look_at_overflow_at = time.monotonic() + _BETWEEN_RECOUNTS
        return self._in_overflow

    def destroy(self, is_alive: Callable[[int], bool], patience: float = 5.0) -> int:
        """Remove every object of this store's node and session.

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
        with _Failures() as failures:
            with failures.kept():
                count += self._destroy_in_valkey(is_alive, patience)
            if self._overflow is not None:
                with failures.kept():
                    count += self._overflow.overflow.destroy(self._owner)
                    self._overflow.leave(self._tier.ledger)
        return count

    def _destroy_in_valkey(self, is_alive: Callable[[int], bool], patience: float) -> int:
        count = 0
        deadline = time.monotonic() + patience
        while True:
            busy = False
            for names in self._tier.ledger.pending(self._owner):
                idle = [name for name in names if not is_alive(name.writer)]
                busy = busy or len(idle) < len(names)
                self._tier.remove(idle)
                count += len(idle)
            count += self._tier.remove_stored(self._owner)
            if not busy or time.monotonic() > deadline:
                break
            time.sleep(_DESTROY_PAUSE)
        self._tier.ledger.close_account(self._owner)
        return count

    # --- helpers ---

    def _lost(self, place: Place, error: LostObjectError) -> LostObjectError:
        where = self.keys.url(place).partition("?")[0]
        return LostObjectError(
            f"object {place.name.object_id}, spilled as {where}, is lost: {error}"
        )


def problems(
    name: ObjectName,
    object_id: str,
    header: Header,
    payload: memoryview,
    stat: Stat,
    sizes: Iterable[int],
) -> Iterator[str]:
    """What is wrong with an object, as far as that can be told without reading its chunks.

    Args:
        name: of the attempt.
        object_id: of the object that is meant.
        header: as decoded.
        payload: of an inline object, else empty; it has been opened if it was sealed.
        stat: what is there beside the header.
        sizes: what the length of its data is elsewhere said to be.
    """
    if header.object_id != object_id:
        yield f"its header is that of object {header.object_id}"
    for size in sizes:
        if size != header.size:
            yield f"its header tells of {header.size} bytes, not {size}"
    if name.chunks != (0 if header.inline else len(header.chunks)):
        yield f"its header tells of {len(header.chunks)} chunks, not {name.chunks}"
    for number, (chunk, found) in enumerate(zip(header.chunks, stat.chunk_sizes)):
        if not found:
            yield f"chunk {number} of {name.chunks} is gone from the server"
        elif found != chunk.stored_size:
            yield f"chunk {number} has {found} bytes, not {chunk.stored_size}"
    if stat.payload not in (None, 0 if header.inline else header.stored_size):
        yield f"its file has {stat.payload} bytes of chunks, not {header.stored_size}"
    sealed = header.seal is not None
    if header.inline and not sealed and checksum(payload) != header.chunks[0].checksum:
        yield "its data are damaged (wrong checksum)"


def _removal(tier: Tier, places: Sequence[Place], started: float) -> _Removal:
    size = sum(place.size for place in places)
    return _Removal(tier, len(places), size, time.perf_counter() - started)


def _timed(found: Iterable[StoredObject | _Lost]) -> Iterator[StoredObject | _Lost]:
    """`found`, with what each took to be found after the one before."""
    started = time.perf_counter()
    for each in found:
        if isinstance(each, StoredObject):
            each = StoredObject(*each[:3], time.perf_counter() - started)
        yield each
        started = time.perf_counter()


def _loss(stat: Stat) -> Loss:
    """Why an object is lost of which this was found."""
    # Whose header alone is gone turned out damaged when it was read: see `mark_lost`.
    is_marked = stat.header is None and len(stat.chunk_sizes) > 0 and all(stat.chunk_sizes)
    return "damaged" if stat.is_whole or is_marked else "missing"


def _tier_of(place: Place) -> Tier:
    return "overflow" if place.overflow else "valkey"


def _fullness(memory: MemoryInfo) -> float:
    return memory.used / memory.maxmemory if memory.maxmemory else 0.0


def _without_frames(failure: SpillError | None) -> SpillError | None:
    """`failure`, and what led to it, without the frames that were left by it.

    These refer to the caller's memory, and to the failure in turn, so that plasma would have its
    buffers back only at the next garbage collection.
    """
    error: BaseException | None = failure
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    return failure


def _all_of(items: deque[_T]) -> list[_T]:
    """Take all there is, while another thread may add to it."""
    return [items.popleft() for _ in range(len(items))]


def _is_in_valkey(place: Place | LostObjectError) -> TypeGuard[Place]:
    return isinstance(place, Place) and not place.overflow


def _is_inline(located: tuple[Place | LostObjectError, str]) -> bool:
    place, _ = located
    return _is_in_valkey(place) and place.name.chunks == 0


def _component(text: str) -> str:
    """`text` as a component of a key, without our separators and those of Ray's URLs."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text) or "_"
