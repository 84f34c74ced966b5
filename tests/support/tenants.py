"""The tenants of a shared Valkey: vLLM's KV cache, embeddings, sessions and Ray, by their prefixes.

Each works over connections of its own, compares whatever it reads with what it wrote last, and
counts what became of it. A cache may miss what it wrote; a session or a spilled object may not.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import valkey

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError, SpillError
from support.samples import source
from support.stores import Store

KIB, MIB = 1 << 10, 1 << 20
HOUR = 3600
MONTH = 31 * 24 * HOUR
_NOISE = np.random.default_rng(0).bytes(16 * MIB)


class Stop(Protocol):
    """An event of `threading` or of `multiprocessing`."""

    def is_set(self) -> bool: ...


@dataclass
class Tally:
    """What became of a tenant's operations.

    Attributes:
        operations: how many writes and reads succeeded.
        misses: how many reads found nothing where something had been written.
        wrong: how many found something else than what was written last.
        errors: how many operations the server refused, by the kind of error.
        latencies: seconds, of each operation.
    """

    operations: int = 0
    misses: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)


class Tenant:
    """Writes and reads keys of its own, in turn, until it is told to stop. For one thread.

    Args:
        keys: how many it cycles through: this bounds what it takes on the server.
    """

    prefix: ClassVar[str]
    smallest: ClassVar[int]
    largest: ClassVar[int]

    def __init__(self, keys: int) -> None:
        self.keys = keys
        self.tally = Tally()
        self._random = random.Random(0)
        self._step = 0
        self._written: dict[int, int] = {}  # by key's number, in which step

    def run(self, stop: Stop, pause: float = 0.0) -> None:
        """Write and read until `stop`, with `pause` seconds after each pair."""
        while not stop.is_set():
            self.step()
            if pause:
                time.sleep(pause)

    def step(self) -> None:
        """Write one key, and read one written before."""
        step, number = self._step, self._step % self.keys
        self._step += 1
        if self._attempt(lambda: self._write(number, self._value(step))):
            self._written[number] = step
        if self._written:
            self.check(self._random.choice(list(self._written)))

    def check_all(self) -> None:
        """Read every key that was written."""
        for number in list(self._written):
            self.check(number)

    def check(self, number: int) -> None:
        """Read a key, and compare."""

        def read() -> None:
            found = self._read(number)
            if found is None:
                self.tally.misses += 1
            elif found != self._value(self._written[number]):
                self.tally.wrong += 1

        self._attempt(read)

    def _attempt(self, operation: Callable[[], None]) -> bool:
        start = time.perf_counter()
        try:
            operation()
        except (valkey.ValkeyError, SpillError) as error:
            self.tally.errors[type(error).__name__] += 1
            return False
        self.tally.latencies.append(time.perf_counter() - start)
        self.tally.operations += 1
        return True

    def _value(self, step: int) -> bytes:
        """Incompressible bytes that no other step near has."""
        size = self.smallest + step * 2_654_435_761 % (self.largest - self.smallest + 1)
        start = step * 15_485_863 % (len(_NOISE) - size)
        return _NOISE[start : start + size]

    def _write(self, number: int, value: bytes) -> None:
        raise NotImplementedError

    def _read(self, number: int) -> bytes | None:
        """The value, or None if there is none."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Neighbour(Tenant):
    """One that uses a plain client."""

    def __init__(self, url: str, keys: int) -> None:
        super().__init__(keys)
        self._client: Any = valkey.from_url(url)

    def close(self) -> None:
        self._client.close()


class KVCache(Neighbour):
    """vLLM's: tensors of an hour's life."""

    prefix, smallest, largest = "vllm:kv:", 64 * KIB, 256 * KIB

    def _write(self, number: int, value: bytes) -> None:
        self._client.set(f"{self.prefix}layer{number % 32}:tok{number}", value, ex=HOUR)

    def _read(self, number: int) -> bytes | None:
        return self._client.get(f"{self.prefix}layer{number % 32}:tok{number}")


class Embeddings(Neighbour):
    """A cache of vectors of an hour's life."""

    prefix, smallest, largest = "emb:", 1 * KIB, 6 * KIB

    def _write(self, number: int, value: bytes) -> None:
        self._client.set(f"{self.prefix}sha256:{number:064x}", value, ex=HOUR)

    def _read(self, number: int) -> bytes | None:
        return self._client.get(f"{self.prefix}sha256:{number:064x}")


class Sessions(Neighbour):
    """State of conversations: strings and hashes, with the TTL that session libraries give them."""

    prefix, smallest, largest = "session:", 128, 2 * KIB
    lifetime: ClassVar[int | None] = MONTH

    def _write(self, number: int, value: bytes) -> None:
        key = f"{self.prefix}chat:{number}"
        if number % 2:
            self._client.set(key, value)
        else:
            self._client.hset(key, "history", value)
        if self.lifetime is not None:
            self._client.expire(key, self.lifetime)

    def _read(self, number: int) -> bytes | None:
        key = f"{self.prefix}chat:{number}"
        return self._client.get(key) if number % 2 else self._client.hget(key, "history")


class LastingSessions(Sessions):
    """Without a TTL, so that `volatile-*` evicts none."""

    prefix = "session:lasting:"
    lifetime = None


class Spills(Tenant):
    """Ray's: objects put into the store, fetched, and deleted when another takes their number.

    Half of them lie beside their headers, half have chunks.
    """

    prefix = "ray:spill:"
    smallest, largest = 32 * KIB, 4 * MIB

    def __init__(self, config: Config, keys: int, node: str = "ab" * 28) -> None:
        super().__init__(keys)
        self.store = Store(config, "session_1", node)
        self._urls: dict[int, str] = {}

    def close(self) -> None:
        self.store.close()

    def _write(self, number: int, value: bytes) -> None:
        urls, failure = self.store.put([source(value, number)])
        if failure is not None:
            raise failure
        previous = self._urls.get(number)
        (self._urls[number],) = urls
        if previous is not None:
            self.store.delete([previous])

    def _read(self, number: int) -> bytes | None:
        try:
            found = self.store.find(self._urls[number], f"{number:056x}")
            target = bytearray(found.header.size)
            self.store.fill(found, memoryview(target))
        except LostObjectError:
            return None
        return bytes(target)

    def _value(self, step: int) -> bytes:
        value = super()._value(step)
        return value[: self.smallest] if step % 2 else value

    def delete_all(self) -> None:
        """Remove every object, as Ray does when their references are gone."""
        self.store.delete(self._urls.values())
        self._urls.clear()
        self._written.clear()


@contextlib.contextmanager
def at_work(*tenants: Tenant, pause: float = 0.0) -> Iterator[None]:
    """Have each work in a thread of its own; at the end, each reads again all that it wrote."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(tenants)) as pool:
        working = [pool.submit(tenant.run, stop, pause) for tenant in tenants]
        try:
            yield
        finally:
            stop.set()
    for work, tenant in zip(working, tenants):
        work.result()
        tenant.check_all()
