"""Units of size, in bytes, and the type of a buffer."""

from __future__ import annotations

__all__ = ["KIB", "MIB", "Buffer"]

KIB = 1024
MIB = 1024 * KIB

Buffer = bytes | bytearray | memoryview
