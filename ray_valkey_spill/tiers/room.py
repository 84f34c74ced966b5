"""What a key costs a server, and how much room a server has. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.units import KIB, MIB

__all__ = ["Limits", "cost", "free_room", "margin", "member_cost"]

# What the server needs beside a value and its key: hash table slot, object, string headers. And
# beside a member of a sorted set: skip list node, slot, and the sorted set of what is pending.
# Measured with Redis 7.0 on jemalloc; Valkey 9.1 needs some tens of bytes less.
_PER_KEY = 112
_PER_MEMBER = 144
_VALUE_HEADER = 16

_USUAL_CHUNK = 512 * KIB
# This share of a server's maxmemory is left to others, within these bounds: for what they write
# while the server takes ours in, for its buffers, for the entries of what is pending, and in a
# cluster for what a shard gets beyond its share.
_MARGIN = 1 / 20
_LEAST_MARGIN, _MOST_MARGIN_SHARE = 16 * MIB, 1 / 4

# All writers together may keep these shares of `max_bytes`, and of the margin of a server; and each
# of them this much.
_KEPT_SHARE, _KEPT_MARGIN_SHARE = 1 / 20, 1 / 2
_LEAST_KEPT, _MOST_KEPT, _KEPT_BY_ONE_SHARE = 1 * MIB, 8 * MIB, 1 / 8
# A writer is granted this share of what limits it at once, but not less than that.
_SHARE_AT_ONCE, _LEAST_AT_ONCE = 1 / 8, 16 * MIB
# While a batch is written, others may fill this share of the margin before the writer looks again.
_LEAST_BETWEEN_LOOKS, _BETWEEN_LOOKS_SHARE = 8 * MIB, 1 / 4


def cost(key: int, value: int) -> int:
    """Bytes of memory that a key takes on a server, given the lengths of its name and value.

    Values are taken to lie in jemalloc's size classes, four to each doubling
    (https://jemalloc.net/jemalloc.3.html, table 1), as in the servers' official builds.
    """
    size = value + _VALUE_HEADER
    spacing = 1 << max(4, (size - 1).bit_length() - 3)
    return -(-size // spacing) * spacing + key + _PER_KEY


def member_cost(member: int) -> int:
    """Bytes of memory that an entry of the index takes, given its length."""
    return member + _PER_MEMBER


def margin(maxmemory: int) -> int:
    """Bytes of a server's `maxmemory` that spilling leaves to others."""
    return int(min(max(maxmemory * _MARGIN, _LEAST_MARGIN), maxmemory * _MOST_MARGIN_SHARE))


def free_room(memory: MemoryInfo) -> int:
    """Bytes that may be written to a server with a `maxmemory` without it evicting anything.

    Negative if others have taken some of the margin. A replication backlog counts for eviction
    (`freeMemoryGetNotCountedMemory` in Valkey's evict.c), and what is written fills it up too.
    """
    return memory.maxmemory - margin(memory.maxmemory) - memory.used - memory.backlog_left


class Stored(Protocol):
    """How much a namespace has stored: objects, the bytes of their data, and what these take."""

    @property
    def objects(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def stored(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """What limits the writers of a namespace. Sizes are in bytes.

    Attributes:
        max_bytes: the budget, if there is one.
        memories: of all servers, by a look at them; none before the first look.
    """

    max_bytes: int | None
    memories: Sequence[MemoryInfo] = ()

    @cached_property
    def bounded(self) -> list[MemoryInfo]:
        """Of the servers that can be full for us.

        One that may evict everything takes all that `max_bytes` permits.
        """
        return [
            each
            for each in self.memories
            if each.maxmemory > 0 and not (each.evicts_all and self.max_bytes is not None)
        ]

    @cached_property
    def exist(self) -> bool:
        """Whether anything limits the writers, as far as is known."""
        return self.max_bytes is not None or bool(self.bounded)

    @cached_property
    def kept_by_all(self) -> int:
        """How much all writers together may be granted, for one to keep some."""
        limits = [] if self.max_bytes is None else [self.max_bytes * _KEPT_SHARE]
        limits += [
            self._times(margin(each.maxmemory)) * _KEPT_MARGIN_SHARE for each in self.bounded
        ]
        return int(min(limits, default=0))

    @cached_property
    def kept_by_one(self) -> int:
        """How much one writer may keep of that."""
        share = int(self.kept_by_all * _KEPT_BY_ONE_SHARE)
        return min(max(_LEAST_KEPT, share), _MOST_KEPT, self.kept_by_all)

    @cached_property
    def at_once(self) -> int:
        """How much a writer may be granted at once, if no object needs more."""
        limits = [] if self.max_bytes is None else [self.max_bytes]
        limits += [self._times(each.maxmemory) for each in self.bounded]
        return max(_LEAST_AT_ONCE, int(min(limits, default=0) * _SHARE_AT_ONCE))

    @cached_property
    def between_looks(self) -> float:
        """How much is written until the room has to be looked at again."""
        least = min((self._times(margin(each.maxmemory)) for each in self.bounded), default=0)
        if not least:
            return float("inf")
        return max(_LEAST_BETWEEN_LOOKS, least * _BETWEEN_LOOKS_SHARE)

    def room(self, ours: Stored, *, into_margin: float = 0.0) -> int | None:
        """How much may be written to all servers together; None if none is bounded.

        A shard of a cluster gets its share of what is written, so the fullest one decides.

        Args:
            ours: what the namespace has stored.
            into_margin: the share of the margin that may be used, too.
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
        """How much of others' data a server may evict for ours.

        With `max_bytes` a server under `volatile-*` may evict keys that have a TTL, of which ours
        have none. How much that can be is estimated: the keys of others are taken to be alike, and
        our chunks to have the usual size.
        """
        if self.max_bytes is None or not memory.evicts_others:
            return 0
        stored = ours.stored // len(self.memories)
        keys = (ours.objects + ours.size // _USUAL_CHUNK) // len(self.memories)
        of_others = max(memory.volatile, memory.keys - keys)
        return max(0, memory.used - stored) * memory.volatile // of_others

    def _times(self, size: int) -> int:
        """`size` on each server."""
        return len(self.memories) * size
