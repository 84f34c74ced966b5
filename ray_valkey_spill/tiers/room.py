"""The memory that a key takes on a server, and the room on a server. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.units import KIB, MIB

__all__ = ["Limits", "cost", "free_room", "margin", "member_cost"]

# Bytes of the server's overhead. Per key: hash table slot, object and string headers. Per member of
# the index: skip list node, slot, and its member of the pending set. Measured with Redis 7.0 on
# jemalloc; Valkey 9.1 needs a few tens of bytes less.
_PER_KEY = 112
_PER_MEMBER = 144
_VALUE_HEADER = 16

_USUAL_CHUNK = 512 * KIB
# This share of a server's maxmemory is left free, within these bounds: for what others write while
# the server receives our values, for its buffers, for the pending set, and in a cluster for what a
# shard gets beyond its share.
_MARGIN = 1 / 20
_LEAST_MARGIN, _MOST_MARGIN_SHARE = 16 * MIB, 1 / 4

# All writers together may keep these shares of `max_bytes` and of a server's margin; one writer may
# keep a share of that, within these bounds.
_KEPT_SHARE, _KEPT_MARGIN_SHARE = 1 / 20, 1 / 2
_LEAST_KEPT, _MOST_KEPT, _KEPT_BY_ONE_SHARE = 1 * MIB, 8 * MIB, 1 / 8
# One grant is at most this share of the limit, or these bytes if they are more.
_SHARE_AT_ONCE, _LEAST_AT_ONCE = 1 / 8, 16 * MIB
# All writers together look at the room again after about this share of the margin, or these bytes
# if they are more.
_LEAST_BETWEEN_LOOKS, _BETWEEN_LOOKS_SHARE = 8 * MIB, 1 / 4


def cost(key: int, value: int) -> int:
    """Return the bytes of memory that a key takes, from the lengths of its name and its value.

    Assumes jemalloc's size classes, four per doubling (https://jemalloc.net/jemalloc.3.html,
    table 1), as in the servers' official builds.
    """
    size = value + _VALUE_HEADER
    spacing = 1 << max(4, (size - 1).bit_length() - 3)
    return -(-size // spacing) * spacing + key + _PER_KEY


def member_cost(member: int) -> int:
    """Return the bytes of memory that an entry of the index takes, from its length."""
    return member + _PER_MEMBER


def margin(maxmemory: int) -> int:
    """Return the bytes of a server's `maxmemory` that spilling leaves free."""
    return int(min(max(maxmemory * _MARGIN, _LEAST_MARGIN), maxmemory * _MOST_MARGIN_SHARE))


def free_room(memory: MemoryInfo) -> int:
    """Return the bytes that a server with a `maxmemory` takes without evicting anything.

    Negative if others use some of the margin. The replication backlog counts for eviction
    (`freeMemoryGetNotCountedMemory` in Valkey's evict.c), and writes still fill it up.
    """
    return memory.maxmemory - margin(memory.maxmemory) - memory.used - memory.backlog_left


class Stored(Protocol):
    """What a namespace has stored: objects, bytes of their data, and bytes that they take."""

    @property
    def objects(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def stored(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """The limits of a namespace's writers. Sizes are in bytes.

    Attributes:
        max_bytes: the budget; None if there is none.
        memories: memory of each server at the latest look; empty before the first one.
    """

    max_bytes: int | None
    memories: Sequence[MemoryInfo] = ()

    @cached_property
    def bounded(self) -> list[MemoryInfo]:
        """Memories of the servers that can be too full for a write.

        With `max_bytes`, a server that may evict every key never is.
        """
        return [
            each
            for each in self.memories
            if each.maxmemory > 0 and not (each.evicts_all and self.max_bytes is not None)
        ]

    @cached_property
    def exist(self) -> bool:
        """Whether there is any limit, as far as is known."""
        return self.max_bytes is not None or bool(self.bounded)

    @cached_property
    def is_fleeting(self) -> bool:
        """Whether others may fill the room at any time, and then lose keys to what is written."""
        return self.max_bytes is None and any(each.evicts_others for each in self.bounded)

    @cached_property
    def kept_by_all(self) -> int:
        """Bytes of all grants up to which a writer may keep some."""
        limits = [] if self.max_bytes is None else [self.max_bytes * _KEPT_SHARE]
        limits += [
            self._times(margin(each.maxmemory)) * _KEPT_MARGIN_SHARE for each in self.bounded
        ]
        return int(min(limits, default=0))

    @cached_property
    def kept_by_one(self) -> int:
        """Bytes of these that one writer may keep."""
        share = int(self.kept_by_all * _KEPT_BY_ONE_SHARE)
        return min(max(_LEAST_KEPT, share), _MOST_KEPT, self.kept_by_all)

    @cached_property
    def at_once(self) -> int:
        """Bytes that a writer may be granted at once, unless an object needs more."""
        limits = [] if self.max_bytes is None else [self.max_bytes]
        limits += [self._times(each.maxmemory) for each in self.bounded]
        return max(_LEAST_AT_ONCE, int(min(limits, default=0) * _SHARE_AT_ONCE))

    @cached_property
    def between_looks(self) -> float:
        """Bytes that all writers together may write until the next looks at the room."""
        least = min((self._times(margin(each.maxmemory)) for each in self.bounded), default=0)
        if not least:
            return float("inf")
        return max(_LEAST_BETWEEN_LOOKS, least * _BETWEEN_LOOKS_SHARE)

    def room(self, ours: Stored, *, into_margin: float = 0.0) -> int | None:
        """Return the bytes that all servers together have room for; None if none is bounded.

        Each shard of a cluster gets an equal share of the writes, so the fullest one decides.

        Args:
            ours: what the namespace has stored.
            into_margin: share of the margin that may be used as well.
        """
        shards = len(self.memories)
        rooms = [
            free_room(each)
            + self._evictable(each, ours)
            + int(margin(each.maxmemory) * into_margin)
            for each in self.bounded
        ]
        return max(0, self._times(min(rooms))) if rooms and shards else None

    def _evictable(self, memory: MemoryInfo, ours: Stored) -> int:
        """Estimate the bytes of others that a server may evict for ours.

        With `max_bytes`, a server under `volatile-*` may evict keys that have a TTL; no key of ours
        has one. The estimate assumes that the others' keys are all alike, and that our chunks have
        the default size.
        """
        if self.max_bytes is None or not memory.evicts_others:
            return 0
        stored = ours.stored // len(self.memories)
        keys = (ours.objects + ours.size // _USUAL_CHUNK) // len(self.memories)
        of_others = max(memory.volatile, memory.keys - keys)
        return max(0, memory.used - stored) * memory.volatile // of_others

    def _times(self, size: int) -> int:
        """Return the sum of `size` over all servers."""
        return len(self.memories) * size
