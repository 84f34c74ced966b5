"""Parses a server's reply to INFO. Pure."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

from ray_valkey_spill.errors import NotValkeyError

__all__ = ["MemoryInfo", "ServerInfo", "count_in", "fields_of", "mode_of"]

_NUMBER = re.compile("[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """The memory of a server. Sizes are in bytes; `maxmemory` is 0 for no limit.

    Attributes:
        keys: number of keys in all databases.
        volatile: number of keys that have a TTL.
        backlog_left: bytes by which the replication backlog will still grow, until it has been
            filled once.
    """

    maxmemory: int
    policy: str
    used: int
    keys: int
    volatile: int
    backlog_left: int = 0

    @property
    def evicts_all(self) -> bool:
        """Whether the policy may evict keys without a TTL; no key of this package has one."""
        return self.policy.startswith("allkeys-")

    @property
    def evicts_volatile(self) -> bool:
        """Whether the policy evicts keys with a TTL, and no others."""
        return self.policy.startswith("volatile-")

    @property
    def evicts_others(self) -> bool:
        """Whether the server can evict another application's key to make room for a write."""
        return (self.evicts_all and self.keys > 0) or (self.evicts_volatile and self.volatile > 0)

    def __add__(self, other: MemoryInfo) -> MemoryInfo:
        """Add up two shards of a cluster; the sum is unbounded if one of them is."""
        return MemoryInfo(
            maxmemory=self.maxmemory and other.maxmemory and self.maxmemory + other.maxmemory,
            policy=other.policy if other.evicts_all else self.policy,
            used=self.used + other.used,
            keys=self.keys + other.keys,
            volatile=self.volatile + other.volatile,
            backlog_left=self.backlog_left + other.backlog_left,
        )

    @classmethod
    def of_all(cls, infos: Iterable[ServerInfo]) -> MemoryInfo:
        """Return the sum over all servers; there must be at least one."""
        return reduce(operator.add, [info.memory for info in infos])

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> MemoryInfo:
        sizes = ("maxmemory", "used_memory", "repl_backlog_size", "repl_backlog_histlen")
        if not all(_NUMBER.fullmatch(values.get(name, "0")) for name in sizes):
            raise NotValkeyError("its INFO has sizes that are not numbers")
        databases = [text for name, text in values.items() if re.fullmatch("db[0-9]+", name)]
        keys, volatile = (
            sum(
                int(match[1])
                for text in databases
                if (match := re.search(f"{name}=([0-9]{{1,19}})", text))
            )
            for name in ("keys", "expires")
        )
        return cls(
            maxmemory=int(values.get("maxmemory", 0)),
            policy=values.get("maxmemory_policy", "noeviction"),
            used=int(values.get("used_memory", 0)),
            keys=keys,
            volatile=volatile,
            backlog_left=_backlog_left(values),
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The fields of `INFO` that this package uses.

    `replicas` is the number of online replicas; `aof` is whether there is an append-only file.
    """

    product: str
    version: str
    mode: str
    role: str
    replicas: int
    aof: bool
    memory: MemoryInfo

    @classmethod
    def parse(cls, text: str) -> ServerInfo:
        values = fields_of(text)
        if "redis_version" not in values and "valkey_version" not in values:
            raise NotValkeyError("it answers INFO, but not as Valkey does")
        is_valkey = "valkey_version" in values
        return cls(
            product="Valkey" if is_valkey else "Redis",
            version=values["valkey_version" if is_valkey else "redis_version"],
            mode=mode_of(values),
            role=values.get("role", "master"),
            replicas=sum(
                "state=online" in text
                for name, text in values.items()
                if re.fullmatch("slave[0-9]+", name)
            ),
            aof=values.get("aof_enabled", "0") == "1",
            memory=MemoryInfo.parse(values),
        )


def _backlog_left(values: Mapping[str, str]) -> int:
    """Return the bytes of the backlog not filled yet; it exists once a replica has connected."""
    if values.get("repl_backlog_active") != "1":
        return 0
    size, filled = (int(values.get(f"repl_backlog_{name}", 0)) for name in ("size", "histlen"))
    return max(0, size - filled)


def mode_of(values: Mapping[str, str]) -> str:
    """Return "standalone", "cluster" or "sentinel", from the fields of `INFO`."""
    return values.get("server_mode", values.get("redis_mode", "standalone"))


def fields_of(text: str) -> dict[str, str]:
    """Return the fields of `INFO`, by name."""
    lines = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, _, value in lines}


def count_in(values: Mapping[str, str], name: str) -> int:
    """Return the number in a field of `INFO`; 0 if there is none."""
    text = values.get(name, "0")
    return int(text) if _NUMBER.fullmatch(text) else 0
