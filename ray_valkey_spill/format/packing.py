"""Objects to values, and back: cut, compressed or sealed, and checked; in threads where that pays.

An object of up to `INLINE_LIMIT` bytes (and one chunk) lies beside its header in one key; a larger
one is cut into chunks of `chunk_size` bytes, each a key. Data are never buffered whole: raw chunks
go between the caller's memory and the socket without a copy, and threads work in order and a
bounded number of chunks ahead of the network.

With an `encryption_key_file` all is sealed, in the same threads, and opened in memory of our own:
nothing gets into the caller's that has not been found to be what was put.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError
from ray_valkey_spill.format.codec import (
    Codec,
    checksum,
    compress,
    copy_into,
    decompress_into,
    expected_ratio,
    scratch,
)
from ray_valkey_spill.format.header import Chunk, Header, chunk_count, encode_header
from ray_valkey_spill.format.names import Keyspace, ObjectName
from ray_valkey_spill.format.sealing import TAG_SIZE, Key, Seal
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.units import KIB, MIB, Buffer

__all__ = ["INLINE_LIMIT", "Packer", "Receive", "SourceObject", "unpack_chunk"]

INLINE_LIMIT = 256 * KIB

# Two threads saturate what one connection carries. They are kept ahead of it by no more than this,
# which with the wire's own window bounds what an IO worker grows by.
_THREADS = min(2, os.cpu_count() or 1)
_BYTES_AHEAD = 8 * MIB
# Handing work to a thread and back takes as long as the checksum of about this many bytes.
_WORTH_A_THREAD = 256 * KIB
_DECODED_TOGETHER = 2 * MIB

# Receives chunks, given by their numbers, into memory; yields as each is there, in order.
Receive = Callable[[Iterable[tuple[int, memoryview]]], Iterator[None]]


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object to be stored. `data` is read in place and must not change until it is stored."""

    object_id: str
    ray_metadata: bytes
    owner_address: bytes
    data: memoryview


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

    `job` compresses and checksums it, if that is to be, or seals it with `seal`; `ratio` is what
    that is expected to leave.
    """

    source: SourceObject
    name: ObjectName
    seal: Seal | None
    index: int
    data: memoryview
    ratio: float
    job: _Job[tuple[Chunk, Buffer]] | None


class _Part(NamedTuple):
    """A chunk on its way out of the store: what its header tells, its bytes, and their place."""

    number: int
    chunk: Chunk
    stored: memoryview
    slot: memoryview


class Packer:
    """Makes values of objects, and fills objects from them. For one thread at a time.

    Args:
        config: how chunks are cut and compressed.
        keyspace: the keys of what is made.
    """

    def __init__(self, config: Config, keyspace: Keyspace) -> None:
        self._keys = keyspace
        self._chunk_size = config.chunk_size
        self._compression = config.compression
        self._chunks_ahead = max(1, min(2 * _THREADS, _BYTES_AHEAD // config.chunk_size))
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the threads; there are new ones when they are needed."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def chunk_count(self, size: int) -> int:
        """How many chunks an object of `size` bytes is cut into; 0 if it is inline."""
        inline = size <= min(INLINE_LIMIT, self._chunk_size)
        return 0 if inline else chunk_count(size, self._chunk_size)

    # --- objects to values ---

    def pack(
        self, named: Iterable[tuple[SourceObject, ObjectName]], sealing: Key | None
    ) -> Generator[Value]:
        """Yield the chunks and then the header of each object.

        Threads compress, checksum and seal chunks, a bounded number of them ahead. A chunk that is
        neither compressed nor sealed is checksummed here, just after it was sent, while it is in
        this core's cache: a core reads memory no faster than the wire takes it.
        """
        ahead: deque[_Piece] = deque()
        chunks: list[Chunk] = []
        try:
            for piece in _lookahead(self._pieces(named, sealing), self._chunks_ahead, ahead):
                name, size = piece.name, len(piece.source.data)
                header_key = self._keys.header(name)
                expected = 0
                if piece.index == 0:
                    chunks, expected = [], int(size * piece.ratio)
                chunk, stored = piece.job.result() if piece.job else (None, piece.data)
                if name.chunks:
                    key = f"{header_key}:{piece.index}"
                    yield Value(key, name, size, [stored], expected)
                chunks.append(chunk or Chunk(len(stored), Codec.RAW, checksum(stored)))
                if piece.index + 1 >= name.chunks:
                    header = self._header(piece, chunks, stored)
                    expected = 0 if name.chunks else expected
                    yield Value(header_key, name, size, header, expected, is_last=True)
        finally:
            # The caller may take its memory back once this is over.
            wait([piece.job for piece in ahead if isinstance(piece.job, Future)])

    def _header(self, piece: _Piece, chunks: list[Chunk], stored: Buffer) -> list[Buffer]:
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
            seal=piece.seal,
        )
        return encode_header(header, [stored] if inline else [])

    def _pieces(
        self, named: Iterable[tuple[SourceObject, ObjectName]], key: Key | None
    ) -> Iterator[_Piece]:
        """All objects cut to pieces; drawing one starts its compression and its sealing."""
        for source, name in named:
            size = len(source.data)
            ratio = self._ratio(source.data)
            pays = size > 0 and (ratio < 1 or self._compression == "lz4")
            seal = key.seal(self._keys.header(name)) if key is not None else None
            for index, start in enumerate(range(0, max(1, size), self._chunk_size)):
                data = source.data[start : start + self._chunk_size]
                job: _Job[tuple[Chunk, Buffer]] | None = None
                if seal is not None:
                    job = self._start(len(data), _sealed, data, pays, seal, index)
                elif pays:
                    job = self._start(len(data), _compressed, data)
                yield _Piece(source, name, seal, index, data, ratio, job)

    def _ratio(self, data: memoryview) -> float:
        """What storing `data` is expected to take of its length; 1 if it is stored raw."""
        return expected_ratio(data) if self._compression != "none" and data else 1.0

    def _start(self, size: int, work: Callable[..., _T], *args: Any) -> Future[_T] | _Done[_T]:
        """Have a thread do `work` on `size` bytes, or do it now if that is faster."""
        if size < _WORTH_A_THREAD:
            return _Done(work(*args))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ray-valkey-spill")
        return self._pool.submit(work, *args)

    # --- values to objects ---

    def unpack(
        self, header: Header, target: memoryview, numbers: Sequence[int], receive: Receive
    ) -> Sequence[int]:
        """Receive some chunks into their places; returns those that are damaged.

        Raw chunks are received in place, and checked at once, while they are in this core's cache.
        Others are checked and decompressed in threads, some at a time; sealed ones are opened there
        before their places see anything of them.
        """
        asked: deque[_Part] = deque()
        together: list[_Part] = []
        decoding: deque[_Job[list[int]]] = deque()
        damaged: list[int] = []

        def in_place(chunk: Chunk) -> bool:
            return chunk.codec is Codec.RAW and header.seal is None

        def wanted() -> Iterator[tuple[int, memoryview]]:
            for number in numbers:
                chunk, slot = header.chunks[number], target[header.span(number)]
                stored = slot if in_place(chunk) else scratch(chunk.stored_size)
                asked.append(_Part(number, chunk, stored, slot))
                yield number, stored

        def decode(leave: int) -> None:
            if together:
                size = sum(len(part.slot) for part in together)
                decoding.append(self._start(size, _decode, together.copy(), header.seal))
                together.clear()
            while len(decoding) > leave:
                damaged.extend(decoding.popleft().result())

        try:
            for _ in receive(wanted()):
                part = asked.popleft()
                if not in_place(part.chunk):
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


def _sealed(data: memoryview, pays: bool, seal: Seal, number: int) -> tuple[Chunk, Buffer]:
    """As `_compressed`, if compression pays, and sealed. The tag is a better checksum."""
    codec, packed = compress(data) if pays else (Codec.RAW, data)
    stored = scratch(len(packed) + TAG_SIZE)
    seal.seal_chunk(number, packed, stored)
    return Chunk(len(stored), codec, 0), stored


def _decode(parts: Sequence[_Part], seal: Seal | None) -> list[int]:
    """Put the data of chunks into their slots; returns those that are damaged."""
    damaged = []
    for number, chunk, stored, slot in parts:
        if seal is not None:
            try:
                stored = _opened(seal, number, stored)
            except LostObjectError:
                damaged.append(number)
                continue
        elif checksum(stored) != chunk.checksum:
            damaged.append(number)
            continue
        unpack_chunk(chunk, stored, slot)
    return damaged


def _opened(seal: Seal, number: int, stored: memoryview) -> memoryview:
    data = scratch(len(stored) - TAG_SIZE)
    seal.open_chunk(number, stored, data)
    return data


def unpack_chunk(chunk: Chunk, stored: memoryview, target: memoryview) -> None:
    """Put the data of a chunk, which has been checked and is not sealed, into their place."""
    if chunk.codec is not Codec.RAW:
        decompress_into(stored, target)
    elif target:
        copy_into(stored, target)
