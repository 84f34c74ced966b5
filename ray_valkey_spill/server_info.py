"""What a server says of itself. Pure."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

from ray_valkey_spill.errors import NotValkeyError

__all__ = ["MemoryInfo", "ServerInfo", "fields_of"]


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """How much memory the server has; sizes in bytes, `maxmemory` 0 for no bound.

    Attributes:
        keys: how many there are in all databases.
        volatile: how many of them have a TTL.
    """

    maxmemory: int
    policy: str
    used: int
    keys: int
    volatile: int

    @property
    def evicts_all(self) -> bool:
        """Whether the policy may evict keys that have no TTL, as spilled chunks have none."""
        return self.policy.startswith("allkeys-")

    @property
    def evicts_volatile(self) -> bool:
        """Whether it evicts those that have one, and no others."""
        return self.policy.startswith("volatile-")

    def __add__(self, other: MemoryInfo) -> MemoryInfo:
        """Both together, as a cluster has them; unbounded if one is."""
        return MemoryInfo(
            maxmemory=self.maxmemory and other.maxmemory and self.maxmemory + other.maxmemory,
            policy=other.policy if other.evicts_all else self.policy,
            used=self.used + other.used,
            keys=self.keys + other.keys,
            volatile=self.volatile + other.volatile,
        )

    @classmethod
    def of_all(cls, infos: Iterable[ServerInfo]) -> MemoryInfo:
        """That of all servers together; there must be one."""
        return reduce(operator.add, [info.memory for info in infos])

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> MemoryInfo:
        if not all(values.get(name, "0").isdigit() for name in ("maxmemory", "used_memory")):
            raise NotValkeyError("its INFO has sizes that are no numbers")
        databases = [text for name, text in values.items() if re.fullmatch("db[0-9]+", name)]
        keys, volatile = (
            sum(
                int(match[1])
                for text in databases
                if (match := re.search(f"{name}=([0-9]+)", text))
            )
            for name in ("keys", "expires")
        )
        return cls(
            maxmemory=int(values.get("maxmemory", 0)),
            policy=values.get("maxmemory_policy", "noeviction"),
            used=int(values.get("used_memory", 0)),
            keys=keys,
            volatile=volatile,
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What `INFO` tells that matters here.

    `replicas` is how many are in step with it; `aof` tells whether it has an append-only file.
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
            raise NotValkeyError("it answers INFO, but not as a Valkey does")
        is_valkey = "valkey_version" in values
        return cls(
            product="Valkey" if is_valkey else "Redis",
            version=values["valkey_version" if is_valkey else "redis_version"],
            mode=values.get("server_mode", values.get("redis_mode", "standalone")),
            role=values.get("role", "master"),
            replicas=sum(
                "state=online" in text
                for name, text in values.items()
                if re.fullmatch("slave[0-9]+", name)
            ),
            aof=values.get("aof_enabled", "0") == "1",
            memory=MemoryInfo.parse(values),
        )


def fields_of(text: str) -> dict[str, str]:
    """The fields of `INFO`."""
    lines = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, _, value in lines}
