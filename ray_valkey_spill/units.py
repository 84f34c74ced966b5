"""Sizes and durations as people write them, text as terminals show it, and buffers' type."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["KIB", "MIB", "Buffer", "escaped", "parse_duration", "parse_size"]

KIB = 1024
MIB = 1024 * KIB

Buffer = bytes | bytearray | memoryview

# As Kubernetes (`400Mi`), Linux tools (`400MiB`) and SI (`2GB`) write them. No other capitals: `m`
# is a thousandth to Kubernetes, and `gb` is 1024³ bytes in valkey.conf.
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGTPE]i|[kKMGTPE])?B?)")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([smhd]?)")
_PREFIXES = "KMGTPE"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """Bytes: `536870912`, `512MiB`, `512Mi`, `1.5GiB` (powers of 1024), `2GB`, `2G` (of 1000).

    Raises:
        ValueError: `text` is not a size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, prefix = match.groups()
    base = 1024 if prefix and prefix.endswith("i") else 1000
    exponent = _PREFIXES.index(prefix[0].upper()) + 1 if prefix else 0
    size = Fraction(number) * base**exponent
    if size.denominator != 1:
        raise ValueError(text)
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds: `90`, `90s`, `12m`, `47h`, `3d`.

    Raises:
        ValueError: `text` is not a duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit = match.groups()
    return float(number) * _SECONDS[unit]


def escaped(text: str) -> str:
    """Return `text` with control characters escaped, except for line breaks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
