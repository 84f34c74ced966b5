"""The values that an object is stored as, each under a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_valkey_spill.format.names import Entry, ObjectName
from ray_valkey_spill.units import Buffer

__all__ = ["Value"]


class Value(NamedTuple):
    """What is stored under a key, a chunk of an object or its header: buffers, one after the other.

    `size` is the length of the object's data; `completes` tells that this is the object's last.
    """

    key: str
    name: ObjectName
    size: int
    parts: Sequence[Buffer]
    completes: Entry | None = None
