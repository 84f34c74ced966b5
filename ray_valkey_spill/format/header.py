"""The byte format of a spilled object's header. Pure.

A header value is an Arrow IPC stream, the payload of an inline object, and a trailer:

    [ Arrow IPC stream ][ payload of an inline object ][ trailer, 20 bytes ]

`pyarrow.ipc.open_stream(value)` alone reads the stream, up to its end-of-stream marker. The
schema's metadata hold the format version, the object's id, Ray's metadata, the owner's address, and
the sizes in bytes. The stream has one row per chunk: its stored size in bytes, its codec, and the
XXH3-64 of its stored bytes. For an inline payload these are metadata too, without rows or columns,
which takes a third of the time.

The trailer is little-endian: magic "RVSP", version (u16), flags (u16), length of the stream (u32),
XXH3-64 of the stream (u64). It is checked before Arrow reads a byte.

For a sealed object the flags are 1, else 0. `sealing` then seals the stream, the payload and each
chunk separately, and `pyarrow` alone reads none of them. The stream's length and the stored sizes
include the tags, and the checksum of each chunk is 0. The trailer's last field is the id of the
key; its other fields are authenticated with the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import itemgetter
from typing import NamedTuple

import pyarrow as pa

from ray_valkey_spill.errors import ConfigError, LostObjectError
from ray_valkey_spill.format.codec import CODECS, Codec, checksum, scratch
from ray_valkey_spill.format.sealing import TAG_SIZE, KeyRing, Seal
from ray_valkey_spill.units import Buffer

__all__ = [
    "FORMAT_VERSION",
    "TRAILER_SIZE",
    "Chunk",
    "Header",
    "chunk_count",
    "decode_header",
    "decode_without_payload",
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
_BOUND = 12  # bytes of the trailer that are authenticated: all but the id of the key
# Bytes of a header without chunks, with a few hundred from Ray; and of a row, 13 with padding.
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
    """The header's entry for one chunk. The checksum of a sealed chunk is 0."""

    stored_size: int
    codec: Codec
    checksum: int


@dataclass(slots=True)
class Header:
    """Everything about a spilled object except its data.

    Attributes:
        object_id: the object's id, in hex.
        ray_metadata: metadata of Ray's object, for example `b"PYTHON"` or the number of an error.
        owner_address: address of the object's owner, as Ray serializes it.
        size: length of the data, in bytes.
        chunk_size: bytes of data in each chunk but the last.
        chunks: one entry per chunk; one for an inline payload.
        inline: whether the payload is stored in the header's own key.
        seal: seals the header and the chunks; None if they are not sealed.
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
        """Return the slice of the object's data that chunk `index` holds."""
        start = index * self.chunk_size
        return slice(start, min(start + self.chunk_size, self.size))


def chunk_count(size: int, chunk_size: int) -> int:
    return -(-size // chunk_size)


def encode_header(header: Header, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the header's value as buffers to send in order. `payload` is not copied.

    If the header has a seal, the stream is sealed here; `payload` must already be sealed.
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
    """Return the header in `value`, and its payload (empty unless the object is inline).

    The header is checked for consistency, and a sealed payload is opened. The checksum of a payload
    that is not sealed is not checked.

    Args:
        value: the stored bytes.
        name: the key that they are stored under; needed if they are sealed.
        keys: keys to open a sealed header. If given, a header that is not sealed is refused.

    Raises:
        LostObjectError: `value` is damaged, was written by a newer version, or is not sealed
            although `keys` are given.
        ConfigError: `value` is sealed with a key that is not in `keys`, or `keys` is None.
    """
    view = memoryview(value)
    if len(view) < _TRAILER.size:
        raise LostObjectError(f"its header is cut off ({len(view)} bytes)")
    trailer = view[-_TRAILER.size :]
    payload_end = len(view) - _TRAILER.size
    stream_size = _stream_size(trailer, payload_end)
    stream, payload = view[:stream_size], view[stream_size:payload_end]
    header = _decode_stream(stream, trailer, name, keys)
    seal = header.seal
    _check_consistency(header, len(payload))
    if seal is not None and header.inline:
        payload, sealed = scratch(len(payload) - TAG_SIZE), payload
        seal.open_chunk(0, sealed, payload)
    return header, payload


def decode_without_payload(value: Buffer, name: str, keys: KeyRing | None = None) -> Header:
    """As `decode_header`, for a value without its payload: a stream and its trailer.

    The header is not checked for consistency with its payload.
    """
    view = memoryview(value)
    stream, trailer = view[: -_TRAILER.size], view[-_TRAILER.size :]
    if len(view) < _TRAILER.size or _stream_size(trailer, len(stream)) != len(stream):
        raise LostObjectError("its header is damaged (wrong length)")
    return _decode_stream(stream, trailer, name, keys)


def _stream_size(trailer: memoryview, most: int) -> int:
    """Return the length of the stream before `trailer`; raises LostObjectError if it is wrong."""
    magic, version, flags, stream_size, _ = _TRAILER.unpack(trailer)
    if magic != _MAGIC:
        raise LostObjectError("its header is damaged (no trailer)")
    if version > FORMAT_VERSION:
        raise LostObjectError(_too_new(version))
    if stream_size > most or flags not in (0, _SEALED):
        raise LostObjectError("its header is damaged (wrong trailer)")
    return int(stream_size)


def _decode_stream(
    stream: memoryview, trailer: memoryview, name: str, keys: KeyRing | None
) -> Header:
    """Check, open and parse the stream of a header. Arguments and errors as `decode_header`."""
    _, _, flags, _, last = _TRAILER.unpack(trailer)
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
            "it is not sealed although encryption_key_file is given: its writer had no key"
        )
    try:
        header = _parse_stream(stream)
    except (pa.ArrowException, OSError, EOFError, KeyError, ValueError, StopIteration) as error:
        raise LostObjectError(f"its header is damaged ({error})") from error
    header.seal = seal
    return header


def key_id(value: Buffer) -> int | None:
    """Return the id of the key that a header's value names; None if it names none."""
    if len(value) < TRAILER_SIZE:
        return None
    magic, _, flags, _, last = _TRAILER.unpack(memoryview(value)[-TRAILER_SIZE:])
    return int(last) if magic == _MAGIC and flags == _SEALED else None


def format_version(value: Buffer) -> int:
    """Return the format version of a header that can be decoded."""
    _, version, _, _, _ = _TRAILER.unpack(value[-TRAILER_SIZE:])
    return int(version)


def header_size(trailer: Buffer) -> int:
    """Return the length of a header's value without payload, in bytes, from its trailer.

    `trailer` is the value's last `TRAILER_SIZE` bytes. Returns 0 if they are not a trailer.
    """
    if len(trailer) != TRAILER_SIZE:
        return 0
    magic, _, _, stream_size, _ = _TRAILER.unpack(trailer)
    return stream_size + TRAILER_SIZE if magic == _MAGIC else 0


def largest_header(chunks: int) -> int:
    """Return an upper bound for the length of a header without payload, in bytes.

    A longer value was not written by this package, and need not be read to know that.
    """
    return _LARGEST_METADATA + chunks * _BYTES_PER_CHUNK


# --- the stream ---


class _Fields(NamedTuple):
    """The variable parts of a stream, as bytes. Either `inline` or the columns are empty."""

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
        """Return the header with these fields.

        Raises ValueError, or KeyError for an unknown codec, if they are not valid.
        """
        if self.inline:
            size, codec, digest = map(int, self.inline.split())
            chunks = [Chunk(size, CODECS[codec], digest)]
        else:
            count = len(self.codecs)
            columns = (
                struct.unpack(f"<{count}I", self.sizes),
                map(CODECS.__getitem__, self.codecs),
                struct.unpack(f"<{count}Q", self.checksums),
            )
            # As `Chunk._make`, but without a Python frame for each row.
            chunks = list(map(tuple.__new__, repeat(Chunk), zip(*columns)))
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
    """A stream without its fields, for fields of certain lengths.

    Arrow takes about ten times as long to build a stream as it takes to fill in a template. So
    Arrow builds two streams of each shape, with different bytes in every field: the positions where
    they differ are the fields.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        blank = _arrow_stream(_Fields(*(bytes(length) for length in lengths)))
        marked = _arrow_stream(
            _Fields(*(bytes([1 + i]) * length for i, length in enumerate(lengths)))
        )
        # After each constant but the last comes the field with the number at the same index.
        self._numbers: list[int] = []
        constants: list[slice] = []
        fields = [slice(0, 0)] * len(lengths)
        start = 0
        for _ in lengths:
            position = self._place(blank, marked, start)
            if position == len(blank):
                break
            number = marked[position] - 1
            self._numbers.append(number)
            constants.append(slice(start, position))
            start = position + lengths[number]
            fields[number] = slice(position, start)
        constants.append(slice(start, len(blank)))
        self._constants_of = itemgetter(*constants)
        self._fields_of = itemgetter(*fields)
        self._constants: tuple[bytes, ...] = self._constants_of(blank)
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
        """Return the fields of a stream; None if it has another shape."""
        if len(stream) != self.size or self._constants_of(stream) != self._constants:
            return None
        return _Fields(*self._fields_of(stream))


# Templates of the shapes seen so far, by the lengths of their fields and by that of the stream.
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
    templates = _by_size.get(len(data), [])
    for index, template in enumerate(templates):
        fields = template.fields(data)
        if fields is not None:
            if index:
                # Objects of a kind come together: try this one first the next time.
                templates.insert(0, templates.pop(index))
            return fields.header()
    header = _parse_by_arrow(stream)
    # Makes parsing faster for the next stream of this shape.
    _template(_Fields.of(header))
    return header


def _parse_by_arrow(stream: memoryview) -> Header:
    # Not `read_schema`: it ends the process if the first message is no schema.
    with pa.ipc.open_stream(stream) as reader:
        metadata = reader.schema.metadata or {}
        version = int(metadata[b"version"])
        if version > FORMAT_VERSION:
            raise LostObjectError(_too_new(version))
        inline = metadata.get(b"inline")
        if not reader.schema.equals(_CHUNKS if inline is None else _NO_COLUMNS):
            raise ValueError("unexpected columns")
        if inline is None:
            chunks = _rows(reader.read_next_batch())
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


def _rows(batch: pa.RecordBatch) -> list[Chunk]:
    # Arrow has not compared the buffers with the number of rows, nor the rows with the schema.
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise ValueError("missing values")
    columns = [column.to_pylist() for column in batch.columns]
    return [Chunk(size, Codec(codec), digest) for size, codec, digest in zip(*columns)]


def _check_consistency(header: Header, payload_size: int) -> None:
    if header.size < 0 or header.chunk_size < 1:
        raise LostObjectError(
            f"its header gives {header.size} bytes in chunks of {header.chunk_size}"
        )
    wanted = 1 if header.inline else chunk_count(header.size, header.chunk_size)
    if len(header.chunks) != wanted:
        raise LostObjectError(f"its header has {len(header.chunks)} rows for {wanted} chunks")
    if payload_size != (header.chunks[0].stored_size if header.inline else 0):
        raise LostObjectError(f"its header has a payload of {payload_size} bytes")
    more = 0 if header.seal is None else TAG_SIZE
    full = header.chunk_size + more
    last = header.size - (wanted - 1) * header.chunk_size + more if wanted else 0
    size = full
    for index, (stored, codec, _) in enumerate(header.chunks):
        if index == wanted - 1:
            size = last
        if stored != size and (stored > size or codec is Codec.RAW):
            raise LostObjectError(f"its header gives chunk {index} a wrong size")


def _too_new(version: int) -> str:
    return (
        f"it was written in format {version}, and this version of ray-valkey-spill reads up to "
        f"format {FORMAT_VERSION}: upgrade it on this node"
    )
