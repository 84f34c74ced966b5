"""The values that an object is stored as, each under a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_valkey_spill.format.names import ObjectName
from ray_valkey_spill.units import Buffer

__all__ = ["Value"]


class Value(NamedTuple):
    """A chunk of an object, or its header: buffers, one after the other, to store under `key`.

    Attributes:
        key: of the value.
        name: of the object.
        size: length of the object's data, in bytes.
        parts: the value's buffers.
        expected: with the object's first value, how many bytes all its values may take; else 0.
        is_last: whether the object is whole once this value is stored.
    """

    key: str
    name: ObjectName
    size: int
    parts: Sequence[Buffer]
    expected: int = 0
    is_last: bool = False

    @property
    def length(self) -> int:
        """Length of the value, in bytes."""
        return sum(map(len, self.parts))
