"""The names of keys, and the URLs that Ray keeps for spilled objects. Pure.

    <key_prefix>namespaces                                                which namespaces there are
    <key_prefix><namespace>:{<namespace>}:index                           what is stored
    <key_prefix><namespace>:{<namespace>}:pending                         what is being written
    <key_prefix><namespace>:{<namespace>}:usage, :totals, :writers, :leases, :overflows
                                                                          see `ledger`
    <key_prefix><namespace>:<session>:<node>:<object>.<attempt>.<n>       header
    <key_prefix><namespace>:<session>:<node>:<object>.<attempt>.<n>:<i>   chunk i of n

Index and pending set are sorted sets. The pending set has the name of each object being written,
`<session>:<node>:<object>.<attempt>.<n>`. Once the object is complete, the index has its entry
instead: the name and `.<size>.<stored>`, the data's length and the bytes counted for the object.
All members have score 0, so they are in lexicographic order: the objects of a session or a node are
one range, found without SCAN. A name determines every key that its object can have. An attempt
contains the writer's process id, which identifies the leftovers of a killed writer.

The namespace in braces is a hash tag: a cluster keeps the metadata on one shard, and spreads
objects over all of them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError

__all__ = ["Entry", "Keyspace", "NodeName", "ObjectName", "Place", "TierName", "new_attempt"]

TierName = Literal["valkey", "overflow"]

# The header of more chunks, with 13 bytes for each, would exceed the largest value of a server.
_MOST_CHUNKS = 1 << 26
# Names from the server also become paths in the overflow, and are shown on terminals.
_PART = "([A-Za-z0-9_-]+)"
_NAME = re.compile(rf"{_PART}:{_PART}:{_PART}\.([0-9a-f]{{27}})\.([0-9]+)")
_ENTRY = re.compile(r"(.+)\.([0-9]+)\.([0-9]+)")
# What surrounds the root and the name of an object.
_TIER, _QUERY = "(overflow:)?", r"\?offset=0&size=([0-9]+)(?:&sealed=([0-9a-f]{16}))?"


def new_attempt() -> str:
    """Return a unique token for an attempt: time in ms, process id, 32 random bits, all as hex."""
    return f"{int(time.time() * 1000):011x}{os.getpid():08x}{os.urandom(4).hex()}"


class NodeName(NamedTuple):
    """A node of a Ray session."""

    session: str
    node: str

    def __str__(self) -> str:
        return f"{self.session}:{self.node}"


class ObjectName(NamedTuple):
    """One attempt to spill one object: its session and node, and its number of chunk keys."""

    session: str
    node: str
    object_id: str
    attempt: str
    chunks: int

    @property
    def writer(self) -> int:
        """Process id of the writer. All Ray processes of a node must share one PID namespace."""
        return int(self.attempt[11:19], 16)

    @property
    def time(self) -> float:
        """Time of the attempt by its node's clock, in seconds since the epoch."""
        return int(self.attempt[:11], 16) / 1000

    def __str__(self) -> str:
        return f"{self.session}:{self.node}:{self.object_id}.{self.attempt}.{self.chunks}"

    @classmethod
    def parse(cls, text: str) -> ObjectName:
        """Parse a name. Raises ValueError if `text` is not the name of an object."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise ValueError(f"not the name of a spilled object: {text!r}")
        session, node, object_id, attempt, chunks = match.groups()
        if int(chunks) > _MOST_CHUNKS:
            raise ValueError(f"not the name of a spilled object: {text!r}")
        return cls(session, node, object_id, attempt, int(chunks))


class Entry(NamedTuple):
    """A stored object: its name, the length of its data, and the bytes counted for it."""

    name: ObjectName
    size: int
    stored: int

    def __str__(self) -> str:
        return f"{self.name}.{self.size}.{self.stored}"

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Parse an entry. Raises ValueError if `text` is not an entry of the index."""
        match = _ENTRY.fullmatch(text)
        if match is None:
            raise ValueError(f"not an entry of the index: {text!r}")
        return cls(ObjectName.parse(match[1]), int(match[2]), int(match[3]))


class Place(NamedTuple):
    """The place of an object, as its URL gives it.

    Ray keeps the URL, so write access to the server or the overflow does not suffice to forge it.

    Attributes:
        name: name of the object.
        size: length of its data, in bytes.
        tier: the tier that has it.
        key_id: id of the key that seals it; None if it is not sealed.
    """

    name: ObjectName
    size: int
    tier: TierName = "valkey"
    key_id: int | None = None


@dataclass(frozen=True)
class Keyspace:
    """The keys below `root`, which is `<key_prefix><namespace>:`. None of these has a TTL."""

    root: str

    @classmethod
    def of(cls, config: Config) -> Keyspace:
        return cls(f"{config.key_prefix}{config.namespace}:")

    @cached_property
    def index(self) -> str:
        return self._metadata("index")

    @cached_property
    def pending(self) -> str:
        return self._metadata("pending")

    @cached_property
    def usage(self) -> str:
        return self._metadata("usage")

    @cached_property
    def totals(self) -> str:
        return self._metadata("totals")

    @cached_property
    def writers(self) -> str:
        return self._metadata("writers")

    @property
    def grants(self) -> str:
        """Version 0.1's counterpart of `writers`."""
        return self._metadata("grants")

    @cached_property
    def leases(self) -> str:
        return self._metadata("leases")

    @cached_property
    def overflows(self) -> str:
        return self._metadata("overflows")

    @cached_property
    def namespace(self) -> str:
        return self.root[:-1].rpartition(":")[2]

    @cached_property
    def namespaces(self) -> str:
        """Shared by all namespaces of a prefix. No root begins with it, as each ends with ":"."""
        return f"{self.root.removesuffix(f'{self.namespace}:')}namespaces"

    @cached_property
    def _url(self) -> re.Pattern[str]:
        return re.compile(f"{_TIER}{re.escape(self.root)}{_NAME.pattern}{_QUERY}")

    def _metadata(self, name: str) -> str:
        return f"{self.root}{{{self.namespace}}}:{name}"

    def header(self, name: ObjectName) -> str:
        return f"{self.root}{name}"

    def values(self, name: ObjectName) -> Iterator[str]:
        """Yield the keys of all values of an object: its header, then its chunks.

        One by one, because a forged name may claim millions of chunks.
        """
        header = self.header(name)
        yield header
        for number in range(name.chunks):
            yield f"{header}:{number}"

    def chunks(self, name: ObjectName) -> list[str]:
        return [*self.values(name)][1:]

    def url(self, place: Place) -> str:
        """Return the URL that Ray keeps for the object."""
        tier = "overflow:" if place.tier == "overflow" else ""
        sealed = "" if place.key_id is None else f"&sealed={place.key_id:016x}"
        return f"{tier}{self.root}{place.name}?offset=0&size={place.size}{sealed}"

    def parse_url(self, url: str) -> Place:
        """Return the place of the object of `url`.

        Raises:
            LostObjectError: `url` is not one of this package, or is of another namespace.
        """
        match = self._url.fullmatch(url)
        if match is not None:
            tier, session, node, object_id, attempt, chunks, size, key_id = match.groups()
            try:
                name = ObjectName(session, node, object_id, attempt, int(chunks))
                sealed = int(key_id, 16) if key_id else None
                return Place(name, int(size), "overflow" if tier else "valkey", sealed)
            except ValueError:
                pass  # a number that is far too long
        raise LostObjectError(f"{url!r} is not the URL of an object spilled below {self.root!r}")
