"""How a spilled object looks in bytes: the header. Pure.

A header value is an Arrow IPC stream, then for a small object its payload, then a trailer:

    [ Arrow IPC stream ][ payload of an inline object ][ trailer, 20 bytes ]

`pyarrow.ipc.open_stream(value)` alone reads the stream; it stops at its end-of-stream marker. Its
schema's metadata hold the format's version, the object's id, Ray's metadata, the owner's address,
and the sizes in bytes. It has one row a chunk: the stored size in bytes, the codec, and the XXH3-64
of the stored bytes. For an inline payload these are metadata too, and it has no rows and no
columns: that takes a third of the time.

The trailer is little-endian: magic "RVSP", version (u16), flags (u16), length of the stream (u32),
XXH3-64 of the stream (u64). It is checked before Arrow sees a byte.

Where objects are sealed (flags are 1, else 0), stream, payload and chunks are each stored as
`sealing` made them, and `pyarrow` alone reads none of them. Sizes in the trailer and in the header
are those of what is stored; a chunk has a tag then, and its checksum is 0. The last field of the
trailer is the id of the key; the rest of it is sealed with the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from ray_valkey_spill.errors import ConfigError, LostObjectError
from ray_valkey_spill.format.codec import Codec, checksum, scratch
from ray_valkey_spill.format.sealing import TAG_SIZE, KeyRing, Seal
from ray_valkey_spill.units import Buffer

__all__ = [
    "FORMAT_VERSION",
    "TRAILER_SIZE",
    "Chunk",
    "Header",
    "chunk_count",
    "decode_header",
    "encode_header",
    "format_version",
    "header_size",
    "key_id",
    "largest_header",
]

FORMAT_VERSION = 1

_MAGIC = b"RVSP"
_TRAILER = struct.Struct("<4sHHIQ")
TRAILER_SIZE = _TRAILER.size
_SEALED = 1
_BOUND = 12  # bytes of the trailer: all but what tells which key to try
# Of a header without chunks: what Ray gives for one is some hundred bytes. And for each chunk: 13,
# padded.
_LARGEST_METADATA = 1 << 20
_BYTES_PER_CHUNK = 16
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_NO_COLUMNS = pa.schema([])
_CHUNKS = pa.schema(
    [
        pa.field("stored_size", pa.uint32(), nullable=False),
        pa.field("codec", pa.uint8(), nullable=False),
        pa.field("xxh3_64", pa.uint64(), nullable=False),
    ]
)


class Chunk(NamedTuple):
    """What the header tells of one chunk; the checksum of a sealed one is 0."""

    stored_size: int
    codec: Codec
    checksum: int


@dataclass(slots=True)
class Header:
    """All there is to know of a spilled object but its data.

    Attributes:
        object_id: hex of the object's id.
        ray_metadata: the metadata of Ray's object (such as `b"PYTHON"`, or the number of an error).
        owner_address: Ray's serialized address of the owner.
        size: length of the data in bytes.
        chunk_size: bytes of data in each chunk but the last.
        chunks: one entry a chunk; one for an inline payload.
        inline: whether the payload lies in the header's own key.
        seal: what seals it and its chunks, or None.
    """

    object_id: str
    ray_metadata: bytes
    owner_address: bytes
    size: int
    chunk_size: int
    chunks: Sequence[Chunk] = field(default=())
    inline: bool = False
    seal: Seal | None = field(default=None, compare=False)

    @property
    def stored_size(self) -> int:
        """Bytes of payload on the server."""
        return sum(chunk.stored_size for chunk in self.chunks)

    def span(self, index: int) -> slice:
        """Where in the object's data chunk `index` lies."""
        start = index * self.chunk_size
        return slice(start, min(start + self.chunk_size, self.size))


def chunk_count(size: int, chunk_size: int) -> int:
    return -(-size // chunk_size)


def encode_header(header: Header, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """The header's value as buffers to be sent one after the other; `payload` is not copied.

    It is sealed if the header has a seal; `payload` has to be by then.
    """
    metadata = {
        "version": str(FORMAT_VERSION),
        "object_id": header.object_id,
        "ray_metadata": header.ray_metadata,
        "owner_address": header.owner_address,
        "size": str(header.size),
        "chunk_size": str(header.chunk_size),
    }
    if header.inline:
        (chunk,) = header.chunks
        metadata["inline"] = f"{chunk.stored_size} {int(chunk.codec)} {chunk.checksum}"
        stream = _NO_COLUMNS.with_metadata(metadata).serialize().to_pybytes() + _END_OF_STREAM
    else:
        schema = _CHUNKS.with_metadata(metadata)
        columns = [
            _column("I", pa.uint32(), [chunk.stored_size for chunk in header.chunks]),
            _column("B", pa.uint8(), [chunk.codec for chunk in header.chunks]),
            _column("Q", pa.uint64(), [chunk.checksum for chunk in header.chunks]),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        stream = b"".join((schema.serialize(), batch.serialize(), _END_OF_STREAM))
    seal = header.seal
    if seal is None:
        trailer = _TRAILER.pack(_MAGIC, FORMAT_VERSION, 0, len(stream), checksum(stream))
        return [stream, *payload, trailer]
    size = len(stream) + TAG_SIZE
    trailer = _TRAILER.pack(_MAGIC, FORMAT_VERSION, _SEALED, size, seal.key_id)
    return [seal.seal_header(stream, trailer[:_BOUND]), *payload, trailer]


def _column(code: str, kind: pa.DataType, values: list[int]) -> pa.Array:
    """An array of integers, given its `struct` code: a fifth of the time of `pa.array`."""
    data = pa.py_buffer(struct.pack(f"<{len(values)}{code}", *values))
    return pa.Array.from_buffers(kind, len(values), [None, data])


def decode_header(
    value: Buffer, name: str = "", keys: KeyRing | None = None
) -> tuple[Header, memoryview]:
    """The header in `value`, and the payload beside it (empty unless the object is inline).

    Everything in it has been checked against everything else; the payload's checksum has not. A
    sealed payload has been opened.

    Args:
        value: what is stored.
        name: of the key that it is stored under.
        keys: if they are given, only what is sealed is read.

    Raises:
        LostObjectError: if `value` is damaged, was written by a newer version, or is not sealed
            where it has to be.
        ConfigError: if it is sealed with a key that is not in `keys`, or there are none.
    """
    view = memoryview(value)
    if len(view) < _TRAILER.size:
        raise LostObjectError(f"its header is cut off ({len(view)} bytes)")
    trailer = view[-_TRAILER.size :]
    magic, version, flags, stream_size, last = _TRAILER.unpack(trailer)
    if magic != _MAGIC:
        raise LostObjectError("its header is damaged (no trailer)")
    if version > FORMAT_VERSION:
        raise LostObjectError(_too_new(version))
    payload_end = len(view) - _TRAILER.size
    if stream_size > payload_end or flags not in (0, _SEALED):
        raise LostObjectError("its header is damaged (wrong trailer)")
    stream, payload = view[:stream_size], view[stream_size:payload_end]
    is_plain = checksum(stream) == last
    seal = None
    if flags == _SEALED and keys is not None:
        seal, opened = keys.open_header(name, last, stream, trailer[:_BOUND])
        stream = memoryview(opened)
    elif flags == _SEALED and not is_plain:
        raise ConfigError(
            f"it is sealed with key {last:016x}, and no encryption_key_file is given here",
            "Give every node encryption_key_file, with that key in the file",
        )
    elif flags == _SEALED or not is_plain:
        raise LostObjectError("its header is damaged (wrong checksum)")
    elif keys is not None:
        raise LostObjectError(
            "it is not sealed, and encryption_key_file is given: somebody without a key wrote it"
        )
    try:
        header = _parse_stream(stream)
    except (pa.ArrowException, KeyError, ValueError, StopIteration) as error:
        raise LostObjectError(f"its header is damaged ({error})") from error
    header.seal = seal
    _check_consistency(header, len(payload))
    if seal is not None and header.inline:
        payload, sealed = scratch(len(payload) - TAG_SIZE), payload
        seal.open_chunk(0, sealed, payload)
    return header, payload


def key_id(value: Buffer) -> int | None:
    """The id of the key that a header's value says it is sealed with; None if it says of none."""
    if len(value) < TRAILER_SIZE:
        return None
    magic, _, flags, _, last = _TRAILER.unpack(memoryview(value)[-TRAILER_SIZE:])
    return int(last) if magic == _MAGIC and flags == _SEALED else None


def format_version(value: Buffer) -> int:
    """The format's version of a header that can be decoded."""
    _, version, _, _, _ = _TRAILER.unpack(value[-TRAILER_SIZE:])
    return int(version)


def header_size(trailer: Buffer) -> int:
    """The length of a header's value without payload, given its last `TRAILER_SIZE` bytes.

    0 if they are none.
    """
    if len(trailer) != TRAILER_SIZE:
        return 0
    magic, _, _, stream_size, _ = _TRAILER.unpack(trailer)
    return stream_size + TRAILER_SIZE if magic == _MAGIC else 0


def largest_header(chunks: int) -> int:
    """More than the length of any header's value, without payload, that tells of `chunks` chunks.

    What is longer was not written by us, and need not be read to know that.
    """
    return _LARGEST_METADATA + chunks * _BYTES_PER_CHUNK


def _parse_stream(stream: memoryview) -> Header:
    schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
    metadata = schema.metadata or {}
    version = int(metadata[b"version"])
    if version > FORMAT_VERSION:
        raise LostObjectError(_too_new(version))
    inline = metadata.get(b"inline")
    if not schema.equals(_CHUNKS if inline is None else _NO_COLUMNS):
        raise ValueError("unexpected columns")
    if inline is None:
        with pa.ipc.open_stream(stream) as reader:
            columns = [column.to_pylist() for column in reader.read_next_batch().columns]
        chunks = [Chunk(size, Codec(codec), digest) for size, codec, digest in zip(*columns)]
    else:
        size, codec, digest = map(int, inline.split())
        chunks = [Chunk(size, Codec(codec), digest)]
    return Header(
        object_id=metadata[b"object_id"].decode(),
        ray_metadata=metadata[b"ray_metadata"],
        owner_address=metadata[b"owner_address"],
        size=int(metadata[b"size"]),
        chunk_size=int(metadata[b"chunk_size"]),
        chunks=chunks,
        inline=inline is not None,
    )


def _check_consistency(header: Header, payload_size: int) -> None:
    if header.size < 0 or header.chunk_size < 1:
        raise LostObjectError(f"its header tells of {header.size} bytes, {header.chunk_size} each")
    wanted = 1 if header.inline else chunk_count(header.size, header.chunk_size)
    if len(header.chunks) != wanted:
        raise LostObjectError(f"its header has {len(header.chunks)} rows for {wanted} chunks")
    if payload_size != (header.stored_size if header.inline else 0):
        raise LostObjectError(f"its header has {payload_size} bytes beside it")
    for index, chunk in enumerate(header.chunks):
        span = slice(0, header.size) if header.inline else header.span(index)
        size = span.stop - span.start + (0 if header.seal is None else TAG_SIZE)
        if chunk.stored_size > size or (chunk.codec is Codec.RAW and chunk.stored_size != size):
            raise LostObjectError(f"its header gives chunk {index} a wrong size")


def _too_new(version: int) -> str:
    return (
        f"it was written in format {version}, and this version of ray-valkey-spill reads up to "
        f"format {FORMAT_VERSION}: upgrade it on this node"
    )
