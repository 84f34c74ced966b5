"""Where bytes live in Valkey: values under keys, and what books are kept of them.

A tier moves values and knows nothing of what is in them. An object is in the books before any value
of it is written and until the last is removed, so that whatever a crash leaves can be found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any

from ray_valkey_spill.errors import LostObjectError, ServerError, UnconfirmedError
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName, Owner
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import Request, command, fetch, store
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.ledger import Ledger, pages

__all__ = ["ValkeyTier"]

_NAMES_PER_PAGE = 500
# What is looked at again together once something was missing.
_OBJECTS_LOOKED_AT_AGAIN = 16
_READINGS = 5


class ValkeyTier:
    """Objects' values in one Valkey. Errors are those of `link.Link.run` and of the commands."""

    def __init__(self, link: Link, keyspace: Keyspace) -> None:
        self._link = link
        self._keys = keyspace
        self.ledger = Ledger(link, keyspace)

    @property
    def breaks(self) -> int:
        """How many times the connection has broken."""
        return self._link.breaks

    def operation(self) -> AbstractContextManager[None]:
        """See `link.Link.operation`. What is written and then confirmed has to be in one."""
        return self._link.operation()

    def register(self, names: Iterable[ObjectName]) -> None:
        """Enter objects into the books. Nothing of them may be written before this returns."""
        self._drain(self.ledger.registrations(names))

    def write(self, values: Iterable[Value]) -> Iterator[Entry]:
        """Write `values` in order, and yield each object once all of it is there."""
        under_way: deque[Value] = deque()

        def requests() -> Iterator[Request]:
            for value in values:
                under_way.append(value)
                yield store(value.key, value.parts)

        for request in self._run_to_failure(requests()):
            request.result()
            entry = under_way.popleft().completes
            if entry is not None:
                yield entry

    def settle(self, owner: Owner, entries: Sequence[Entry]) -> None:
        """End the writing of objects: nobody will take them for half-written any more.

        Raises:
            LostObjectError: if not all of them were pending: their node's data were destroyed
                meanwhile, or the server lost them.
        """
        settlements = list(self._link.run(self.ledger.settlements(owner, entries)))
        _require_settled(settlements, entries)

    def write_at_once(self, owner: Owner, values: Sequence[Value]) -> list[Entry]:
        """Register, write and settle objects: in one round trip, or three to a cluster.

        All their values are in memory.

        Raises:
            LostObjectError: as `settle`.
        """
        entries = [value.completes for value in values if value.completes]
        settlements = list(self.ledger.settlements(owner, entries))
        stores = [store(value.key, value.parts) for value in values]
        names = [entry.name for entry in entries]
        self._drain([*self.ledger.registrations(names), *_fenced(stores), *_fenced(settlements)])
        _require_settled(settlements, entries)
        return entries

    def confirm(self, entries: Sequence[Entry], breaks: int) -> None:
        """Make sure that objects that were written are there, and on as many replicas as wanted.

        A server that is restarted or fails over may lose what it has acknowledged.

        Args:
            entries: which.
            breaks: what `self.breaks` was before they were written.

        Raises:
            UnconfirmedError: they are not.
            ServerUnavailableError: replicas have not confirmed them in time.
        """
        self._link.await_replicas(breaks)
        latest = self._link.breaks
        if latest == breaks or not entries:
            return
        stats = list(self.stat([(entry.name, 0) for entry in entries]))
        # What fell back to being pending would be removed once this process has ended.
        owner = Owner(*entries[0].name[:2])
        settlements = list(self._link.run(self.ledger.settlements(owner, entries)))
        settled = sum(request.result() for request in settlements)
        are_there = all(stat.is_whole for stat in stats) and settled == len(entries)
        if not are_there or self._link.breaks != latest:
            raise UnconfirmedError("the server lost what had just been written to it")

    def stat(self, wanted: Sequence[tuple[ObjectName, int]]) -> Iterator[Stat]:
        """Headers and sizes of chunks of objects, given about how long each header is.

        What is missing was looked for again, as `link.Link.confirmed` does.
        """
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

    def _stat(self, wanted: Sequence[tuple[ObjectName, int]]) -> Iterator[Stat]:
        def requests() -> Iterator[Request]:
            for name, expected in wanted:
                yield fetch(self._keys.header(name), expected=expected)
                for key in self._keys.chunks(name):
                    yield command("STRLEN", key)

        replies = self._link.run(requests())
        for name, _ in wanted:
            header, *sizes = islice(replies, 1 + name.chunks)
            yield Stat(_value(header), [_value(size) or 0 for size in sizes])

    def read(self, name: ObjectName, wanted: Iterable[tuple[int, memoryview]]) -> Iterator[None]:
        """Receive chunks of an object into memoryviews; yields as each is there, in order.

        Raises:
            LostObjectError: if a chunk is missing or has another size, as `link.Link.confirmed`
                finds.
        """
        key = self._keys.header(name)
        remaining = iter(wanted)
        under_way: deque[tuple[int, memoryview]] = deque()

        def requests() -> Iterator[Request]:
            for number, into in remaining:
                under_way.append((number, into))
                yield fetch(f"{key}:{number}", into=into)

        while True:
            for request in self._link.run(requests()):
                if not _is_filled(request):
                    break
                under_way.popleft()
                yield
            else:
                return
            number, into = under_way.popleft()
            self._read_again(f"{key}:{number}", into)
            remaining = chain([*under_way], remaining)
            under_way.clear()
            yield

    def _read_again(self, key: str, into: memoryview) -> None:
        """Receive a chunk that was missing. Errors as `read`."""

        def look() -> Request:
            (request,) = self._link.run([fetch(key, into=into)])
            return request

        request = self._link.confirmed(look, lacks_nothing=_is_filled)
        if not _is_filled(request):
            raise LostObjectError("a chunk is missing, or changed its size meanwhile")

    def remove(self, names: Iterable[ObjectName], since: int | None = None) -> None:
        """Remove objects, their values first; what is not there is no error.

        Args:
            names: which.
            since: as `link.Link.run`, which raises UnconfirmedError then.
        """
        for page in pages(names, _NAMES_PER_PAGE):
            breaks = self._link.breaks
            self._drain(self._removals(page), since)
            if self._link.breaks != breaks:
                # A server that fails over may lose again what it has acknowledged.
                self._drain(self._removals(page))

    def remove_half_written(
        self, owner: Owner, is_half_written: Callable[[ObjectName], bool] = lambda name: True
    ) -> int:
        """Remove what is pending of a node, and nobody will settle; returns how many that were.

        A server that lags would name objects that are stored by now. So what is pending is read as
        `link.Link.confirmed` does, and read again if a connection broke before it was removed.

        Args:
            owner: whose.
            is_half_written: which of these nobody will settle, for its writer is dead.

        Raises:
            UnconfirmedError: connections broke again and again.
        """
        for reading in range(_READINGS):
            # In one operation: between two the link may replace its connections by itself.
            with self._link.operation():
                names = self._link.confirmed(
                    lambda: [n for page in self.ledger.pending(owner) for n in page]
                )
                names = [name for name in names if is_half_written(name)]
                try:
                    self.remove(names, since=self._link.generation)
                except UnconfirmedError:
                    if reading == _READINGS - 1:
                        raise
                else:
                    break
        return len(names)

    def remove_stored(self, owner: Owner) -> int:
        """Remove all stored objects of a node of a session; returns how many that were."""
        count = 0
        for entries in self.ledger.stored(owner):
            self.remove(entry.name for entry in entries)
            count += len(entries)
        return count

    def remove_header(self, name: ObjectName) -> None:
        """Make the object count as lost; its chunks stay until it is removed."""
        self._link.execute(command("UNLINK", self._keys.header(name)))

    def close(self) -> None:
        self._link.close()

    def _removals(self, names: Sequence[ObjectName]) -> Iterator[Request]:
        keys = (
            key for name in names for key in (self._keys.header(name), *self._keys.chunks(name))
        )
        # One at a time: a cluster takes no others, and to free a large string takes some 50 us,
        # while everybody else waits.
        for key in keys:
            yield command("UNLINK", key)
        yield from _fenced(self.ledger.forget(names))

    def _drain(self, requests: Iterable[Request], since: int | None = None) -> None:
        for request in self._run_to_failure(requests, since):
            request.result()

    def _run_to_failure(
        self, requests: Iterable[Request], since: int | None = None
    ) -> Iterator[Request]:
        """Yield requests with their replies, up to and with the first that failed.

        Nothing is sent after that, and it is yielded only once all other replies are in: a SET
        still under way could otherwise be carried out after its key has been removed.
        """
        failed: Request | None = None

        def until_failure() -> Iterator[Request]:
            for request in requests:
                if failed is not None:
                    return
                yield request

        for request in self._link.run(until_failure(), since):
            if failed is None and request.error is None:
                yield request
            elif failed is None:
                failed = request
        if failed is not None:
            yield failed


def _fenced(requests: Iterable[Request]) -> Iterator[Request]:
    """`requests`, the first of which is carried out only after all before it."""
    for number, request in enumerate(requests):
        request.fenced = number == 0
        yield request


def _require_settled(settlements: Iterable[Request], entries: Sequence[Entry]) -> None:
    if sum(request.result() for request in settlements) != len(entries):
        raise LostObjectError("the server lost objects that had just been written to it")


def _is_filled(request: Request) -> bool:
    return request.into is not None and _value(request) == len(request.into)


def _value(request: Request) -> Any:
    """The reply; a foreign value of another type under one of our keys counts as none."""
    if isinstance(request.error, ServerError) and str(request.error).startswith("WRONGTYPE"):
        return None
    return request.result()
