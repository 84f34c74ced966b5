"""How much may be written: the namespace's budget, and what a shared server has room for.

Without `max_bytes` spilling takes only memory that is free, less a margin, so that no server evicts
anything for it. `max_bytes` is the operator's permission to take that much, also where a server
evicts keys of others for it.

A writer takes what each value costs out of a grant, and has that enlarged when it is used up. So
the budget is never exceeded, by however many writers, and a server is asked seldom. Without limits
nothing is asked but, once a second, whether there are limits now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ray_valkey_spill.errors import ServerFullError
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.tiers.ledger import Grant, Ledger
from ray_valkey_spill.units import KIB, MIB

__all__ = ["Budget", "cost", "free_room", "margin", "member_cost"]

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
# the server takes ours in, its buffers for that, the entries of what is pending, and in a cluster
# what a shard gets beyond its share.
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


def free_room(memory: MemoryInfo) -> int:
    """Bytes that may be written to a server with a `maxmemory` without it evicting anything.

    Negative if others have taken some of the margin. A replication backlog counts for eviction
    (`freeMemoryGetNotCountedMemory` in Valkey's evict.c), and what is written fills it up too.
    """
    return memory.maxmemory - margin(memory.maxmemory) - memory.used - memory.backlog_left


class Budget:
    """What one writer may still write. For one thread.

    Args:
        link: the one that the data are written over, too: no connection more than that is needed.
        writer: of all writers of the namespace this one, `<session>:<node>:<process>…`.
        max_bytes: what the namespace may have stored, in bytes as `cost` counts them; or None.
        advice: how a user can get more room.
        under_way: returns how many bytes of what was taken the server may not have yet.
    """

    def __init__(
        self,
        link: Link,
        ledger: Ledger,
        writer: str,
        max_bytes: int | None,
        advice: str,
        under_way: Callable[[], int],
    ) -> None:
        self._link = link
        self._ledger = ledger
        self._writer = self._name = writer
        self._abandoned = 0
        self._max_bytes = max_bytes
        self._advice = advice
        self._under_way = under_way
        self._grant = Grant(0, 0)
        self._has_asked = False
        self._expected = 0
        self._unlimited_until = float("-inf")
        # What the latest look found, if a server is bounded, and how much is written at the next.
        self._memories: list[MemoryInfo] | None = None
        self._look_at = float("inf")

    def expect(self, size: int) -> None:
        """Begin to write about `size` bytes in all."""
        self._expected = size

    def require(self, size: int) -> None:
        """Make sure that `size` more bytes may be written.

        Raises:
            ServerFullError: they may not. What was granted before still stands.
            ServerError: as `link.Link.run`.
        """
        left = self._grant.granted - self._grant.written
        is_due = self._grant.written >= self._look_at
        if (left < size or is_due) and time.monotonic() > self._unlimited_until:
            expected = max(_LEAST_GRANTED, self._expected - self._grant.written)
            most = max(size, min(_GRANTED_AT_ONCE, expected))
            self._enlarge(max(0, size - left), max(0, most - left))

    def take(self, size: int) -> None:
        """Count `size` bytes as written. Errors as `require`."""
        self.require(size)
        self._grant = Grant(self._grant.granted, self._grant.written + size)

    def release(self) -> None:
        """Give back what is granted, once what was written is settled or removed."""
        self._begin_anew()
        if self._has_asked:
            self._ledger.release([self._name])
            self._has_asked = False

    def abandon(self) -> list[str]:
        """Begin anew, and let the grant stand: what was written of it may still be on the server.

        Returns:
            The names of the grants that stand, to be released once that is removed; one, or none.
        """
        standing = [self._name] if self._has_asked else []
        self._begin_anew()
        self._has_asked = False
        self._abandoned += len(standing)
        self._name = f"{self._writer}-{self._abandoned}"
        return standing

    def _begin_anew(self) -> None:
        self._grant, self._look_at = Grant(0, 0), float("inf")

    def _enlarge(self, least: int, most: int) -> None:
        """Get `least` to `most` bytes on top; with `least` 0, look whether the grant still fits."""
        if self._memories and self._try(least, most, self._memories) is None:
            return
        memories = self._link.memories()
        if self._max_bytes is None and not any(map(self._is_bounded, memories)):
            self._memories = None
            self._unlimited_until = time.monotonic() + _BETWEEN_LOOKS
            return
        if (refusal := self._try(least, most, memories)) is not None:
            raise refusal

    def _try(self, least: int, most: int, memories: Sequence[MemoryInfo]) -> ServerFullError | None:
        """Enlarge the grant, given what a look at the servers found; returns why it cannot be.

        Once the grant is in the ledger, the servers are looked at again, and as much of it is given
        back as does not fit: between the first look and the grant other writers may have written,
        and reported it as written, which then counts nowhere. What all had written by the second
        look counts there, and whatever is granted later counts this grant in.
        """
        room = self._room(memories, least)
        written = max(0, self._grant.written - self._under_way())
        before = Grant(self._grant.granted, written)
        self._has_asked = True
        reply = self._ledger.reserve(self._name, before, least, most, self._max_bytes, room)
        granted = reply.granted
        if granted < least:
            return self._refusal(memories, least, reply.used)
        if room is not None:
            memories = self._link.memories()
            room = self._room(memories, least)
        if room is not None and room < reply.unwritten:
            granted -= reply.unwritten - room
            kept = granted if granted >= least else 0
            self._ledger.reserve(self._name, before, kept, kept, None, None)
            if granted < least:
                return self._refusal(memories, least, reply.used)
        self._grant = Grant(self._grant.granted + granted, self._grant.written)
        self._memories = None if room is None else [*memories]
        self._look_at = float("inf") if room is None else self._grant.written + _GRANTED_AT_ONCE
        return None

    def _room(self, memories: Sequence[MemoryInfo], least: int) -> int | None:
        """Bytes that may be written to all servers together; None if none is bounded.

        A shard of a cluster gets its share of what is written, so the fullest decides. Others may
        use some of the margin while an object is being written, which does not stop it.
        """
        bounded = [memory for memory in memories if self._is_bounded(memory)]
        if not bounded:
            return None
        rooms = self._rooms(bounded, len(memories))
        if not least:
            rooms = [room + margin(m.maxmemory) // 2 for room, m in zip(rooms, bounded)]
        return len(memories) * max(0, min(rooms))

    def _is_bounded(self, memory: MemoryInfo) -> bool:
        """Whether a server can be full for us.

        One that may evict everything takes all that `max_bytes` permits.
        """
        return memory.maxmemory > 0 and not (memory.evicts_all and self._max_bytes is not None)

    def _rooms(self, memories: Sequence[MemoryInfo], shards: int) -> list[int]:
        """Bytes that may be written to each server without writes of others failing for that.

        With `max_bytes` a server under `volatile-*` may evict keys that have a TTL, of which ours
        have none. How much that can be is estimated: the keys of others are taken to be alike, and
        our chunks to have the usual size.
        """
        rooms = [free_room(memory) for memory in memories]
        evicting = [memory.evicts_others for memory in memories]
        if self._max_bytes is None or not any(evicting):
            return rooms
        usages = self._ledger.usages().values()
        ours = sum(usage.stored for usage in usages) // shards
        keys = sum(usage.objects + usage.size // _USUAL_CHUNK for usage in usages) // shards
        for i, memory in enumerate(memories):
            if evicting[i]:
                of_others = max(memory.volatile, memory.keys - keys)
                rooms[i] += max(0, memory.used - ours) * memory.volatile // of_others
        return rooms

    def _refusal(self, memories: Sequence[MemoryInfo], wanted: int, used: int) -> ServerFullError:
        budget = self._max_bytes
        if budget is not None and used + wanted > budget:
            return ServerFullError(
                f"the budget is used up: {used / MIB:.1f} MiB of max_bytes ({budget / MIB:.1f} "
                f"MiB) are taken, and {wanted / MIB:.1f} MiB are wanted",
                f"Raise max_bytes, {self._advice}",
            )
        memory = min(filter(self._is_bounded, memories), key=free_room)
        left = margin(memory.maxmemory) / MIB
        what = (
            f"Valkey at {self._link.address} is full (OOM) but for what is left to others: "
            f"{memory.used / MIB:.1f} MiB of maxmemory {memory.maxmemory / MIB:.1f} MiB are used, "
            f"{left:.1f} MiB are left, and {wanted / MIB:.1f} MiB are wanted"
        )
        if budget is None and memory.evicts_others:
            return ServerFullError(
                f"{what}. Without max_bytes nobody's keys are evicted for spilling",
                "Give max_bytes, how much of the server Ray may take, evicting keys of others "
                f"{'' if memory.evicts_all else 'that have a TTL '}if need be, raise the server's "
                f"maxmemory, {self._advice}",
            )
        return ServerFullError(
            what, f"Raise the server's maxmemory, remove what else is in it, {self._advice}"
        )
