"""Turns objects into values and back: cuts, compresses, seals and checks, in threads if it pays.

An object of up to `INLINE_LIMIT` bytes (and one chunk) is stored with its header in one key. A
larger one is cut into chunks of `chunk_size` bytes, one per key. No object is ever buffered whole:
raw chunks move between the caller's memory and the socket without a copy, and threads work in order
and a bounded number of chunks ahead of the network.

With an `encryption_key_file`, the same threads seal everything. They open chunks in separate
memory, so that only authenticated bytes reach the caller's.
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

# Two threads saturate one connection. They run ahead of it by at most this many bytes, which with
# the connection's window bounds the memory of an IO worker.
_THREADS = min(2, os.cpu_count() or 1)
_BYTES_AHEAD = 8 * MIB
# Bytes; handing work to a thread takes as long as the checksum of about this many.
_WORTH_A_THREAD = 256 * KIB
_DECODED_TOGETHER = 2 * MIB

# Receives chunks, given as (number, memory); yields once for each as it arrives, in order.
Receive = Callable[[Iterable[tuple[int, memoryview]]], Iterator[None]]


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object to store. `data` is read in place, and must not change until it is stored."""

    object_id: str
    ray_metadata: bytes
    owner_address: bytes
    data: memoryview


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Done(Generic[_T]):
    """The result of work that was not worth a thread, in place of a future."""

    value: _T

    def result(self) -> _T:
        return self.value


_Job = Future[_T] | _Done[_T]


@dataclass(slots=True)
class _Piece:
    """A chunk of an object to put, or all of an inline object.

    `job` compresses and checksums it, or seals it with `seal`; None for a raw chunk. `ratio` is the
    fraction of the object that compression is expected to leave.
    """

    source: SourceObject
    name: ObjectName
    seal: Seal | None
    index: int
    data: memoryview
    ratio: float
    job: _Job[tuple[Chunk, Buffer]] | None


class _Part(NamedTuple):
    """A chunk being fetched: its header entry, its stored bytes, and the slot for its data."""

    number: int
    chunk: Chunk
    stored: memoryview
    slot: memoryview


class Packer:
    """Turns objects into values, and fills objects from values. Not thread-safe.

    Args:
        config: chunk size and compression.
        keyspace: keys of the values.
    """

    def __init__(self, config: Config, keyspace: Keyspace) -> None:
        self._keys = keyspace
        self._chunk_size = config.chunk_size
        self._compression = config.compression
        self._chunks_ahead = max(1, min(2 * _THREADS, _BYTES_AHEAD // config.chunk_size))
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the threads. The next use that needs threads starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def chunk_count(self, size: int) -> int:
        """Return the number of chunks of an object of `size` bytes; 0 if it is inline."""
        inline = size <= min(INLINE_LIMIT, self._chunk_size)
        return 0 if inline else chunk_count(size, self._chunk_size)

    # --- objects to values ---

    def pack(
        self, named: Iterable[tuple[SourceObject, ObjectName]], sealing: Key | None
    ) -> Generator[Value]:
        """Yield the chunks and then the header of each object.

        Threads compress, checksum and seal a bounded number of chunks ahead. The calling thread
        checksums a chunk that is neither compressed nor sealed just after it was sent, while it is
        in the core's cache: a core reads memory no faster than the wire takes it.
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
            # The caller may take its memory back after this.
            _await(piece.job for piece in ahead)

    def _header(self, piece: _Piece, chunks: list[Chunk], stored: Buffer) -> list[Buffer]:
        """Return the value that completes the object; `piece` is its last piece."""
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
        """Yield the pieces of all objects. Drawing a piece starts its compression or sealing."""
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
        """Return the fraction of `data` that is expected to be stored; 1 if it is stored raw."""
        return expected_ratio(data) if self._compression != "none" and data else 1.0

    def _start(self, size: int, work: Callable[..., _T], *args: Any) -> Future[_T] | _Done[_T]:
        """Run `work` on `size` bytes in a thread, or here if that is faster or no thread starts."""
        if size < _WORTH_A_THREAD:
            return _Done(work(*args))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ray-valkey-spill")
        try:
            return self._pool.submit(work, *args)
        except RuntimeError:  # a limit on processes, such as a container's
            # The pool has taken the work all the same, and one of its threads may do it.
            pool, self._pool = self._pool, None
            pool.shutdown()
            return _Done(work(*args))

    # --- values to objects ---

    def unpack(
        self, header: Header, target: memoryview, numbers: Sequence[int], receive: Receive
    ) -> Sequence[int]:
        """Receive the chunks `numbers` into `target`; return the numbers of damaged ones.

        Raw chunks are received in place and checked at once, while they are in this core's cache.
        Threads check and decompress the others, several at a time. They open a sealed chunk in
        separate memory, so that `target` gets only authenticated bytes.
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
            # No thread may write into `target` after this.
            _await(decoding)
        return sorted(damaged)


def _lookahead(items: Iterable[_T], count: int, ahead: deque[_T]) -> Iterator[_T]:
    """Yield `items`, keeping the next `count` of them already drawn, in `ahead`."""
    for item in items:
        ahead.append(item)
        if len(ahead) > count:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _await(jobs: Iterable[_Job[Any] | None]) -> None:
    """Wait until no thread works on any of the jobs."""
    if futures := [job for job in jobs if isinstance(job, Future)]:
        wait(futures)


def _compressed(data: memoryview) -> tuple[Chunk, Buffer]:
    """Return the header entry of a chunk, and its stored bytes."""
    codec, stored = compress(data)
    return Chunk(len(stored), codec, checksum(stored)), stored


def _sealed(data: memoryview, pays: bool, seal: Seal, number: int) -> tuple[Chunk, Buffer]:
    """As `_compressed` if compression pays, and sealed. The tag replaces the checksum."""
    codec, packed = compress(data) if pays else (Codec.RAW, data)
    stored = scratch(len(packed) + TAG_SIZE)
    seal.seal_chunk(number, packed, stored)
    return Chunk(len(stored), codec, 0), stored


def _decode(parts: Sequence[_Part], seal: Seal | None) -> list[int]:
    """Decode chunks into their slots; return the numbers of damaged ones."""
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
    """Decode a chunk that has been checked, and is not sealed, into `target`."""
    if chunk.codec is not Codec.RAW:
        decompress_into(stored, target)
    elif target:
        copy_into(stored, target)
