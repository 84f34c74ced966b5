"""The object store: puts, fetches and deletes objects as header and chunks. Knows no Ray.

An object of up to `INLINE_LIMIT` bytes (and one chunk) lies beside its header in one key; a larger
one is cut into chunks of `chunk_size` bytes, each a key. Data are never buffered whole: raw chunks
go between the caller's memory and the socket without a copy, and LZ4 runs in threads, in order and
a bounded number of chunks ahead of the network.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Generic, NamedTuple, TypeVar

from ray_valkey_spill.config import KIB, MIB, Config
from ray_valkey_spill.errors import LostObjectError, ServerUnavailableError, SpillError
from ray_valkey_spill.format import (
    Buffer,
    Chunk,
    Codec,
    Header,
    checksum,
    chunk_count,
    compress,
    compression_pays,
    decode_header,
    decompress_into,
    encode_header,
    scratch,
)
from ray_valkey_spill.keys import Keyspace, ObjectName, new_attempt
from ray_valkey_spill.tiers import Stat, ValkeyTier, Value
from ray_valkey_spill.wire import Link

__all__ = ["INLINE_LIMIT", "ObjectStore", "SourceObject", "StoredObject"]

INLINE_LIMIT = 256 * KIB

# Two threads saturate what one connection carries. They are kept ahead of it by no more than this,
# which with the wire's own window bounds what an IO worker grows by.
_THREADS = min(2, os.cpu_count() or 1)
_BYTES_AHEAD = 8 * MIB
# Handing work to a thread and back takes as long as the checksum of about this many bytes.
_WORTH_A_THREAD = 256 * KIB
_DECODED_TOGETHER = 2 * MIB
# What is looked up in one round trip.
_OBJECTS_PER_PAGE = 16
_DESTROY_PAUSE = 0.05
_LATE_ARRIVALS = 1.0
_RECOVERY_PATIENCE = 1.0
_ABANDONED = 10_000


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object to be stored. `data` is read in place and must not change until it is stored."""

    object_id: str
    ray_metadata: bytes
    owner_address: bytes
    data: memoryview


class StoredObject(NamedTuple):
    """An object that was found, and checked as far as that goes without reading its chunks."""

    name: ObjectName
    header: Header
    payload: memoryview  # of an inline object, else empty


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Done(Generic[_T]):
    """Stands in for a future where the work was not worth a thread."""

    value: _T

    def result(self) -> _T:
        return self.value


_Job = Future[_T] | _Done[_T]


@dataclass(slots=True)
class _Piece:
    """One chunk's worth of an object on its way into the store, or all of an inline object.

    `job` compresses and checksums it, if that is to be.
    """

    source: SourceObject
    name: ObjectName
    index: int
    data: memoryview
    job: _Job[tuple[Chunk, Buffer]] | None


class _Part(NamedTuple):
    """A chunk on its way out of the store: what its header tells, its bytes, and their place."""

    number: int
    chunk: Chunk
    stored: memoryview
    slot: memoryview


class ObjectStore:
    """Objects of one node of one Ray session.

    For one thread at a time, beside which another may `recover`. Opens its connection with the
    first operation.

    Args:
        config: where, under which prefix, and how chunks are cut and compressed.
        session, node: whose the objects are that this store puts.
    """

    def __init__(self, config: Config, session: str, node: str) -> None:
        self.keys = Keyspace.of(config)
        self._session, self._node = _component(session), _component(node)
        self._chunk_size = config.chunk_size
        self._compression = config.compression
        self._tier = ValkeyTier(Link(config), self.keys)
        # What this cannot do now is done another time.
        impatient = replace(config, retry_timeout=min(config.retry_timeout, _RECOVERY_PATIENCE))
        self._recovery = ValkeyTier(Link(impatient), self.keys)
        self._pool: ThreadPoolExecutor | None = None
        # What put() could not remove, for recover(). Bounded, for an outage can be long; the rest
        # is in the index, and goes with the session.
        self._abandoned: deque[ObjectName] = deque(maxlen=_ABANDONED)
        self._chunks_ahead = max(1, min(2 * _THREADS, _BYTES_AHEAD // config.chunk_size))

    def close(self) -> None:
        """Drop the connection and the threads; the next operation gets new ones."""
        self._tier.close()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    @property
    def has_left_some(self) -> bool:
        """Whether `recover` has something to do that a failed put has left."""
        return bool(self._abandoned)

    # --- put ---

    def put(self, sources: Sequence[SourceObject]) -> tuple[list[ObjectName], SpillError | None]:
        """Store `sources`.

        Returns:
            The names of as many of them, from the first on, as are all on the server now; and what
            kept the rest from it, or None. Nothing is left of the rest, or `recover` will remove
            it: a server that cannot be reached cannot be cleaned up.
        """
        names = [self._new_name(source) for source in sources]
        small = sum(len(source.data) for source in sources) <= INLINE_LIMIT
        stored: list[ObjectName] = []
        failure: SpillError | None = None
        breaks = self._tier.breaks
        try:
            with contextlib.closing(self._values(zip(sources, names))) as values:
                if small:
                    self._tier.write_at_once(names, list(values))
                    stored += names
                else:
                    self._tier.register(names)
                    for name in self._tier.write(values):
                        stored.append(name)
        except ServerUnavailableError as error:
            self._abandoned += names
            return [], error
        except SpillError as error:
            failure = error
        broken = self._tier.breaks != breaks
        try:
            if broken:
                # The server may still carry out what it got over a connection that broke: write
                # what is removed here, and enter as pending what is settled.
                time.sleep(_LATE_ARRIVALS)
            self._tier.remove(names[len(stored) :])
            if not small:
                self._tier.settle(stored)
            elif broken:
                self._tier.unmark(stored)
        except SpillError as error:
            try:
                self._tier.remove(names)
            except SpillError:
                self._abandoned += names
            return [], failure or error
        return stored, failure

    def _new_name(self, source: SourceObject) -> ObjectName:
        size = len(source.data)
        chunks = 0 if self._inline(size) else chunk_count(size, self._chunk_size)
        return ObjectName(
            self._session, self._node, _component(source.object_id), new_attempt(), chunks
        )

    def _inline(self, size: int) -> bool:
        return size <= min(INLINE_LIMIT, self._chunk_size)

    def _values(self, named: Iterable[tuple[SourceObject, ObjectName]]) -> Generator[Value]:
        """The chunks and then the header of each object.

        What is to be compressed is compressed and checksummed in threads, a bounded number of
        chunks ahead. What is not is checksummed here, each chunk just after it was sent, when it is
        in this core's cache: a core reads memory no faster than the wire takes it.
        """
        ahead: deque[_Piece] = deque()
        chunks: list[Chunk] = []
        try:
            for piece in _lookahead(self._pieces(named), self._chunks_ahead, ahead):
                if piece.index == 0:
                    chunks = []
                chunk, stored = piece.job.result() if piece.job else (None, piece.data)
                if piece.name.chunks:
                    yield Value(f"{self.keys.header(piece.name)}:{piece.index}", [stored])
                chunks.append(chunk or Chunk(len(stored), Codec.RAW, checksum(stored)))
                if piece.index + 1 >= piece.name.chunks:
                    yield self._header(piece, chunks, stored)
        finally:
            # The caller may take its memory back once this is over.
            wait([piece.job for piece in ahead if isinstance(piece.job, Future)])

    def _header(self, piece: _Piece, chunks: list[Chunk], stored: Buffer) -> Value:
        """The value that completes the object, of which `piece` is the last."""
        inline = piece.name.chunks == 0
        header = Header(
            object_id=piece.source.object_id,
            ray_metadata=piece.source.ray_metadata,
            owner_address=piece.source.owner_address,
            size=len(piece.source.data),
            chunk_size=self._chunk_size,
            chunks=chunks,
            inline=inline,
        )
        value = encode_header(header, [stored] if inline else [])
        return Value(self.keys.header(piece.name), value, completes=piece.name)

    def _pieces(self, named: Iterable[tuple[SourceObject, ObjectName]]) -> Iterator[_Piece]:
        """All objects cut to pieces; drawing one starts its compression."""
        for source, name in named:
            size = len(source.data)
            pays = self._pays(source.data)
            for index, start in enumerate(range(0, max(1, size), self._chunk_size)):
                data = source.data[start : start + self._chunk_size]
                job = self._start(len(data), _compressed, data) if pays else None
                yield _Piece(source, name, index, data, job)

    def _start(self, size: int, work: Callable[..., _T], *args: Any) -> Future[_T] | _Done[_T]:
        """Have a thread do `work` on `size` bytes, or do it now if that is faster."""
        if size < _WORTH_A_THREAD:
            return _Done(work(*args))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ray-valkey-spill")
        return self._pool.submit(work, *args)

    def _pays(self, data: memoryview) -> bool:
        if self._compression == "auto":
            return len(data) > 0 and compression_pays(data)
        return self._compression == "lz4" and len(data) > 0

    # --- get ---

    def find(self, url: str, object_id: str) -> StoredObject:
        """Look an object up, and check all that can be checked without reading its chunks.

        Raises:
            LostObjectError: if it is gone, damaged, of a newer format, or not the one meant.
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
                found = self._find_page(page)
                yield from found if inline else list(found)

    def _locate(self, url: str) -> tuple[ObjectName, int] | LostObjectError:
        try:
            return self.keys.parse_url(url)
        except LostObjectError as error:
            return error

    def _find_page(
        self, page: Sequence[tuple[tuple[ObjectName, int] | LostObjectError, str]]
    ) -> Iterator[StoredObject | LostObjectError]:
        places = [place for place, _ in page if not isinstance(place, LostObjectError)]
        stats = self._tier.stat([(name, 0 if name.chunks else size) for name, size in places])
        for place, object_id in page:
            if isinstance(place, LostObjectError):
                yield place
            else:
                yield self._checked(*place, object_id, next(stats))

    def _checked(
        self, name: ObjectName, size: int, object_id: str, stat: Stat
    ) -> StoredObject | LostObjectError:
        try:
            if stat.header is None:
                raise LostObjectError("its header is gone from the server")
            header, payload = decode_header(stat.header)
            if header.object_id != object_id:
                raise LostObjectError(f"its header is that of object {header.object_id}")
            if header.size != size:
                raise LostObjectError(f"its header tells of {header.size} bytes, not {size}")
            if name.chunks != (0 if header.inline else len(header.chunks)):
                raise LostObjectError(f"its header tells of {len(header.chunks)} chunks")
            for index, found in enumerate(stat.chunk_sizes):
                if found != header.chunks[index].stored_size:
                    raise LostObjectError(
                        f"chunk {index} has {found} bytes, not {header.chunks[index].stored_size}"
                        if found
                        else f"chunk {index} of {name.chunks} is gone from the server"
                    )
            if header.inline and checksum(payload) != header.chunks[0].checksum:
                raise LostObjectError("its data are damaged (wrong checksum)")
        except LostObjectError as error:
            return self._lost(name, error)
        return StoredObject(name, header, payload)

    def fill(self, found: StoredObject, target: memoryview) -> None:
        """Receive the object's data into `target`, which has exactly its size.

        `target`'s content is undefined unless this returns.

        Raises:
            LostObjectError: if a chunk is missing or damaged, also when fetched a second time.
            ServerError: as `wire.Link.run`.
        """
        header = found.header
        if header.inline:
            _unpack(header.chunks[0], found.payload, target)
            return
        try:
            damaged = self._fill(found, target, range(len(header.chunks)))
            # Once more: it may have been the way here that flipped a bit.
            damaged = damaged and self._fill(found, target, damaged)
            if damaged:
                raise LostObjectError(
                    f"chunk {damaged[0]} of {len(header.chunks)} is damaged (wrong checksum)"
                )
        except LostObjectError as error:
            raise self._lost(found.name, error) from error

    def _fill(
        self, found: StoredObject, target: memoryview, numbers: Sequence[int]
    ) -> Sequence[int]:
        """Receive some chunks into their places; returns those whose checksums are wrong.

        Raw chunks are received in place, and checked at once, while they are in this core's cache.
        Others are checked and decompressed in threads, some at a time.
        """
        header, key = found.header, self.keys.header(found.name)
        asked: deque[_Part] = deque()
        together: list[_Part] = []
        decoding: deque[_Job[list[int]]] = deque()
        damaged: list[int] = []

        def wanted() -> Iterator[tuple[str, memoryview]]:
            for number in numbers:
                chunk, slot = header.chunks[number], target[header.span(number)]
                raw = chunk.codec is Codec.RAW
                stored = slot if raw else scratch(chunk.stored_size)
                asked.append(_Part(number, chunk, stored, slot))
                yield f"{key}:{number}", stored

        def decode(leave: int) -> None:
            if together:
                size = sum(len(part.slot) for part in together)
                decoding.append(self._start(size, _decode, together.copy()))
                together.clear()
            while len(decoding) > leave:
                damaged.extend(decoding.popleft().result())

        try:
            for _ in self._tier.read(wanted()):
                part = asked.popleft()
                if part.chunk.codec is not Codec.RAW:
                    together.append(part)
                    if len(together) * header.chunk_size >= _DECODED_TOGETHER:
                        decode(leave=self._chunks_ahead)
                elif checksum(part.stored) != part.chunk.checksum:
                    damaged.append(part.number)
            decode(leave=0)
        finally:
            # Nobody may write into `target` any more once this is over.
            wait([job for job in decoding if isinstance(job, Future)])
        return sorted(damaged)

    # --- delete ---

    def delete(self, urls: Iterable[str]) -> list[str]:
        """Remove objects; what is not there is no error.

        Returns:
            The URLs that are none of ours.

        Raises:
            ServerError: some may be left.
        """
        names, foreign = self._names(urls)
        self._tier.remove(names)
        return foreign

    def _names(self, urls: Iterable[str]) -> tuple[list[ObjectName], list[str]]:
        """The objects that `urls` name, and those of `urls` that are none of ours."""
        names, foreign = [], []
        for url in urls:
            try:
                names.append(self.keys.parse_url(url)[0])
            except LostObjectError:
                foreign.append(url)
        return names, foreign

    def mark_lost(self, name: ObjectName) -> None:
        """Let every later `find` of an object that turned out damaged fail at once."""
        self._tier.remove_header(name)

    def recover(self, is_alive: Callable[[int], bool], deleted: Sequence[str] = ()) -> int:
        """Remove what failed puts left, and those of killed processes of this node.

        This may run in another thread, over a connection of its own.

        Args:
            is_alive: whether a process of this node, given by its id, may still be putting.
            deleted: URLs of objects that are to go too.

        Returns:
            How many objects were removed.

        Raises:
            ServerError: what could not be removed is left for the next time.
        """
        left = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        removed = False
        try:
            dead = self._pending_of_the_dead(is_alive)
            left_or_deleted = [*left, *self._names(deleted)[0]]
            if dead or left_or_deleted:
                # The server may still have in its sockets what was sent, and carry it out later.
                time.sleep(_LATE_ARRIVALS)
            if dead:
                # What is pending now, after its writer was seen dead, was never reported as put; at
                # first the writer may have died between that and this.
                dead &= self._pending_of_the_dead(is_alive)
            self._recovery.remove([*left_or_deleted, *dead])
            removed = True
        finally:
            if not removed:
                self._abandoned.extendleft(left)
            self._recovery.close()
        return len(left_or_deleted) + len(dead)

    def _pending_of_the_dead(self, is_alive: Callable[[int], bool]) -> set[ObjectName]:
        pages = self._recovery.pending(self._session, self._node)
        return {name for page in pages for name in page if not is_alive(name.writer)}

    def destroy(self, is_alive: Callable[[int], bool], patience: float = 5.0) -> int:
        """Remove every object of this store's node and session.

        What another process is just putting is waited for: if it lost its entry in the index and
        was then killed, nobody could find the chunks that it had gone on to write.

        Args:
            is_alive: as for `recover`.
            patience: seconds to wait; what is still being put then stays, and stays in the index.

        Returns:
            How many objects were removed.
        """
        count = 0
        deadline = time.monotonic() + patience
        while True:
            busy: set[ObjectName] = set()
            for page in self._tier.pending(self._session, self._node):
                busy.update(name for name in page if is_alive(name.writer))
            for page in self._tier.owned(self._session, self._node):
                idle = [name for name in page if name not in busy]
                self._tier.remove(idle)
                count += len(idle)
            if not busy or time.monotonic() > deadline:
                return count
            time.sleep(_DESTROY_PAUSE)

    # --- helpers ---

    def _lost(self, name: ObjectName, error: LostObjectError) -> LostObjectError:
        return LostObjectError(
            f"object {name.object_id}, spilled as {self.keys.header(name)}, is lost: {error}"
        )


def _lookahead(items: Iterable[_T], count: int, ahead: deque[_T]) -> Iterator[_T]:
    """Yield `items`, and keep `count` more of them drawn, in `ahead`."""
    for item in items:
        ahead.append(item)
        if len(ahead) > count:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _compressed(data: memoryview) -> tuple[Chunk, Buffer]:
    """What is stored of a chunk's data, and what the header tells of that."""
    codec, stored = compress(data)
    return Chunk(len(stored), codec, checksum(stored)), stored


def _decode(parts: Sequence[_Part]) -> list[int]:
    """Put the data of chunks into their slots; returns those that are damaged."""
    damaged = []
    for number, chunk, stored, slot in parts:
        if checksum(stored) == chunk.checksum:
            _unpack(chunk, stored, slot)
        else:
            damaged.append(number)
    return damaged


def _is_inline(located: tuple[tuple[ObjectName, int] | LostObjectError, str]) -> bool:
    place, _ = located
    return not isinstance(place, LostObjectError) and place[0].chunks == 0


def _unpack(chunk: Chunk, stored: memoryview, target: memoryview) -> None:
    if chunk.codec is Codec.RAW:
        target[:] = stored
    else:
        decompress_into(stored, target)


def _component(text: str) -> str:
    """`text` as a component of a key, without our separators and those of Ray's URLs."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text) or "_"
