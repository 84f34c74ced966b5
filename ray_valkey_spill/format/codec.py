"""Codecs and checksums of chunks. Pure."""

from __future__ import annotations

from enum import IntEnum

import lz4.block
import numpy as np
import pyarrow as pa
import xxhash

from ray_valkey_spill.errors import LostObjectError
from ray_valkey_spill.units import Buffer

__all__ = [
    "CODECS",
    "Codec",
    "checksum",
    "compress",
    "copy_into",
    "decompress_into",
    "expected_ratio",
    "scratch",
]

# A chunk is stored compressed only if that saves at least a tenth: a smaller gain does not pay for
# the decompression on restore.
_WORTHWHILE = 0.9
_SAMPLE_PIECES = range(3, 9)
_SAMPLE_PIECE_SIZE = 4096


class Codec(IntEnum):
    """The encoding of a stored chunk. The numbers are part of the format."""

    RAW = 0
    LZ4 = 1  # LZ4 block format, without a size prefix


CODECS = {int(codec): codec for codec in Codec}


def checksum(data: Buffer) -> int:
    """Return the XXH3-64 of `data`."""
    return xxhash.xxh3_64_intdigest(data)


# Arrow decompresses several times faster than lz4.block: its pool reuses memory, while every result
# of lz4.block is mapped, faulted in and unmapped.
_ARROW_LZ4 = pa.Codec("lz4_raw")
_LAST_LITERALS = 5


def expected_ratio(data: memoryview) -> float:
    """Estimate the fraction that LZ4 leaves of `data`, from 12 to 32 KiB; 1 if it does not pay."""
    pieces = min(max(_SAMPLE_PIECES.start, len(data) >> 16), _SAMPLE_PIECES.stop - 1)
    if len(data) <= pieces * _SAMPLE_PIECE_SIZE:
        sample: Buffer = data
    else:
        last = len(data) - _SAMPLE_PIECE_SIZE
        starts = range(0, last + 1, last // (pieces - 1))
        sample = b"".join([data[start : start + _SAMPLE_PIECE_SIZE] for start in starts])
    ratio = len(lz4.block.compress(sample, store_size=False)) / len(sample)
    return ratio if ratio <= _WORTHWHILE else 1.0


def compress(data: memoryview) -> tuple[Codec, Buffer]:
    """Return `data` as LZ4, or unchanged if that does not pay. Releases the GIL."""
    packed: bytes = lz4.block.compress(data, store_size=False)
    if len(packed) <= _WORTHWHILE * len(data):
        return Codec.LZ4, packed
    return Codec.RAW, data


def scratch(size: int) -> memoryview:
    """Return `size` bytes of uninitialised memory from Arrow's pool."""
    return memoryview(pa.allocate_buffer(size)).cast("B")


def decompress_into(packed: Buffer, target: memoryview) -> None:
    """Decompress an LZ4 block of exactly `target`'s size. Releases the GIL.

    Raises:
        LostObjectError: `packed` has another size, or is not an LZ4 block.
    """
    try:
        data = memoryview(_ARROW_LZ4.decompress(packed, len(target))).cast("B")
    except OSError as error:
        raise LostObjectError(f"a chunk cannot be decompressed to {len(target)} bytes") from error
    # Arrow does not report a block that ends too soon. But the last bytes of a block are literals,
    # also the last of the data (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md).
    if data[-_LAST_LITERALS:] != memoryview(packed)[-_LAST_LITERALS:][-len(data) :]:
        raise LostObjectError(f"a chunk has fewer than {len(target)} bytes")
    copy_into(data, target)


def copy_into(data: Buffer, target: memoryview) -> None:
    """Copy `data` to memory of the same size, which must not be empty. Releases the GIL."""
    # The assignment of a memoryview would not release it.
    np.frombuffer(target, np.uint8)[:] = np.frombuffer(data, np.uint8)
