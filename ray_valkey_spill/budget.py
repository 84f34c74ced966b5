"""How much may be written: the namespace's budget, and what a shared server has room for.

A writer takes what each value costs out of a grant, and has that enlarged when it is used up. So
the budget is never exceeded, by however many writers, and a server is asked seldom. Without limits
nothing is asked but, once a second, whether there are limits now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray_valkey_spill.config import KIB, MIB
from ray_valkey_spill.errors import ServerFullError
from ray_valkey_spill.ledger import Grant, Ledger
from ray_valkey_spill.server_info import MemoryInfo
from ray_valkey_spill.wire import Link

__all__ = ["Budget", "cost", "margin", "member_cost"]

# What the server needs beside a value and its key: hash table slot, object, string headers. And
# beside a member of a sorted set: skip list node, slot, and the sorted set of what is pending.
# Measured with Redis 7.0 on jemalloc; Valkey 9.1 needs some tens of bytes less.
_PER_KEY = 112
_PER_MEMBER = 144
_VALUE_HEADER = 16

# What is asked for at once, if that much is expected to be written; and however little is, for many
# small objects take more than their data.
_GRANTED_AT_ONCE, _LEAST_GRANTED = 8 * MIB, 64 * KIB
_BETWEEN_LOOKS = 1.0
_USUAL_CHUNK = 512 * KIB
# Of a server's maxmemory this share stays to others, within these bounds: what they write while
# the server takes ours in, and its buffers for that.
_MARGIN = 1 / 20
_LEAST_MARGIN, _MOST_MARGIN_SHARE = 16 * MIB, 1 / 4


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


class Budget:
    """What one writer may still write. For one thread.

    Args:
        link: the one that the data are written over, too: no connection more than that is needed.
        writer: of all writers of the namespace this one, `<session>:<node>:<process>…`.
        max_bytes: what the namespace may have stored, in bytes as `cost` counts them; or None.
        advice: how a user can get more room.
    """

    def __init__(
        self, link: Link, ledger: Ledger, writer: str, max_bytes: int | None, advice: str
    ) -> None:
        self._link = link
        self._ledger = ledger
        self._writer = self._name = writer
        self._abandoned = 0
        self._max_bytes = max_bytes
        self._advice = advice
        self._grant = Grant(0, 0)
        self._has_asked = False
        self._expected = 0
        self._unlimited_until = float("-inf")

    def expect(self, size: int) -> None:
        """Begin to write about `size` bytes in all."""
        self._expected = size

    def require(self, size: int) -> None:
        """Make sure that `size` more bytes may be written.

        Raises:
            ServerFullError: they may not. What was granted before still stands.
            ServerError: as `wire.Link.run`.
        """
        left = self._grant.granted - self._grant.written
        if left < size and time.monotonic() > self._unlimited_until:
            expected = max(_LEAST_GRANTED, self._expected - self._grant.written)
            most = max(size, min(_GRANTED_AT_ONCE, expected))
            self._enlarge(size - left, most - left)

    def take(self, size: int) -> None:
        """Count `size` bytes as written. Errors as `require`."""
        self.require(size)
        self._grant = Grant(self._grant.granted, self._grant.written + size)

    def release(self) -> None:
        """Give back what is granted, once what was written is settled or removed."""
        self._grant = Grant(0, 0)
        if self._has_asked:
            self._ledger.release([self._name])
            self._has_asked = False

    def abandon(self) -> list[str]:
        """Begin anew, and let the grant stand: what was written of it may still be on the server.

        Returns:
            The names of the grants that stand, to be released once that is removed; one, or none.
        """
        standing = [self._name] if self._has_asked else []
        self._grant, self._has_asked = Grant(0, 0), False
        self._abandoned += len(standing)
        self._name = f"{self._writer}-{self._abandoned}"
        return standing

    def _enlarge(self, least: int, most: int) -> None:
        memories = self._link.memories()
        if self._max_bytes is None and not any(memory.maxmemory for memory in memories):
            self._unlimited_until = time.monotonic() + _BETWEEN_LOOKS
            return
        # What is written is spread over a cluster's shards, until one is full.
        bounded = [memory for memory in memories if _is_bounded(memory)]
        rooms = self._rooms(bounded, len(memories))
        room = len(memories) * min(rooms) if rooms else None
        self._has_asked = True
        granted, used = self._ledger.reserve(
            self._name, self._grant, least, most, self._max_bytes, room
        )
        if not granted:
            fullest = bounded[rooms.index(min(rooms))] if rooms else None
            raise self._refusal(fullest, least, used)
        self._grant = Grant(self._grant.granted + granted, self._grant.written)

    def _rooms(self, memories: Sequence[MemoryInfo], shards: int) -> list[int]:
        """Bytes that may be written to each of `shards` without writes of others failing for that.

        Under `volatile-*` the server makes room by evicting keys that have a TTL, of which ours
        have none. How much that can be is estimated: the keys of others are taken to be alike, and
        our chunks to have the usual size.
        """
        evicting = any(memory.evicts_volatile and memory.volatile for memory in memories)
        usages = self._ledger.usages().values() if evicting else ()
        ours = sum(usage.stored for usage in usages) // shards
        keys = sum(usage.objects + usage.size // _USUAL_CHUNK for usage in usages) // shards
        rooms = []
        for memory in memories:
            room = memory.maxmemory - memory.used - margin(memory.maxmemory)
            if memory.evicts_volatile and memory.volatile:
                of_others = max(memory.volatile, memory.keys - keys)
                room += max(0, memory.used - ours) * memory.volatile // of_others
            rooms.append(max(0, room))
        return rooms

    def _refusal(self, memory: MemoryInfo | None, wanted: int, used: int) -> Exception:
        budget = self._max_bytes
        if budget is not None and used + wanted > budget:
            return ServerFullError(
                f"the budget is used up: {used / MIB:.1f} MiB of max_bytes ({budget / MIB:.1f} "
                f"MiB) are taken, and {wanted / MIB:.1f} MiB are wanted",
                f"Raise max_bytes, {self._advice}",
            )
        assert memory is not None
        return ServerFullError(
            f"Valkey at {self._link.address} is full (OOM) but for what is left to others: "
            f"{memory.used / MIB:.1f} MiB of maxmemory {memory.maxmemory / MIB:.1f} MiB are used, "
            f"{margin(memory.maxmemory) / MIB:.1f} MiB are left, and {wanted / MIB:.1f} MiB are "
            "wanted",
            f"Raise the server's maxmemory, remove what else is in it, {self._advice}",
        )


def _is_bounded(memory: MemoryInfo) -> bool:
    """Whether a server can be full: where everything may be evicted it always is, and has room."""
    return memory.maxmemory > 0 and not memory.evicts_all
