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
from itertools import repeat
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
    stream = _encode_stream(header)
    seal = header.seal
    if seal is None:
        trailer = _TRAILER.pack(_MAGIC, FORMAT_VERSION, 0, len(stream), checksum(stream))
        return [stream, *payload, trailer]
    size = len(stream) + TAG_SIZE
    trailer = _TRAILER.pack(_MAGIC, FORMAT_VERSION, _SEALED, size, seal.key_id)
    return [seal.seal_header(stream, trailer[:_BOUND]), *payload, trailer]


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


# --- the stream ---


class _Fields(NamedTuple):
    """What varies in a stream, as bytes; `inline`, or else the columns, are empty."""

    object_id: bytes
    ray_metadata: bytes
    owner_address: bytes
    size: bytes
    chunk_size: bytes
    inline: bytes
    sizes: bytes
    codecs: bytes
    checksums: bytes

    @classmethod
    def of(cls, header: Header) -> _Fields:
        inline = sizes = codecs = checksums = b""
        if header.inline:
            (chunk,) = header.chunks
            inline = b"%d %d %d" % chunk
        else:
            count = len(header.chunks)
            columns = zip(*header.chunks) if header.chunks else ((), (), ())
            kinds = (struct.pack(f"<{count}{c}", *column) for c, column in zip("IBQ", columns))
            sizes, codecs, checksums = kinds
        return cls(
            header.object_id.encode(),
            header.ray_metadata,
            header.owner_address,
            b"%d" % header.size,
            b"%d" % header.chunk_size,
            inline,
            sizes,
            codecs,
            checksums,
        )

    def header(self) -> Header:
        """Raises ValueError if they cannot be those of one."""
        if self.inline:
            size, codec, digest = map(int, self.inline.split())
            chunks = [Chunk(size, Codec(codec), digest)]
        else:
            count = len(self.codecs)
            columns = (
                struct.unpack(f"<{count}I", self.sizes),
                map(Codec, self.codecs) if set(self.codecs) - {0} else repeat(Codec.RAW, count),
                struct.unpack(f"<{count}Q", self.checksums),
            )
            chunks = list(map(Chunk, *columns))
        return Header(
            object_id=self.object_id.decode(),
            ray_metadata=self.ray_metadata,
            owner_address=self.owner_address,
            size=int(self.size),
            chunk_size=int(self.chunk_size),
            chunks=chunks,
            inline=bool(self.inline),
        )


class _Template:
    """A stream without its fields, which only those of certain lengths fit.

    Arrow takes some ten times as long for a stream as it takes to put fields in their places. So
    Arrow makes two streams of each shape, whose fields have no byte in common: where these differ,
    there are the fields.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        blank = _arrow_stream(_Fields(*(bytes(length) for length in lengths)))
        marked = _arrow_stream(
            _Fields(*(bytes([1 + i]) * length for i, length in enumerate(lengths)))
        )
        # Between two constants is the field with that number.
        self._constants: list[bytes] = []
        self._numbers: list[int] = []
        self._lengths = lengths
        start = 0
        for _ in lengths:
            position = self._place(blank, marked, start)
            if position == len(blank):
                break
            number = marked[position] - 1
            self._constants.append(blank[start:position])
            self._numbers.append(number)
            start = position + lengths[number]
        self._constants.append(blank[start:])
        self.size = len(blank)

    @staticmethod
    def _place(blank: bytes, marked: bytes, start: int) -> int:
        return next((i for i in range(start, len(blank)) if blank[i] != marked[i]), len(blank))

    def stream(self, fields: _Fields) -> bytes:
        parts: list[bytes] = []
        for constant, number in zip(self._constants, self._numbers):
            parts += (constant, fields[number])
        parts.append(self._constants[-1])
        return b"".join(parts)

    def fields(self, stream: bytes) -> _Fields | None:
        """The fields of a stream; None if it has another shape."""
        found = [b""] * len(self._lengths)
        start = 0
        for constant, number in zip(self._constants, self._numbers):
            start += len(constant)
            found[number] = stream[start : start + self._lengths[number]]
            start += self._lengths[number]
        fields = _Fields(*found)
        return fields if self.stream(fields) == stream else None


# Of shapes that were seen, by the lengths of the fields, and by that of the stream.
_MOST_TEMPLATES = 512
_by_lengths: dict[tuple[int, ...], _Template] = {}
_by_size: dict[int, list[_Template]] = {}


def _template(fields: _Fields) -> _Template:
    lengths = tuple(map(len, fields))
    template = _by_lengths.get(lengths)
    if template is None:
        template = _Template(lengths)
        if len(_by_lengths) >= _MOST_TEMPLATES:
            _by_lengths.clear()
            _by_size.clear()
        _by_lengths[lengths] = template
        _by_size.setdefault(template.size, []).append(template)
    return template


def _encode_stream(header: Header) -> bytes:
    fields = _Fields.of(header)
    return _template(fields).stream(fields)


def _arrow_stream(fields: _Fields) -> bytes:
    metadata = {
        "version": str(FORMAT_VERSION),
        "object_id": fields.object_id,
        "ray_metadata": fields.ray_metadata,
        "owner_address": fields.owner_address,
        "size": fields.size,
        "chunk_size": fields.chunk_size,
    }
    if fields.inline:
        metadata["inline"] = fields.inline
        return bytes(_NO_COLUMNS.with_metadata(metadata).serialize()) + _END_OF_STREAM
    schema = _CHUNKS.with_metadata(metadata)
    count = len(fields.codecs)
    columns = [
        pa.Array.from_buffers(kind.type, count, [None, pa.py_buffer(data)])
        for kind, data in zip(_CHUNKS, (fields.sizes, fields.codecs, fields.checksums))
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    return b"".join((schema.serialize(), batch.serialize(), _END_OF_STREAM))


def _parse_stream(stream: memoryview) -> Header:
    data = bytes(stream)
    for template in _by_size.get(len(data), ()):
        fields = template.fields(data)
        if fields is not None:
            return fields.header()
    header = _parse_by_arrow(stream)
    # The next one of the same shape is parsed faster.
    _template(_Fields.of(header))
    return header


def _parse_by_arrow(stream: memoryview) -> Header:
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
            batch = reader.read_next_batch()
        # Arrow does not hold a stream to what its schema says of them.
        if any(column.null_count for column in batch.columns):
            raise ValueError("missing values")
        columns = [column.to_pylist() for column in batch.columns]
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
    more = 0 if header.seal is None else TAG_SIZE
    full = header.chunk_size + more
    last = header.size - (wanted - 1) * header.chunk_size + more if wanted else 0
    for index, (stored, codec, _) in enumerate(header.chunks):
        size = full if index < wanted - 1 else last
        if stored > size or (codec is Codec.RAW and stored != size):
            raise LostObjectError(f"its header gives chunk {index} a wrong size")


def _too_new(version: int) -> str:
    return (
        f"it was written in format {version}, and this version of ray-valkey-spill reads up to "
        f"format {FORMAT_VERSION}: upgrade it on this node"
    )
