"""What failovers lose of what was reported as put, by how many replicas each put waits for.

A store puts, reads, compares and drops objects all the time, while the primary is killed over and
over: Sentinels make a primary of one of its two replicas, and the old one is started again as an
empty replica. Two things are done to make that like machines that fail, and not like processes on
one machine, between which replication takes no time at all: each replica follows its primary over a
link of its own, which carries some 20 MB/s; and what is on these links when the primary is killed
is dropped, as it is when a machine dies.

`python -m benchmarks.failover --kills 30 --seed 1` fails if wrong bytes came back, or if anything
was lost that all replicas had been waited for.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support.proxy import Proxy, proxy_to
from support.servers import Node, wait_until
from support.topologies import SentinelGroup, sentinel_servers

from benchmarks.common import KIB, note, origin, origin_line, results_only, table
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError, ServerError
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.store import node
from ray_valkey_spill.store.object_store import ObjectStore

REPLICAS = 2
SIZES = (16 * KIB, 64 * KIB, 256 * KIB)
LIVE = 200  # objects that are kept before the oldest is dropped
RATE = 15e6  # bytes per second that are put at most
# A replica's link: this many bytes at a time, each of which takes that many seconds.
PIECE, DELAY = 64 * KIB, 0.003
# Seconds between two kills in which all is well, at least and at most.
QUIET = (0.5, 2.0)
# What was still under way to the killed primary has ended by then, and no failover has.
SHORTEST_FAILOVER = 0.5


class Live(NamedTuple):
    """An object that was reported as put, and not yet dropped."""

    url: str
    number: int


class Objects:
    """Objects made from their numbers: random bytes that no other has at their place."""

    def __init__(self, seed: int) -> None:
        self._noise = np.random.default_rng(seed).integers(0, 1 << 64, max(SIZES) // 8, np.uint64)
        self._seed = seed

    def __call__(self, number: int) -> memoryview:
        size = random.Random(self._seed + number).choice(SIZES)
        words = self._noise[: size // 8] ^ np.uint64(number * 0x9E3779B97F4A7C15 % (1 << 64))
        return memoryview(words).cast("B")


class Writer(threading.Thread):
    """Puts objects one after the other, reads some, and reads and drops the oldest.

    Attributes:
        counts: `reported`, and what became of these: `right`, `lost`, `wrong`; and `failed` puts.
        done: when each put that was reported ended, in seconds of the monotonic clock.
    """

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__()
        self._store = ObjectStore(config, "session", "node")
        self._node = node.Node(config, "session", "node")
        self._make = Objects(seed)
        self._choices = random.Random(seed)
        self._live: collections.deque[Live] = collections.deque()
        self._stopping, self._asked = threading.Event(), threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.done: list[float] = []

    def check(self) -> None:
        """Read and compare all there is."""
        self._asked.set()
        wait_until(lambda: not self._asked.is_set())

    def stop(self) -> None:
        """Read and drop all there is, and end."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        number = 0
        while not self._stopping.is_set():
            if self._asked.is_set():
                for place in reversed(range(len(self._live))):
                    self._read(place)
                self._asked.clear()
            start = time.monotonic()
            size = self._put(number)
            number += 1
            if self._live:
                self._read(self._choices.randrange(len(self._live)))
            if len(self._live) > LIVE:
                self._drop_oldest()
            time.sleep(max(0.0, start + size / RATE - time.monotonic()))
        while self._live:
            self._drop_oldest()
        self._node.destroy(is_alive=lambda process: False)
        self._node.close()
        self._store.close()

    def _put(self, number: int) -> int:
        data = self._make(number)
        urls, failure = self._store.put([SourceObject(_id(number), b"", b"", data)])
        if failure is not None:
            self.counts["failed"] += 1
            note(f"a put failed: {failure}")
        for url in urls:
            self.counts["reported"] += 1
            self.done.append(time.monotonic())
            self._live.append(Live(url, number))
        return len(data)

    def _drop_oldest(self) -> None:
        # What cannot be had now is read again until it can.
        if self._read(0):
            live = self._live.popleft()
            self.counts["right"] += 1
            with contextlib.suppress(ServerError):
                self._store.delete([live.url])

    def _read(self, place: int) -> bool:
        """Read an object and compare it; what is not right is counted, and not kept."""
        live = self._live[place]
        expected = self._make(live.number)
        target = bytearray(len(expected))
        try:
            self._store.fill(self._store.find(live.url, _id(live.number)), memoryview(target))
        except LostObjectError:
            outcome = "lost"
        except ServerError:
            return False
        else:
            if target == expected:
                return True
            outcome = "wrong"
        self.counts[outcome] += 1
        del self._live[place]
        return False


def _id(number: int) -> str:
    return f"{number:056x}"


class Kill(NamedTuple):
    """`at` is in seconds of the monotonic clock; `behind`, the bytes that each replica lacked."""

    at: float
    behind: list[int]


def failover(min_replicas: int, kills: int, seed: int) -> dict[str, Any]:
    """Kill primaries under a writer whose puts wait for `min_replicas`; what came of it.

    Args:
        min_replicas: as the parameter of that name.
        kills: how often.
        seed: of objects, and of the moments.
    """
    choices = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="rvs-") as directory,
        sentinel_servers(Path(directory), replicas=REPLICAS) as group,
    ):
        params = {"url": group.url, "sentinel_service": group.service, "min_replicas": min_replicas}
        writer = Writer(Config.load(params, {}), seed)
        writer.start()
        killed: list[Kill] = []
        losing = 0
        try:
            for number in range(kills):
                lost = writer.counts["lost"]
                killed.append(_kill_once(group, writer, choices.uniform(*QUIET)))
                writer.check()
                losing += writer.counts["lost"] > lost
                note(f"min_replicas={min_replicas}, kill {number + 1}: {dict(writer.counts)}")
        finally:
            writer.stop()
        left = len(group.our_keys())
    waits = [_until_next_put(kill, writer) for kill in killed]
    return {
        "min_replicas": min_replicas,
        "kills": kills,
        "seed": seed,
        **{name: writer.counts[name] for name in ("reported", "right", "lost", "wrong", "failed")},
        "kills_that_lost": losing,
        "behind_kib": statistics.median(min(kill.behind) for kill in killed) / KIB,
        "until_put_s": statistics.median(waits),
        "until_put_max_s": max(waits),
        "keys_left": left,
    }


def _kill_once(group: SentinelGroup, writer: Writer, quiet: float) -> Kill:
    """Kill the primary after `quiet` seconds; returns when all is as before, and puts go on."""
    with _thin_links(group) as links:
        time.sleep(quiet)
        primary = group.primary()
        behind = [_offset(primary) - _offset(replica) for replica in group.replicas()]
        for link in links:
            link.refusing = True
            link.to_client.stall()
        group.kill_primary()
        kill = Kill(time.monotonic(), behind)
        group.wait_until_followed(primary)
    group.restart(primary)
    with _hurried(group):
        group.wait_until_whole()
    wait_until(lambda: writer.done[-1] > kill.at + SHORTEST_FAILOVER, timeout=120)
    return kill


@contextlib.contextmanager
def _thin_links(group: SentinelGroup) -> Iterator[list[Proxy]]:
    """Have each replica follow the primary over a link of its own, until Sentinels mend that."""
    port = group.primary().port
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(proxy_to(port)) for _ in group.replicas()]
        for replica, link in zip(group.replicas(), links):
            link.to_client.piece, link.to_client.delay = PIECE, DELAY
            replica.client.replicaof("127.0.0.1", link.port)
        wait_until(
            lambda: all(
                _follows(replica, link.port) for replica, link in zip(group.replicas(), links)
            )
        )
        yield links


@contextlib.contextmanager
def _hurried(group: SentinelGroup) -> Iterator[None]:
    """Have Sentinels notice at once that the old primary is back, and not within ten seconds."""
    for sentinel in group.sentinels:
        sentinel.client.execute_command("SENTINEL DEBUG", "INFO-PERIOD", 100)
    yield
    for sentinel in group.sentinels:
        sentinel.client.execute_command("SENTINEL DEBUG", "INFO-PERIOD", 10_000)


def _follows(node: Node, port: int) -> bool:
    found = node.client.info("replication")
    return bool(found["master_port"] == port and found["master_link_status"] == "up")


def _offset(node: Node) -> int:
    found = node.client.info("replication")
    return int(found.get("slave_repl_offset", found["master_repl_offset"]))


def _until_next_put(kill: Kill, writer: Writer) -> float:
    return next(end for end in writer.done if end > kill.at + SHORTEST_FAILOVER) - kill.at


# --- the report ---


def failures(runs: list[dict[str, Any]]) -> list[str]:
    """What must not be."""
    found = []
    for run in runs:
        name = f"min_replicas={run['min_replicas']}"
        if run["wrong"]:
            found.append(f"{name}: {run['wrong']} objects came back wrong")
        if run["lost"] and run["min_replicas"] == REPLICAS:
            found.append(f"{name}: {run['lost']} objects were lost")
        if run["keys_left"]:
            found.append(f"{name}: {run['keys_left']} keys were left")
    return found


ROWS = {
    "primaries killed": "{kills}",
    "objects reported as put": "{reported:,}",
    "read back right": "{right:,}",
    "lost": "{lost:,}",
    "kills that lost some": "{kills_that_lost}",
    "came back wrong": "{wrong}",
    "puts that failed": "{failed}",
    "KiB that the nearer replica lacked at a kill, median": "{behind_kib:.0f}",
    "seconds until the next put was reported, median": "{until_put_s:.1f}",
    "at most": "{until_put_max_s:.1f}",
}


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    runs = found["runs"]
    summary = (
        f"A store puts, reads, compares and drops objects while its primaries are killed. There "
        f"are {REPLICAS} replicas and three Sentinels (seed {runs[0]['seed']}). A replica follows "
        f"over a link of its own, which takes {1e3 * DELAY:g} ms for each {PIECE // KIB} KiB, and "
        "what is on these links when the primary is killed is dropped, as if its machine had died. "
        "Every object that was reported was read and compared after each kill, until it was "
        f"dropped: **{len(failures(runs))} failures**."
    )
    head = ["", *(f"`min_replicas` {run['min_replicas']}" for run in runs)]
    rows = [[name, *(text.format(**run) for run in runs)] for name, text in ROWS.items()]
    written = "Written by `python -m benchmarks.failover`."
    return "\n\n".join(
        [
            *("# Failover", written, summary),
            *failures(runs),
            *(table([head, *rows]), origin_line(found)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of primaries, for each mode")
    parser.add_argument("--seed", type=int, default=random.getrandbits(32))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")
    parser.add_argument("--render", type=Path, help="report on this JSON file instead")
    options = parser.parse_args()
    if options.render:
        print(report(json.loads(options.render.read_text())))
        return
    with results_only() as output:
        found = origin()
        runs = [failover(number, options.kills, options.seed) for number in range(REPLICAS + 1)]
        found["runs"] = runs
        print(json.dumps(found, indent=2) if options.json else report(found), file=output)
    sys.exit(bool(failures(runs)))


if __name__ == "__main__":
    main()
