from __future__ import annotations

import contextlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_valkey_spill.errors import ConfigError, LostObjectError
from ray_valkey_spill.format.codec import Codec, checksum, compress, decompress_into, expected_ratio
from ray_valkey_spill.format.header import (
    FORMAT_VERSION,
    TRAILER_SIZE,
    Chunk,
    Header,
    chunk_count,
    decode_header,
    encode_header,
    format_version,
    header_size,
)
from ray_valkey_spill.format.sealing import TAG_SIZE, KeyRing


def header(
    size: int = 2500,
    chunk_size: int = 1000,
    chunks: list[Chunk] | None = None,
    inline: bool = False,
) -> Header:
    if chunks is None:
        chunks = [
            Chunk(min(chunk_size, size - start), Codec.RAW, 2**64 - 1 - start)
            for start in range(0, size, chunk_size)
        ]
    return Header(
        object_id="ab" * 28,
        ray_metadata=b"PYTHON\x00\xff",
        owner_address=b"\x00owner\xff",
        size=size,
        chunk_size=chunk_size,
        chunks=chunks,
        inline=inline,
    )


def encoded(value: Header, payload: bytes = b"") -> bytes:
    return b"".join(encode_header(value, [payload] if payload else []))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2500, 1_000_000])
def test_a_header_is_read_back_as_it_was_written(size: int) -> None:
    got, payload = decode_header(encoded(header(size)))
    assert got == header(size)
    assert payload == b""


@given(
    object_id=st.text("0123456789abcdef", min_size=1, max_size=60),
    ray_metadata=st.binary(max_size=20),
    owner_address=st.binary(max_size=200),
    chunks=st.lists(
        st.tuples(st.integers(1, 1000), st.sampled_from(Codec), st.integers(0, 2**64 - 1)),
        max_size=40,
    ),
)
def test_any_header_is_what_arrow_would_write(
    object_id: str,
    ray_metadata: bytes,
    owner_address: bytes,
    chunks: list[tuple[int, Codec, int]],
) -> None:
    rows = [
        Chunk(1000 if codec is Codec.RAW else size, codec, digest) for size, codec, digest in chunks
    ]
    written = Header(object_id, ray_metadata, owner_address, 1000 * len(rows), 1000, rows)
    first, again = encoded(written), encoded(written)
    assert first == again
    assert decode_header(first)[0] == decode_header(first)[0] == written
    with pa.ipc.open_stream(first) as reader:
        table = reader.read_all()
    assert table.schema.metadata == {
        b"version": b"%d" % FORMAT_VERSION,
        b"object_id": object_id.encode(),
        b"ray_metadata": ray_metadata,
        b"owner_address": owner_address,
        b"size": b"%d" % written.size,
        b"chunk_size": b"1000",
    }
    assert [tuple(row.values()) for row in table.to_pylist()] == [tuple(map(int, r)) for r in rows]


def test_a_header_of_another_shape_with_the_same_meaning_is_read() -> None:
    """As another version of Arrow, or of this package, may write it."""
    value = encoded(header(2500))
    with pa.ipc.open_stream(value) as reader:
        table = reader.read_all()
    turned = dict(reversed(table.schema.metadata.items()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.with_metadata(turned)) as writer:
        writer.write_table(table)
    stream = sink.getvalue().to_pybytes()
    trailer = struct.pack("<4sHHIQ", b"RVSP", FORMAT_VERSION, 0, len(stream), checksum(stream))
    assert stream != value[:-TRAILER_SIZE]
    for _ in range(2):
        assert decode_header(stream + trailer)[0] == header(2500)


def test_an_inline_payload_lies_beside_the_header() -> None:
    data = b"payload" * 10
    inline = header(len(data), chunks=[Chunk(len(data), Codec.RAW, checksum(data))], inline=True)
    got, payload = decode_header(encoded(inline, data))
    assert got == inline
    assert payload == data


def test_pyarrow_alone_reads_a_header() -> None:
    data = b"x" * 70
    inline = header(70, chunks=[Chunk(70, Codec.RAW, 7)], inline=True)
    for value in (encoded(header(2500)), encoded(inline, data)):
        with pa.ipc.open_stream(value) as reader:
            table = reader.read_all()
        metadata = table.schema.metadata
        assert metadata[b"version"] == str(FORMAT_VERSION).encode()
        assert metadata[b"ray_metadata"] == b"PYTHON\x00\xff"
        assert metadata[b"owner_address"] == b"\x00owner\xff"
        if value.endswith(data + value[-20:]):
            assert metadata[b"inline"] == b"70 0 7"
        else:
            assert int(metadata[b"size"]) == sum(table["stored_size"].to_pylist())
            assert table.column_names == ["stored_size", "codec", "xxh3_64"]


@given(st.data())
def test_any_flipped_bit_of_a_header_is_noticed(data: st.DataObject) -> None:
    good = encoded(header(2500))
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LostObjectError):
        decode_header(bytes(bad))


NAME = "ray:spill:default:s:n:ab.0.3"


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    (tmp_path / "keys").write_text("ab" * 32)
    return KeyRing(str(tmp_path / "keys"))


@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
def test_a_sealed_header_is_read_back_with_its_key_and_name_alone(size: int, keys: KeyRing) -> None:
    seal = keys.current()[0].seal(NAME)
    sealed = replace(header(size), seal=seal)
    sealed.chunks = [
        chunk._replace(stored_size=chunk.stored_size + TAG_SIZE) for chunk in sealed.chunks
    ]
    value = encoded(sealed)
    got, payload = decode_header(value, NAME, keys)
    assert got == sealed
    assert got.seal is not None
    assert payload == b""
    assert header_size(value[-TRAILER_SIZE:]) == len(value)
    assert format_version(value) == FORMAT_VERSION
    with pytest.raises(LostObjectError, match="seal is broken"):
        decode_header(value, f"{NAME}0", keys)
    with pytest.raises(ConfigError, match="no encryption_key_file is given"):
        decode_header(value)
    with pytest.raises(LostObjectError, match="not sealed"):
        decode_header(encoded(header(size)), NAME, keys)
    # Sizes that do without the tags are not those of sealed chunks.
    with pytest.raises(LostObjectError, match="wrong size"):
        decode_header(encoded(replace(header(size), seal=seal)), NAME, keys)


def test_a_sealed_payload_is_opened_with_its_header(keys: KeyRing) -> None:
    data = b"payload" * 10
    seal = keys.current()[0].seal(NAME)
    stored = memoryview(bytearray(len(data) + TAG_SIZE))
    seal.seal_chunk(0, data, stored)
    chunks = [Chunk(len(stored), Codec.RAW, 0)]
    inline = replace(header(len(data), chunks=chunks, inline=True), seal=seal)
    value = encoded(inline, bytes(stored))
    got, payload = decode_header(value, NAME, keys)
    assert (got, payload) == (inline, data)
    bad = bytearray(value)
    bad[-TRAILER_SIZE - 1] ^= 1
    with pytest.raises(LostObjectError, match="seal is broken"):
        decode_header(bytes(bad), NAME, keys)


@given(st.integers(0, 1500))
def test_a_header_that_is_cut_off_is_noticed(length: int) -> None:
    good = encoded(header(2500))
    if length < len(good):
        with pytest.raises(LostObjectError):
            decode_header(good[:length])


@given(st.binary(max_size=300))
def test_garbage_is_no_header(value: bytes) -> None:
    for garbage in (value, value + encoded(header())[-TRAILER_SIZE:]):
        with pytest.raises(LostObjectError):
            decode_header(garbage)


def test_a_newer_format_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_valkey_spill.format.header.FORMAT_VERSION", FORMAT_VERSION + 1)
    newer = encoded(header())
    monkeypatch.undo()
    with pytest.raises(LostObjectError, match=f"format {FORMAT_VERSION + 1}.*upgrade"):
        decode_header(newer)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 2501},
        {"size": 10**12},
        {"size": 2000},
        {"size": -1},
        {"chunk_size": 500},
        {"chunk_size": 0},
        {"chunk_size": -1},
        {"chunks": [Chunk(1000, Codec.RAW, 0)] * 2},
        {"chunks": [Chunk(1000, Codec.RAW, 0)] * 3},
        {"chunks": [Chunk(1001, Codec.LZ4, 0)] * 3},
        {"inline": True, "chunks": [Chunk(1000, Codec.RAW, 0)]},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LostObjectError):
        decode_header(encoded(replace(header(2500), **changes)))  # type: ignore[arg-type]


def test_chunk_count_covers_the_data() -> None:
    assert [chunk_count(size, 10) for size in (0, 1, 10, 11, 20, 21)] == [0, 1, 1, 2, 2, 3]


@given(st.binary(min_size=1, max_size=5000))
def test_a_chunk_is_decompressed_to_what_it_was(data: bytes) -> None:
    codec, stored = compress(memoryview(data))
    assert len(stored) <= len(data)
    if codec is Codec.RAW:
        assert stored == data
    else:
        target = bytearray(len(data))
        decompress_into(stored, memoryview(target))
        assert target == data


def test_a_chunk_that_is_no_lz4_or_of_another_size_is_refused() -> None:
    _, stored = compress(memoryview(bytes(range(100)) * 10))
    for bad, size in ((b"\xff" * 50, 1000), (stored, 999), (stored, 1001), (stored[:-1], 1000)):
        with pytest.raises(LostObjectError, match="chunk"):
            decompress_into(bad, memoryview(bytearray(size)))


def test_the_sampler_knows_what_pays() -> None:
    random = np.random.default_rng(0)
    noise = random.bytes(4 << 20)
    columns = random.integers(0, 100, 1 << 19).tobytes()
    assert expected_ratio(memoryview(noise)) == 1
    assert expected_ratio(memoryview(columns)) < 0.9
    assert expected_ratio(memoryview(bytes(1 << 20))) < 0.02
    # A compressible half must be found wherever it lies.
    assert 0.4 < expected_ratio(memoryview(noise + bytes(len(noise)))) < 0.6
    assert 0.4 < expected_ratio(memoryview(bytes(len(noise)) + noise)) < 0.6
    assert expected_ratio(memoryview(b"a")) == 1


@pytest.mark.parametrize("column", range(3))
def test_a_header_that_lacks_what_its_schema_says_must_be_there_is_damaged(column: int) -> None:
    (stream, _) = encode_header(header(10, chunks=[Chunk(10, Codec.RAW, 1)]))
    schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
    values = [pa.array([None if i == column else 1], each.type) for i, each in enumerate(schema)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(values, schema=schema))
    with pytest.raises(LostObjectError, match="damaged"):
        decode_header(forged(sink.getvalue().to_pybytes()))


def forged(stream: bytes) -> bytes:
    """A header's value by somebody who knows the format: its checksum is right."""
    trailer = struct.pack("<4sHHIQ", b"RVSP", FORMAT_VERSION, 0, len(stream), checksum(stream))
    return stream + trailer


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("mask", [0x80, None])
def test_a_forged_header_is_damaged_and_does_nothing_else(inline: bool, mask: int | None) -> None:
    """Any other error would be tried again for hours, and a crash would end an IO worker."""
    chunks = [Chunk(0, Codec.RAW, 1)] if inline else [Chunk(1000, Codec.RAW, 1)] * 3
    stream, _ = encode_header(header(0 if inline else 3000, chunks=chunks, inline=inline))
    good = bytes(stream)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] = 0 if mask is None else bad[place] ^ mask
        for value in (bytes(bad), bytes(bad[: place + 1])):
            with contextlib.suppress(LostObjectError):
                decode_header(forged(value))
