"""Where bytes live: values under keys in Valkey, and the index of whose they are.

A tier moves values and knows nothing of what is in them. The index is written before any value of
an object and removed after the last, so that whatever a crash leaves can be found through it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from ray_valkey_spill.errors import LostObjectError, ServerError
from ray_valkey_spill.format import Buffer
from ray_valkey_spill.keys import Keyspace, ObjectName
from ray_valkey_spill.resp import Request, command, fetch, store
from ray_valkey_spill.wire import Link

__all__ = ["Stat", "Value", "ValkeyTier"]

# The server frees a value of a megabyte while everybody waits, so one command frees few of them.
_KEYS_PER_UNLINK = 32
_MEMBERS_PER_COMMAND = 500


class Value(NamedTuple):
    """A value to be written: buffers, one after the other, under `key`.

    `completes` is the object of which this is the last value.
    """

    key: str
    parts: Sequence[Buffer]
    completes: ObjectName | None = None


class Stat(NamedTuple):
    """An object as found on the server; `chunk_sizes` in bytes, 0 for a missing chunk."""

    header: Buffer | None
    chunk_sizes: list[int]


class ValkeyTier:
    """Objects' values in one Valkey. Errors are those of `wire.Link.run` and of the commands."""

    def __init__(self, link: Link, keyspace: Keyspace) -> None:
        self._link = link
        self._keys = keyspace

    @property
    def breaks(self) -> int:
        """How many times the connection has broken."""
        return self._link.breaks

    def register(self, names: Iterable[ObjectName]) -> None:
        """Enter objects into the index, as pending.

        Nothing of them may be written before this returns.
        """
        self._drain(self._registrations(names))

    def owned(self, session: str, node: str) -> Iterator[list[ObjectName]]:
        """The objects that a node of a session has in the index, by the page."""
        return self._range(self._keys.index, session, node)

    def pending(self, session: str, node: str) -> Iterator[list[ObjectName]]:
        """Those of them that are being written, or were when their writer was killed."""
        return self._range(self._keys.pending, session, node)

    def _range(self, key: str, session: str, node: str) -> Iterator[list[ObjectName]]:
        prefix = f"{session}:{node}"
        start, stop = f"[{prefix}:", f"({prefix};"  # ";" comes right after ":"
        while True:
            (members,) = self._link.execute(
                command("ZRANGEBYLEX", key, start, stop, "LIMIT", 0, _MEMBERS_PER_COMMAND)
            )
            if not members:
                return
            yield [ObjectName.parse(member.decode()) for member in members]
            start = f"({members[-1].decode()}"

    def write(self, values: Iterable[Value]) -> Iterator[ObjectName]:
        """Write `values` in order, and yield each object once all of it is there."""
        under_way: deque[Value] = deque()

        def requests() -> Iterator[Request]:
            for value in values:
                under_way.append(value)
                yield store(value.key, value.parts)

        for request in self._run_to_failure(requests()):
            request.result()
            name = under_way.popleft().completes
            if name is not None:
                yield name

    def settle(self, names: Sequence[ObjectName]) -> None:
        """End the writing of objects: nobody will take them for half-written any more.

        Raises:
            LostObjectError: if not all of them were pending. Then their node's data were destroyed
                meanwhile, or the server lost them; or only the reply to this was lost, which cannot
                be told from that.
        """
        settlements = list(self._link.run(self._settlements(names)))
        self._require_settled(settlements, names)

    def unmark(self, names: Sequence[ObjectName]) -> None:
        """Settle objects once more: it is no error that they were not pending."""
        self._drain(self._settlements(names))

    def write_at_once(self, names: Sequence[ObjectName], values: Sequence[Value]) -> None:
        """Register, write and settle objects in one round trip. All their values are in memory.

        Raises:
            LostObjectError: as `settle`.
        """
        settlements = list(self._settlements(names))
        stores = [store(value.key, value.parts) for value in values]
        self._drain([*self._registrations(names), *stores, *settlements])
        self._require_settled(settlements, names)

    def stat(self, wanted: Sequence[tuple[ObjectName, int]]) -> Iterator[Stat]:
        """Headers and sizes of chunks of objects, given about how long each header is."""

        def requests() -> Iterator[Request]:
            for name, expected in wanted:
                yield fetch(self._keys.header(name), expected=expected)
                for key in self._keys.chunks(name):
                    yield command("STRLEN", key)

        replies = self._link.run(requests())
        for name, _ in wanted:
            header, *sizes = islice(replies, 1 + name.chunks)
            yield Stat(_value(header), [_value(size) or 0 for size in sizes])

    def read(self, wanted: Iterable[tuple[str, memoryview]]) -> Iterator[None]:
        """Receive the value of each key into its memoryview; yields as each is there, in order.

        Raises:
            LostObjectError: if a value is missing or has another size.
        """
        for request in self._link.run(fetch(key, into=into) for key, into in wanted):
            assert request.into is not None
            if _value(request) != len(request.into):
                raise LostObjectError("a chunk is missing, or changed its size meanwhile")
            yield

    def remove(self, names: Iterable[ObjectName]) -> None:
        """Remove objects, their values first; what is not there is no error."""
        for page in _pages(names, _MEMBERS_PER_COMMAND):
            self._drain(self._removals(page))

    def remove_header(self, name: ObjectName) -> None:
        """Make the object count as lost; its chunks stay until it is removed."""
        self._link.execute(command("UNLINK", self._keys.header(name)))

    def close(self) -> None:
        self._link.close()

    def _registrations(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        for page in _pages(map(str, names), _MEMBERS_PER_COMMAND):
            scored = [field for member in page for field in (0, member)]
            yield command("ZADD", self._keys.index, *scored)
            yield command("ZADD", self._keys.pending, *scored)

    def _settlements(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        for page in _pages(map(str, names), _MEMBERS_PER_COMMAND):
            yield command("ZREM", self._keys.pending, *page)

    def _require_settled(self, settlements: Iterable[Request], names: Sequence[ObjectName]) -> None:
        if sum(request.result() for request in settlements) != len(names):
            raise LostObjectError("the server lost objects that had just been written to it")

    def _removals(self, names: Sequence[ObjectName]) -> Iterator[Request]:
        keys = (
            key for name in names for key in (self._keys.header(name), *self._keys.chunks(name))
        )
        for page in _pages(keys, _KEYS_PER_UNLINK):
            yield command("UNLINK", *page)
        yield command("ZREM", self._keys.pending, *map(str, names))
        yield command("ZREM", self._keys.index, *map(str, names))

    def _drain(self, requests: Iterable[Request]) -> None:
        for request in self._run_to_failure(requests):
            request.result()

    def _run_to_failure(self, requests: Iterable[Request]) -> Iterator[Request]:
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

        for request in self._link.run(until_failure()):
            if failed is None and request.error is None:
                yield request
            elif failed is None:
                failed = request
        if failed is not None:
            yield failed


_T = TypeVar("_T")


def _pages(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    source = iter(items)
    while page := list(islice(source, size)):
        yield page


def _value(request: Request) -> Any:
    """The reply; a foreign value of another type under one of our keys counts as none."""
    if isinstance(request.error, ServerError) and str(request.error).startswith("WRONGTYPE"):
        return None
    return request.result()
