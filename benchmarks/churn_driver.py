"""A driver of `benchmarks.churn`: puts, reads and drops objects, until its standard input ends.

`python -m benchmarks.churn_driver ADDRESS STATE LIMIT SEED` keeps up to LIMIT MiB referenced, and
writes which objects these are, and what became of its reads, to the file STATE.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

MIB = 1 << 20
# Seconds for which a read waits before it counts as hung.
HANG = 120.0
# Seconds for which an owner may take to say whether an object has been made.
WAIT = 10.0


def content(number: int) -> np.ndarray:
    """A MiB that no other number has, and that does not compress."""
    return np.random.default_rng(number).integers(0, 255, MIB, dtype=np.uint8)


@ray.remote(max_retries=0, scheduling_strategy="SPREAD")
def produce(number: int) -> np.ndarray:
    return content(number)


@ray.remote(max_restarts=0, num_cpus=0, scheduling_strategy="SPREAD")
class Owner:
    """Owns objects that it has put. Only the driver, which borrows them, references them."""

    def put(self, numbers: list[int]) -> list[Any]:
        return [ray.put(content(number)) for number in numbers]


class Driver:
    def __init__(self, state: Path, limit: int, seed: int) -> None:
        self._state = state
        self._limit = limit
        self._random = random.Random(seed)
        self._live: dict[int, Any] = {}
        self._of_owner: list[int] = []
        self._owner: Any = None
        # The id of the actor, while it puts objects and this driver does not know them.
        self._putting = ""
        self._numbers = iter(range(seed * 10**7, (seed + 1) * 10**7))
        self._wrong: list[int] = []
        self._missing: list[tuple[str, str]] = []
        self._hung: list[str] = []
        self._late: list[str] = []
        self._reads = 0

    def run(self) -> None:
        written = 0.0
        while not select.select([sys.stdin], [], [], 0)[0]:
            self._act()
            if time.monotonic() - written > 1:
                written = time.monotonic()
                self._write()
        self._write()

    def _act(self) -> None:
        odds = {self._make: 4, self._own: 1, self._read: 6, self._drop: 3}
        if len(self._live) >= self._limit:
            odds = {self._read: 2, self._drop: 3}
        elif self._owner is not None and self._random.random() < 0.005:
            odds = {self._kill_owner: 1}
        action = self._random.choices([*odds], [*odds.values()])[0]
        action()

    def _make(self) -> None:
        for _ in range(8):
            number = next(self._numbers)
            self._live[number] = produce.remote(number)
        # Before a read, which may wait for long.
        self._write()

    def _own(self) -> None:
        numbers = [next(self._numbers) for _ in range(4)]
        try:
            if self._owner is None:
                self._owner = Owner.remote()
            self._putting = self._owner._actor_id.hex()
            self._write()
            refs = ray.get(self._owner.put.remote(numbers), timeout=HANG)
        except ray.exceptions.GetTimeoutError:
            self._hung.append(f"a put by an actor until {time.strftime('%H:%M:%S')}")
            self._forget_owner()
            return
        except ray.exceptions.RayError:
            # Its node was killed, and it with that.
            self._forget_owner()
            return
        finally:
            self._putting = ""
        self._live |= dict(zip(numbers, refs))
        self._of_owner += numbers
        self._write()

    def _kill_owner(self) -> None:
        ray.kill(self._owner)
        self._forget_owner()

    def _forget_owner(self) -> None:
        self._owner = None
        for number in self._of_owner:
            self._live.pop(number, None)
        self._of_owner = []

    def _read(self) -> None:
        if not self._live:
            return
        number = self._random.choice([*self._live])
        ref = self._live[number]
        try:
            found = ray.get(ref, timeout=HANG)
        except ray.exceptions.GetTimeoutError:
            # What no task has made yet waits for a processor, and not for its storage.
            is_made, _ = ray.wait([ref], timeout=WAIT, fetch_local=False)
            waits = self._hung if is_made else self._late
            waits.append(f"{ref.hex()} until {time.strftime('%H:%M:%S')}")
            del self._live[number]
        except ray.exceptions.OwnerDiedError:
            self._forget_owner()
        except ray.exceptions.RayError as error:
            what = f"{type(error).__name__} at {time.strftime('%H:%M:%S')}: {str(error)[:300]}"
            self._missing.append((ref.hex(), what))
            self._live.pop(number, None)
        else:
            self._reads += 1
            if not np.array_equal(found, content(number)):
                self._wrong.append(number)

    def _drop(self) -> None:
        for number in self._random.sample([*self._live], min(8, len(self._live))):
            del self._live[number]

    def _write(self) -> None:
        state = {
            "referenced": [ref.hex() for ref in self._live.values()],
            "putting": self._putting,
            "reads": self._reads,
            "wrong": self._wrong,
            "missing": self._missing,
            "hung": self._hung,
            "late": self._late,
        }
        new = self._state.with_suffix(".new")
        new.write_text(json.dumps(state))
        new.rename(self._state)


def main() -> None:
    address, state, limit, seed = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    Driver(Path(state), int(limit), int(seed)).run()
    # What it references ends with it.
    Path(state).unlink()
    os._exit(0)


if __name__ == "__main__":
    main()
