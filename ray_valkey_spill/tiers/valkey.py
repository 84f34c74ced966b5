"""The tier in Valkey: values under keys, and the metadata by which they are found.

Invariant: an object is in the metadata before its first value is written, and until its last one is
removed, so that the leftovers of a crash can be found.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import TypeVar

from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    NotValkeyError,
    SpillError,
    UnconfirmedError,
)
from ray_valkey_spill.format.codec import copy_into
from ray_valkey_spill.format.header import (
    TRAILER_SIZE,
    decode_header,
    header_size,
    largest_header,
)
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName, Place
from ray_valkey_spill.format.packing import INLINE_LIMIT, Receive
from ray_valkey_spill.format.sealing import TAG_SIZE, KeyRing
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import Request, command, fetch, store
from ray_valkey_spill.tiers import scripts
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.budget import Budget, Payments
from ray_valkey_spill.tiers.ledger import Ledger, pages
from ray_valkey_spill.tiers.room import cost, member_cost
from ray_valkey_spill.units import MIB

__all__ = ["ValkeyTier"]

_NAMES_PER_PAGE = 500
# Limit of one script, during which the server serves nobody else.
_KEYS_PER_CHECK = 500
# Objects to look up again together once something was missing.
_OBJECTS_LOOKED_AT_AGAIN = 16
_READINGS = 5
# Bytes after which a spill waits for the replicas that it has to reach. A server drops a replica
# that lags by too many (`client-output-buffer-limit replica`, by default 64 MiB for a minute).
_BETWEEN_WAITS = 32 * MIB
# Integers in the reply to a settlement.
_SETTLED = 3
# Bytes that hold the header of all but the largest objects.
_START_OF_HEADER = 2048
# Reply of `scripts.SIZES`.
_PAGE_OF_SIZES = re.compile(rb"[0-9]{1,10}( [0-9]{1,10})*")

_Wanted = Iterable[tuple[int, memoryview]]
_T = TypeVar("_T")


class ValkeyTier:
    """A `Tier` in one Valkey. Errors are those of `link.Link.run` and of the commands."""

    def __init__(self, link: Link, keyspace: Keyspace) -> None:
        self._link = link
        self._keys = keyspace
        self._reading: _Reading | None = None
        # Whether what looks like one server is a proxy before several.
        self._is_sharded = False
        self.ledger = Ledger(link, keyspace)

    @property
    def breaks(self) -> int:
        """Number of times that a connection broke: see `link.Link`."""
        return self._link.breaks

    def operation(self) -> AbstractContextManager[None]:
        """See `link.Link.operation`. A write and its confirmation must be in the same one."""
        self.close_reading()
        return self._link.operation()

    def close(self) -> None:
        """Close the connections."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.abort()
        self._link.close()

    # --- writing ---

    def write(
        self, node: NodeName, names: Sequence[ObjectName], values: Payments, budget: Budget
    ) -> Iterator[Entry]:
        """Register, write and settle objects, and yield each once its values are written.

        All that was yielded is settled once this has ended without an error, unless the values
        ended half way through an object. To one server this is one exchange, and the server itself
        settles no object of which it has not taken a value; to a cluster it is three.

        Args:
            node: of the objects.
            names: of all that may be written; nothing of them is written before they are pending.
            values: of objects, in the order of `names`. What they leave out stays pending. If they
                end half way through an object, nothing is settled: until its values are removed,
                the grant has to stand for them.
            budget: between its `begin` and `end`.

        Raises:
            LostObjectError: a written object is no longer pending: the node's data were destroyed
                meanwhile, or the server lost it.
            ServerError: of the first command that failed, also of a look at the room.
        """
        under_way: deque[Entry | None] = deque()
        settlements: list[Request] = []
        written: list[Entry] = []

        def registrations() -> Iterator[Request]:
            for request in self.ledger.registrations(names):
                under_way.append(None)
                yield request

        def waits() -> Iterator[Request]:
            for request in self._link.replica_requests():
                under_way.append(None)
                yield request

        def requests() -> Iterator[Request]:
            breaks = self._link.breaks
            yield from registrations()
            has_replicas = self._link.min_replicas > 0
            is_first, unheard, has_waited = True, 0, False
            for value, entry in values:
                if self._link.breaks != breaks:
                    # The server that now takes the values may have lost what was registered.
                    breaks, is_first = self._link.breaks, True
                    yield from registrations()
                request = store(value.key, value.parts)
                request.fenced, is_first = is_first, False
                # A server reads on while it waits, and does nothing.
                request.guarded, has_waited = has_waited, False
                under_way.append(entry)
                if entry is not None:
                    written.append(entry)
                yield request
                unheard += value.length if has_replicas else 0
                if unheard >= _BETWEEN_WAITS:
                    unheard, has_waited = 0, True
                    yield from waits()
                for look in budget.looks():
                    under_way.append(None)
                    yield look
            if values.is_half_way:
                return
            verify = self._can_verify(written)
            for request in budget.settlements(written, verify=verify):
                request.fenced = not settlements
                request.guarded = not settlements and not verify
                settlements.append(request)
                under_way.append(None)
                yield request
            for look in budget.looks():
                under_way.append(None)
                yield look

        for request in self._run_to_failure(requests()):
            entry = under_way.popleft()
            if request in settlements and _is_across_shards(request):
                # Nothing failed before it, so all values are there.
                self._is_sharded = True
                self.settle(node, written, budget)
                return
            if not budget.hear(request):
                request.result()
            if entry is not None:
                yield entry
        if not values.is_half_way:
            _require_settled(settlements, written, budget)

    def settle(
        self, node: NodeName, entries: Sequence[Entry], budget: Budget, *, keep: bool = True
    ) -> None:
        """Settle objects with all their values, after a `write` that failed later.

        Raises:
            LostObjectError: as `write`; also because the server has lost a value since.
        """
        settlements = []
        verify = self._can_verify(entries)
        for request in self._link.run(budget.settlements(entries, verify=verify, keep=keep)):
            request.result()
            settlements.append(request)
        _require_settled(settlements, entries, budget)

    def _can_verify(self, entries: Iterable[Entry]) -> bool:
        """Whether the server itself can make sure that it has all values that it settles."""
        return self._is_one_server and all(self.ledger.can_verify(each.name) for each in entries)

    @property
    def _is_one_server(self) -> bool:
        """Whether one script may use all keys, as far as is known."""
        return self._link.is_single and not self._is_sharded

    def confirm(self, node: NodeName, entries: Sequence[Entry], breaks: int) -> None:
        """Make sure that written objects still exist, and on as many replicas as configured.

        A server that restarts or fails over may lose acknowledged writes.

        Args:
            node: node of the objects.
            entries: the objects.
            breaks: value of `self.breaks` before they were written.

        Raises:
            UnconfirmedError: they do not.
            ServerUnavailableError: replicas have not confirmed them in time.
        """
        self._link.await_replicas(breaks)
        latest = self._link.breaks
        if latest == breaks or not entries:
            return
        are_whole = not self._incomplete([entry.name for entry in entries])
        # An object that fell back to pending would be removed once this process has ended.
        settlements = list(self._link.run(self.ledger.settlements(node, entries)))
        settled = sum(request.integers(_SETTLED)[0] for request in settlements)
        if not are_whole or settled != len(entries) or self._link.breaks != latest:
            raise UnconfirmedError("the server lost values that had just been written to it")

    # --- reading ---

    def stat(self, places: Sequence[Place]) -> Iterator[Stat]:
        """As `Tier.stat`. A missing value was looked for again through `link.Link.confirmed`.

        For a single object with chunks, this requests the first chunks together with the header:
        `read` receives them.
        """
        self.close_reading()
        if len(places) == 1 and places[0].name.chunks:
            reading = _Reading(self._link, self._keys, places[0], self._is_one_server)
            stat = reading.stat()
            if stat.is_whole:
                self._reading = reading
                return iter((stat,))
            reading.finish()
            self._is_sharded = self._is_sharded or reading.is_sharded
        return self.measure(
            [(place.name, 0 if place.name.chunks else place.size) for place in places]
        )

    def measure(self, wanted: Sequence[tuple[ObjectName, int]]) -> Iterator[Stat]:
        """As `stat`, without reading ahead. `wanted` has names and approximate header lengths."""
        done = 0
        while done < len(wanted):
            for stat in self._stat(wanted[done:]):
                if not stat.is_whole:
                    break
                done += 1
                yield stat
            else:
                return
            again = wanted[done : done + _OBJECTS_LOOKED_AT_AGAIN]
            done += len(again)
            yield from self._link.confirmed(
                lambda: list(self._stat(again)),  # noqa: B023
                lacks_nothing=lambda stats: all(stat.is_whole for stat in stats),
            )

    def entry(self, name: ObjectName, stat: Stat, keys: KeyRing | None) -> Entry:
        """Return the entry of an object that was found by its name alone.

        Args:
            name: the object.
            stat: what there is of it.
            keys: as for `decode_header`. If they lack its key, what is stored counts as its size.

        Raises:
            LostObjectError: it is damaged, or not whole.
        """
        if stat.header is None or not stat.is_whole:
            raise LostObjectError("not all of its values are there")
        key = self._keys.header(name)
        lengths = [len(stat.header), *stat.chunk_sizes]
        size = sum(lengths)
        with contextlib.suppress(ConfigError):
            size = decode_header(stat.header, key, keys)[0].size
        stored = sum(
            cost(len(key), length) for key, length in zip(self._keys.values(name), lengths)
        )
        return Entry(name, size, stored + member_cost(len(str(name))))

    def without_values(self, names: Sequence[ObjectName]) -> list[ObjectName]:
        """Return the objects that have no value, through `link.Link.confirmed`, without waiting."""
        with self._link.hurried(0.0):
            without_header = [name for name, found in self._found(names, most=1) if not any(found)]
            if not without_header:
                return []
            return self._link.confirmed(
                lambda: [name for name, found in self._found(without_header) if not any(found)]
            )

    def _incomplete(self, names: Sequence[ObjectName]) -> list[ObjectName]:
        """Return the objects that lack a value, through `link.Link.confirmed`."""

        def look(names: Sequence[ObjectName]) -> list[ObjectName]:
            return [name for name, found in self._found(names) if not all(found)]

        missing = look(names)
        if not missing:
            return []
        return self._link.confirmed(lambda: look(missing), lacks_nothing=lambda found: not found)

    def _found(
        self, names: Sequence[ObjectName], most: int | None = None
    ) -> Iterator[tuple[ObjectName, list[int]]]:
        """Yield each object with whether its values, or the first `most` of them, are there."""
        keys = [[*islice(self._keys.values(name), most)] for name in names]
        replies = self._link.run(command("EXISTS", key) for key in chain.from_iterable(keys))
        for name, each in zip(names, keys):
            yield name, [next(replies).result() for _ in each]

    def _stat(self, wanted: Sequence[tuple[ObjectName, int]]) -> Iterator[Stat]:
        def requests() -> Iterator[Request]:
            for name, expected in wanted:
                keys = self._keys.values(name)
                yield fetch(next(keys), expected=expected, most=_longest_header(name))
                for key in keys:
                    yield command("STRLEN", key)

        replies = self._link.run(requests())
        for name, _ in wanted:
            header = _value(next(replies))
            yield Stat(header, [_size(size) for size in islice(replies, name.chunks)])

    def headers(self, names: Iterable[ObjectName]) -> Iterator[bytes | None]:
        """Yield the header of each object without an inline payload; None if it is missing.

        A value that is not a header may be yielded as it is. Nothing is looked for again.
        """
        self.close_reading()
        for page in pages(names, _NAMES_PER_PAGE):
            replies = iter(list(self._link.run(self._parts_of_headers(page))))
            for name in page:
                trailer, start = (bytes(_value(reply) or b"") for reply in islice(replies, 2))
                size = header_size(trailer) - len(trailer)
                if size > len(start) and size <= largest_header(name.chunks):
                    # Only Ray's own metadata can make one so long, or thousands of chunks.
                    key = self._keys.header(name)
                    (found,) = self._link.execute(command("GETRANGE", key, 0, size - 1))
                    start = bytes(found)
                yield start[:size] + trailer if size > 0 else None

    def _parts_of_headers(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        for name in names:
            key = self._keys.header(name)
            yield command("GETRANGE", key, -TRAILER_SIZE, -1)
            yield command("GETRANGE", key, 0, _START_OF_HEADER - 1)

    def read(self, place: Place, sizes: Sequence[int], use: Callable[[Receive], _T]) -> _T:
        """As `Tier.read`. A missing value was looked for again through `link.Link.confirmed`."""
        reading, self._reading = self._reading, None
        if reading is not None and reading.place != place:
            reading.finish()
            reading = None
        return use(functools.partial(self._receive, place.name, reading))

    def _receive(
        self, name: ObjectName, reading: _Reading | None, wanted: _Wanted
    ) -> Iterator[None]:
        key = self._keys.header(name)
        remaining = iter(wanted)
        asked: deque[tuple[int, memoryview]] = deque()

        def requests() -> Iterator[Request]:
            for number, into in remaining:
                asked.append((number, into))
                yield fetch(f"{key}:{number}", into=into)

        if reading is not None:
            replies = reading.receive(remaining, asked)
        else:
            replies = self._link.run(requests())
        while True:
            with contextlib.closing(replies):
                for request in replies:
                    number, into = asked.popleft()
                    if not _is_received(request, into):
                        break
                    yield
                else:
                    return
            self._read_again(f"{key}:{number}", into)
            yield
            remaining = chain([*asked], remaining)
            asked.clear()
            replies = self._link.run(requests())

    def _read_again(self, key: str, into: memoryview) -> None:
        """Receive a chunk that was missing. Errors as `read`."""

        def look() -> Request:
            (request,) = self._link.run([fetch(key, into=into)])
            return request

        request = self._link.confirmed(look, lacks_nothing=lambda found: _is_received(found, into))
        if not _is_received(request, into):
            raise LostObjectError("a chunk is missing, or has changed its size")

    def close_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.finish()

    # --- removing ---

    def remove(self, places: Sequence[Place], *, stepwise: bool = False) -> None:
        """As `Tier.remove`."""
        self.remove_objects((place.name for place in places), stepwise=stepwise)

    def remove_objects(
        self, names: Iterable[ObjectName], since: int | None = None, *, stepwise: bool = False
    ) -> None:
        """Remove objects, their values first; a missing object is not an error.

        Args:
            names: the objects.
            since: as for `link.Link.run`, which then raises UnconfirmedError.
            stepwise: whether the metadata forget objects only once their values were removed, which
                takes a round trip more. For whoever knows them by the metadata alone: a server that
                refuses a removal may accept the next one, and a proxy may have several servers.
        """
        self.close_reading()
        waits = self._link.has_replicas_to_await
        for page in pages(names, _NAMES_PER_PAGE):
            breaks = self._link.breaks
            waits = self._remove_page(page, since, waits=waits, stepwise=stepwise)
            if self._link.breaks != breaks:
                # A server that fails over may lose acknowledged removals.
                waits = self._remove_page(page, waits=waits, stepwise=stepwise)

    def _remove_page(
        self,
        names: Sequence[ObjectName],
        since: int | None = None,
        *,
        waits: bool,
        stepwise: bool,
    ) -> bool:
        """Remove a page of objects; return whether to wait for replicas with the next one, too.

        In a cluster, values and metadata are on different shards. A shard that fails over may have
        values again that the metadata know nothing of any more. So replicas get the time to hear of
        a removal before the metadata forget the objects. If that is not enough, they are away, and
        the removal goes on without them; or the server has been followed and does not know it yet.
        """
        if not waits or self._link.is_single:
            forgetting = self._forgetting(names, guarded=stepwise)
            self._drain(chain(self._removals(names), forgetting), since)
            return waits
        self._drain(self._removals(names), since)
        is_heard = not self._link.behind()
        if not is_heard:
            self._link.confirmed(lambda: self._drain(self._removals(names), since), keep=True)
        self._drain(self._forgetting(names), since)
        return is_heard

    def mark_lost(self, place: Place) -> None:
        """As `Tier.mark_lost`: removes the header. The chunks stay until the object is removed."""
        self.close_reading()
        self._link.execute(command("UNLINK", self._keys.header(place.name)))

    def remove_half_written(
        self, node_name: NodeName, is_half_written: Callable[[ObjectName], bool] = lambda name: True
    ) -> int:
        """Remove the pending objects of a node that nobody will settle; return their number.

        A lagging server would name objects that are stored by now. So the pending set is read
        through `link.Link.confirmed`, and read again if a connection broke before the removal.

        Args:
            node_name: the node.
            is_half_written: whether nobody will settle the object, because its writer is dead.

        Raises:
            UnconfirmedError: connections broke repeatedly.
        """
        for reading in range(_READINGS):
            # One operation: between two of them the link may replace its connections.
            with self._link.operation():
                names = self._link.confirmed(
                    lambda: [n for page in self.ledger.pending(node_name) for n in page]
                )
                names = [name for name in names if is_half_written(name)]
                try:
                    self.remove_objects(names, since=self._link.generation, stepwise=True)
                except UnconfirmedError:
                    if reading == _READINGS - 1:
                        raise
                else:
                    break
        return len(names)

    def remove_stored(self, node_name: NodeName) -> int:
        """Remove all stored objects of a node; return their number."""
        count = 0
        for entries in self.ledger.stored(node_name):
            self.remove_objects((entry.name for entry in entries), stepwise=True)
            count += len(entries)
        return count

    def _removals(self, names: Sequence[ObjectName]) -> Iterator[Request]:
        # One key per command: a cluster takes no other form, and the server needs about 50 us to
        # free a large string, during which every other client waits.
        for name in names:
            for key in self._keys.values(name):
                yield command("UNLINK", key)

    def _forgetting(
        self, names: Sequence[ObjectName], *, guarded: bool = False
    ) -> Iterator[Request]:
        for number, request in enumerate(self.ledger.forget(names)):
            request.fenced = number == 0
            request.guarded = guarded and number == 0
            yield request

    def _drain(self, requests: Iterable[Request], since: int | None = None) -> None:
        for request in self._run_to_failure(requests, since):
            request.result()

    def _run_to_failure(
        self, requests: Iterable[Request], since: int | None = None
    ) -> Iterator[Request]:
        """Yield requests with their replies, up to and including the first that failed.

        No request is sent after that one, and it is yielded only once all other replies are in:
        a SET still under way could otherwise run after its key has been removed. So the run is
        always drained.
        """
        failed: Request | None = None
        for request in self._link.run(requests, since, to_failure=True):
            if failed is None and request.error is None:
                yield request
            elif failed is None:
                failed = request
        if failed is not None:
            yield failed


class _Reading:
    """One object being read: its header, then its chunks, in one exchange.

    It requests the first chunks before their memory is known. `receive` sets that memory. A chunk
    whose reply another run has read before is copied there.
    """

    def __init__(self, link: Link, keyspace: Keyspace, place: Place, is_one_server: bool) -> None:
        self.place = place
        self.is_sharded = False
        self._is_one_server = is_one_server
        self._link = link
        self._key = keyspace.header(place.name)
        self._chunks = keyspace.chunks(place.name)
        self._header = fetch(self._key, most=_longest_header(place.name))
        self._checks: list[Request] = []
        self._ahead: deque[Request] = deque()
        self._wanted: Iterator[tuple[int, memoryview]] | None = None
        self._asked: deque[tuple[int, memoryview]] = deque()
        self._replies = link.run(self._requests())

    def _requests(self) -> Iterator[Request]:
        yield self._header
        self._checks += self._new_checks()
        yield from self._checks
        # Less than half of a chunk if the last one is shorter.
        expected = -(-self.place.size // len(self._chunks))
        for key in self._chunks:
            if self._wanted is not None:
                break
            request = fetch(key, expected=expected, most=2 * expected + TAG_SIZE)
            self._ahead.append(request)
            yield request
        for number, into in self._wanted or ():
            self._asked.append((number, into))
            yield fetch(self._chunks[number], into=into)

    def _new_checks(self) -> Iterator[Request]:
        """Yield requests for the sizes of all chunks; a single server sends a page per reply."""
        if self._is_one_server:
            checks = [
                command("EVAL", scripts.SIZES, len(page), *page)
                for page in pages(self._chunks, _KEYS_PER_CHECK)
            ]
            # Sent before the requests for chunks: the server replies only once it has executed all
            # that it has read, and would prepare the chunks first.
            checks[-1].urgent = True
            yield from checks
        else:
            for key in self._chunks:
                yield command("STRLEN", key)

    def stat(self) -> Stat:
        header = _value(next(self._replies))
        sizes: list[int] = []
        for _ in range(len(self._checks)):
            request = next(self._replies)
            if _is_across_shards(request):
                self.is_sharded = True
                return Stat(None, [])
            sizes += _sizes(request) if self._is_one_server else [_size(request)]
        return Stat(header, sizes)

    def receive(
        self, wanted: Iterator[tuple[int, memoryview]], asked: deque[tuple[int, memoryview]]
    ) -> Generator[Request]:
        """Receive all chunks in order; `asked` holds those not yielded yet."""
        self._asked = asked
        # `wanted` may have fewer chunks than were requested, though no caller does that.
        for request, (number, into) in zip(self._ahead, wanted):
            asked.append((number, into))
            request.into = into
        self._wanted = wanted
        return self._replies

    def finish(self) -> None:
        """Drain the run, and drop its replies, so that the connection stays usable."""
        self._wanted = iter(())
        # A server that is away now is not waited for.
        with self._link.hurried(0.0), contextlib.suppress(SpillError):
            for _ in self._replies:
                pass

    def abort(self) -> None:
        """Drop the replies under way together with their connection."""
        self._replies.close()


def _require_settled(
    settlements: Sequence[Request], entries: Sequence[Entry], budget: Budget
) -> None:
    replies = [request.integers(_SETTLED) for request in settlements]
    if sum(settled for settled, _, _ in replies) != len(entries):
        raise LostObjectError("the server lost objects that had just been written to it")
    _, granted, unwritten = replies[-1]
    budget.settled(granted, unwritten)


def _longest_header(name: ObjectName) -> int:
    """Return an upper bound for the length of a header with its payload, in bytes."""
    return largest_header(name.chunks) + INLINE_LIMIT


def _is_received(request: Request, into: memoryview) -> bool:
    """Whether a chunk is in `into`; copies it there if its reply came before `into` was known."""
    if request.error is None and isinstance(request.reply, int):
        return request.reply == len(into)
    found = _value(request)
    if found is None or len(found) != len(into):
        return False
    copy_into(found, into)
    return True


def _is_across_shards(request: Request) -> bool:
    """Whether a script was refused because its keys are on several shards of a cluster."""
    text = str(request.error or "")
    return "CROSSSLOT" in text or "non local key" in text or "hash to the same slot" in text


def _value(request: Request) -> bytearray | None:
    """Return the value; None also for another program's of a different type under our key."""
    return None if _is_of_another_type(request) else request.value()


def _size(request: Request) -> int:
    """Return the length of a value; 0 if there is none, as `_value`."""
    return 0 if _is_of_another_type(request) else request.integers()[0]


def _sizes(request: Request) -> list[int]:
    """Return the lengths of the values of a page."""
    found = request.value() or bytearray()
    if not _PAGE_OF_SIZES.fullmatch(found):
        raise NotValkeyError(f"a script has the reply {bytes(found[:40])!r}: this is not Valkey")
    return [*map(int, found.split())]


def _is_of_another_type(request: Request) -> bool:
    return request.error is not None and str(request.error).startswith("WRONGTYPE")
