"""The values that make up a stored object, each under its own key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_valkey_spill.format.names import ObjectName
from ray_valkey_spill.units import Buffer

__all__ = ["Value"]


class Value(NamedTuple):
    """A chunk of an object, or its header.

    Attributes:
        key: key of the value.
        name: name of the object.
        size: length of the object's data, in bytes.
        parts: buffers that make up the value, in order.
        expected: estimated bytes of all values of the object, on its first value; 0 on the others.
        is_last: whether this value completes the object.
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
