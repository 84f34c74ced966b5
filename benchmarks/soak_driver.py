"""A driver of the soak: makes, reads, passes on and drops objects at random, and compares each.

It prints its job and what it has done, once a second, as JSON. On its standard input come the lines
`kill owner`, the actor that owns some of its objects, and `drop all`; it ends when that ends.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import xxhash

from benchmarks.common import KIB, MIB

LIVE_BYTES = 250 * MIB
# Seconds after which a `ray.get` counts as hung: Ray waits up to 60 for an IO worker that was
# killed before it had registered, and for 10, 20 and 40 after restores that failed in a row.
HANG = 300
# Seconds within which Ray knows that an actor is dead whose node was killed.
DEATH_IS_KNOWN = 60
OWNERS_KILLED, DROPS_OF_ALL = "kill of an owner", "drop of all"
SIZES = [
    (0, 2 * KIB),
    (100 * KIB, 300 * KIB),
    (MIB, 6 * MIB),
    (20 * MIB, 30 * MIB),
]


def content(seed: int) -> np.ndarray:
    """The object that `seed` tells all of: size, and data that compress well, badly or so-so."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(*SIZES[rng.choice(len(SIZES), p=[0.3, 0.3, 0.35, 0.05])]))
    kind = rng.integers(3)
    if kind == 0:
        return np.frombuffer(rng.bytes(size), np.uint8)
    if kind == 1:
        return np.full(size, seed % 251, np.uint8)
    return rng.integers(seed % 199, seed % 199 + 10, size, np.uint8)


def digest(array: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(array)


# Whatever node dies, these run again. A node has processors for four of them, and so few workers to
# start: each start takes a second of a processor.
make = ray.remote(max_retries=-1, num_cpus=0.5)(content)
read = ray.remote(max_retries=-1, num_cpus=0.5)(digest)


@ray.remote(max_restarts=0, num_cpus=0)
class Owner:
    """Owns the objects that it puts, until it is killed."""

    def put(self, seeds: list[int]) -> list[Any]:
        return [ray.put(content(seed)) for seed in seeds]

    def ping(self) -> None:
        """Fails once the actor is dead."""


@dataclass
class Live:
    """An object, what it is, since when it exists, and the actor that owns it, if one does."""

    ref: Any
    seed: int
    size: int
    since: float
    owner: Any = None


class Driver:
    """What it did is in `operations`, by kind.

    Args:
        destroyed: a file with the time of the latest destruction of data, by `time.monotonic`.
            Only objects that are not younger may be lost.
    """

    def __init__(self, seed: int, destroyed: Path) -> None:
        self._random = random.Random(seed)
        self._destroyed = destroyed
        self._live: list[Live] = []
        self._owner: Any = None
        self.operations: collections.Counter[str] = collections.Counter()

    def step(self) -> None:
        if sum(live.size for live in self._live) > LIVE_BYTES:
            self._drop()
            return
        weights = {
            self._put: 4,
            self._make: 2,
            self._own: 1,
            self._get: 5,
            self._read: 3,
            self._drop: 1,
        }
        self._random.choices(list(weights), list(weights.values()))[0]()

    def kill_owner(self) -> None:
        """Kill the actor that owns objects; reads of these may fail from now on, and no others."""
        if self._owner is not None:
            ray.kill(self._owner)
            has_some = any(live.owner is self._owner for live in self._live)
            self.operations[OWNERS_KILLED] += has_some
            self._owner = None

    def drop_all(self) -> None:
        """Drop all references, one to an actor aside."""
        self._live.clear()
        gc.collect()  # exceptions refer to the frames they came through, and so to references
        self.operations[DROPS_OF_ALL] += 1

    def _put(self) -> None:
        seed = self._random.getrandbits(32)
        data = content(seed)
        since = time.monotonic()
        self._live.append(Live(ray.put(data), seed, len(data), since))
        self.operations["put"] += 1

    def _make(self) -> None:
        seed = self._random.getrandbits(32)
        since = time.monotonic()
        ref = make.options(resources=self._somewhere()).remote(seed)
        self._live.append(Live(ref, seed, len(content(seed)), since))
        self.operations["made by a task"] += 1

    def _own(self) -> None:
        if self._owner is None:
            self._owner = Owner.options(resources=self._somewhere()).remote()
        seeds = [self._random.getrandbits(32) for _ in range(3)]
        since = time.monotonic()
        try:
            refs = ray.get(self._owner.put.remote(seeds), timeout=HANG)
        except ray.exceptions.GetTimeoutError as error:
            raise AssertionError("hung: a put by an actor") from error
        except ray.exceptions.RayActorError:
            self._owner = None  # its node was killed
            return
        for ref, seed in zip(refs, seeds):
            self._live.append(Live(ref, seed, len(content(seed)), since, self._owner))
            self.operations["put by an actor"] += 1

    def _get(self) -> None:
        live = self._any()
        if live is not None:
            self._compare(live, live.ref, digest, "get")

    def _read(self) -> None:
        live = self._any()
        if live is not None:
            result = read.options(resources=self._somewhere()).remote(live.ref)
            self._compare(live, result, int, "read by a task")

    def _drop(self) -> None:
        if self._live:
            self._live.pop(self._random.randrange(len(self._live)))
            self.operations["drop"] += 1

    def _any(self) -> Live | None:
        return self._random.choice(self._live) if self._live else None

    def _somewhere(self) -> dict[str, float]:
        return {f"node{self._random.randrange(2)}": 0.01}

    def _compare(self, live: Live, ref: Any, digest_of: Any, operation: str) -> None:
        try:
            found = digest_of(ray.get(ref, timeout=HANG))
        except ray.exceptions.GetTimeoutError as error:
            raise AssertionError(f"hung: {live}, {operation}") from error
        except ray.exceptions.RayError as error:
            self.operations[self._reason(live, error, operation)] += 1
            self._live = [other for other in self._live if other is not live]
            return
        if found != digest(content(live.seed)):
            raise AssertionError(f"wrong bytes: {live}, {operation}")
        self.operations[operation] += 1

    def _reason(self, live: Live, error: Exception, operation: str) -> str:
        """Why an object could not be read.

        Raises:
            AssertionError: for no reason.
        """
        if isinstance(error, ray.exceptions.OwnerDiedError) and _is_dead(live.owner):
            return "lost with its owner"
        lost = isinstance(error, ray.exceptions.ObjectLostError)
        if lost and live.since <= float(self._destroyed.read_text()):
            return "lost where data had been destroyed"
        raise AssertionError(f"lost: {live}, {operation}") from error


def _is_dead(actor: Any) -> bool:
    deadline = time.monotonic() + DEATH_IS_KNOWN
    while actor is not None and time.monotonic() < deadline:
        try:
            ray.get(actor.ping.remote(), timeout=5)
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.RayError:
            pass
        time.sleep(0.5)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("seed", type=int)
    parser.add_argument("destroyed", type=Path)
    options = parser.parse_args()
    ray.init(address=options.address, log_to_driver=False, logging_level="ERROR")
    driver = Driver(options.seed, options.destroyed)
    stopping = threading.Event()
    commands: collections.deque[str] = collections.deque()

    def read_stdin() -> None:
        for line in sys.stdin:
            commands.append(line.strip())
        stopping.set()

    threading.Thread(target=read_stdin, daemon=True).start()
    doing = {"kill owner": driver.kill_owner, "drop all": driver.drop_all}
    job = ray.get_runtime_context().get_job_id()
    told = 0.0
    while not stopping.is_set():
        driver.step()
        while commands:
            doing[commands.popleft()]()
        if time.monotonic() - told > 1:
            told = time.monotonic()
            _tell(job, driver)
    _tell(job, driver)
    ray.shutdown()


def _tell(job: str, driver: Driver) -> None:
    print(json.dumps({"job": job, "operations": driver.operations}), flush=True)


if __name__ == "__main__":
    main()
