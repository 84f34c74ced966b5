"""A driver of the soak: makes, reads, passes on and drops objects at random, and compares each."""

from __future__ import annotations

import argparse
import collections
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


# Whatever node dies, these run again.
make = ray.remote(max_retries=-1, num_cpus=0.1)(content)
read = ray.remote(max_retries=-1, num_cpus=0.1)(digest)


@dataclass
class Live:
    """An object, what it is, and since when it exists."""

    ref: Any
    seed: int
    size: int
    since: float


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
        self.operations: collections.Counter[str] = collections.Counter()

    def step(self) -> None:
        if sum(live.size for live in self._live) > LIVE_BYTES:
            self._drop()
            return
        weights = {self._put: 4, self._make: 2, self._get: 5, self._read: 3, self._drop: 1}
        self._random.choices(list(weights), list(weights.values()))[0]()

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
            lost = isinstance(error, ray.exceptions.ObjectLostError)
            if not lost or live.since > float(self._destroyed.read_text()):
                raise AssertionError(f"lost: {live}, {operation}") from error
            self.operations["lost where data had been destroyed"] += 1
            self._live = [other for other in self._live if other is not live]
            return
        if found != digest(content(live.seed)):
            raise AssertionError(f"wrong bytes: {live}, {operation}")
        self.operations[operation] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("seed", type=int)
    parser.add_argument("destroyed", type=Path)
    options = parser.parse_args()
    ray.init(address=options.address, log_to_driver=False, logging_level="ERROR")
    driver = Driver(options.seed, options.destroyed)
    stopping = threading.Event()

    def read_stdin() -> None:
        sys.stdin.read()
        stopping.set()

    threading.Thread(target=read_stdin, daemon=True).start()
    told = 0.0
    while not stopping.is_set():
        driver.step()
        if time.monotonic() - told > 1:
            told = time.monotonic()
            print(json.dumps(driver.operations), flush=True)
    print(json.dumps(driver.operations), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
