"""The names of keys, and the URLs that Ray keeps for spilled objects. Pure.

    <key_prefix><namespace>:index                                         index, a sorted set
    <key_prefix><namespace>:pending                                       the same, for some
    <key_prefix><namespace>:<session>:<node>:<object>.<attempt>.<n>       header
    <key_prefix><namespace>:<session>:<node>:<object>.<attempt>.<n>:<i>   chunk i of n

The index has a member for each object, its name: `<session>:<node>:<object>.<attempt>.<n>`. All
have score 0 and so are in lexicographic order: what a session or a node owns is one range of it,
found without SCAN, and each member tells every key that its object can have. The pending set has
those of them that are being written, so that what a killed writer left can be told from the rest;
an attempt tells its writer.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError

__all__ = ["Keyspace", "ObjectName", "new_attempt"]

_NAME = re.compile(r"([^:?&#]+):([^:?&#]+):([^:.?&#]+)\.([0-9a-f]{27})\.([0-9]+)")
_URL = re.compile(r"([^?]+)\?offset=0&size=([0-9]+)")


def new_attempt() -> str:
    """A token no other attempt to spill an object has: time in ms, this process, 32 random bits."""
    return f"{int(time.time() * 1000):011x}{os.getpid():08x}{os.urandom(4).hex()}"


class ObjectName(NamedTuple):
    """One attempt to spill one object: whose it is, and how many chunk keys it has."""

    session: str
    node: str
    object_id: str
    attempt: str
    chunks: int

    @property
    def writer(self) -> int:
        """The id of the process that made the attempt, on its node."""
        return int(self.attempt[11:19], 16)

    def __str__(self) -> str:
        return f"{self.session}:{self.node}:{self.object_id}.{self.attempt}.{self.chunks}"

    @classmethod
    def parse(cls, text: str) -> ObjectName:
        """Raises ValueError if `text` is not the name of an object."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise ValueError(f"not the name of a spilled object: {text!r}")
        session, node, object_id, attempt, chunks = match.groups()
        return cls(session, node, object_id, attempt, int(chunks))


@dataclass(frozen=True, slots=True)
class Keyspace:
    """The keys below `root`, which is `<key_prefix><namespace>:`."""

    root: str

    @classmethod
    def of(cls, config: Config) -> Keyspace:
        return cls(f"{config.key_prefix}{config.namespace}:")

    @property
    def index(self) -> str:
        return f"{self.root}index"

    @property
    def pending(self) -> str:
        return f"{self.root}pending"

    def header(self, name: ObjectName) -> str:
        return f"{self.root}{name}"

    def chunks(self, name: ObjectName) -> list[str]:
        base = f"{self.root}{name}:"
        return [f"{base}{i}" for i in range(name.chunks)]

    def url(self, name: ObjectName, size: int) -> str:
        """What Ray keeps for the object; `size` is its data's length in bytes."""
        return f"{self.root}{name}?offset=0&size={size}"

    def parse_url(self, url: str) -> tuple[ObjectName, int]:
        """The object and the size of its data in bytes.

        Raises:
            LostObjectError: if `url` is not one of ours, or of another namespace.
        """
        match = _URL.fullmatch(url)
        if match and match[1].startswith(self.root):
            try:
                return ObjectName.parse(match[1][len(self.root) :]), int(match[2])
            except ValueError:
                pass
        raise LostObjectError(f"{url!r} is not the URL of an object spilled below {self.root!r}")
