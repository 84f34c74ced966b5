"""Nodes, drivers and actors that come and go all the time; nothing may be lost, or stay.

Drivers keep up to four times what the object stores hold. Every minute or so a node other than
the head is killed and another one started; now and then a driver is killed, or ends. What is on the
server is compared with what is referenced, every few seconds.

`python -m benchmarks.churn --minutes 120 --into DIRECTORY` draws both over time, and fails if an
object that was on the server was lost or wrong, if a read hung, if an object stayed on a dead node
for longer than two minutes after its last reference went, or on a living one for longer than four,
if values or pending objects are left at the end, or, in a run of 20 minutes and more, if memory,
metadata, threads, sockets or files keep growing. `--quick` takes four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.cluster_utils import Cluster
from support.clusters import (
    add_node,
    cluster_with,
    io_workers,
    kill_node,
    own_memory,
    system_config,
)
from support.servers import BOOKS, ROOT, Server, valkey_server
from support.session_files import shared_files

from benchmarks.common import MIB, lines, note, origin, origin_line, results_only, table
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName

NODES, DRIVERS = 3, 2
# Of a node, for tasks. Each runs the tasks of one driver only, and Ray ends idle ones beyond the
# number of processors: else most of the machine's time goes into the start of workers.
WORKERS = {"num_workers_soft_limit": 6}
BETWEEN_SAMPLES = 3.0
# Seconds for which an object of a dead node may stay after its last reference went, or the node
# died, and those by which a driver's list of its references and a sample may be late.
MOST_EXCESS, LATE = 120.0, 10.0
# On a living node, what Ray forgot to delete: the node asks for some 1,000 objects a minute, twice.
MOST_EXCESS_OF_LIVING = 240.0
DEAD, LIVING = "dead", "living"
KEYS = Keyspace(ROOT)
# The keys with the metadata.
METADATA = ("pending", "index", "usage", "writers", "totals", "leases", "overflows")
# What must not grow: columns of a sample, the largest IO worker's where there are several. Beside
# each is by how much its median may rise from the second third of a run to the last at least; more
# than that is growth if it is also more than a quarter.
MOST_GROWTH = {
    "server": 300.0,  # MiB; half of what a driver references
    "metadata": 0.25,  # MiB; a thousand objects, of which 1,200 are referenced at most
    "workers": 64.0,  # MiB; the data under way
    "threads": 8,  # of LZ4
    "sockets": 16,  # connections to owners
    "files": 16,  # the same
    "session_files": 30,  # those of dead nodes stay for ten minutes
}
MOST_RATIO = 1.25
# Minutes below which the first third of a run does not suffice to warm up, so that growth is not
# judged: processes of two nodes start anew every few minutes.
SHORTEST_JUDGED = 20.0
# Seconds within which Ray hears of a spill, from its beginning.
REPORTED_WITHIN = 5.0


class _Driver:
    """A process of `churn_driver`."""

    def __init__(self, address: str, directory: Path, limit: int, seed: int) -> None:
        self._state = directory / f"driver-{seed}.json"
        self.latest: dict[str, Any] = {}
        self.crashed = False
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.churn_driver"),
                *(address, str(self._state), str(limit), str(seed)),
            ],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )

    def referenced(self) -> set[str]:
        """The ids of what it references; nothing once it has ended."""
        with contextlib.suppress(FileNotFoundError):
            self.latest = json.loads(self._state.read_text())
        if self.process.poll() is not None:
            self.crashed = True
            return set()
        return set(self.latest.get("referenced", []))

    def waits_for(self, object_id: str) -> bool:
        """Whether its actor may have put the object while it waits for the reference.

        An object's id has that of the actor whose task has put it.
        """
        putting = self.latest.get("putting")
        return bool(putting) and putting in object_id and self.process.poll() is None

    def end(self, *, kill: bool) -> None:
        self.referenced()
        if kill:
            self.process.kill()
        self.process.communicate()
        self.crashed = self.crashed or (self.process.returncode != 0 and not kill)
        self._state.unlink(missing_ok=True)


@dataclass
class _Sample:
    seconds: float
    stored: float
    referenced: float
    excess: float
    server: float
    metadata: float
    workers: float
    threads: int
    sockets: int
    files: int
    session_files: int


@dataclass
class Run:
    """A cluster under churn.

    Args:
        server: where it spills to.
        nodes: the cluster.
        directory: for the drivers' states.
        limit: MiB that each driver references at most.
        seed: of what happens when.
    """

    server: Server
    nodes: Cluster
    directory: Path
    limit: int
    seed: int
    samples: list[_Sample] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._drivers: list[_Driver] = []
        self._ended: list[_Driver] = []
        self._seeds = iter(range(self.seed * 1000 + 1, (self.seed + 1) * 1000))
        self._began = time.monotonic()
        self._drivers_ended = float("inf")
        self._next_node = NODES
        # By id: when an object on the server was first seen to be referenced by nobody.
        self._since: dict[str, float] = {}
        # By object id: the names of its copies.
        self._spilled: dict[str, set[ObjectName]] = {}
        # By node: when it was killed, in seconds since the epoch.
        self._killed: dict[str, float] = {}
        # Seconds that an object stayed without a reference, at most: on dead nodes, for which two
        # minutes are promised, and on living ones, where Ray had not asked to delete it.
        self.longest = {DEAD: 0.0, LIVING: 0.0}
        self.longest_details = {DEAD: "", LIVING: ""}

    def go(self, minutes: float, between: float) -> None:
        """Let nodes and drivers come and go for some minutes, then let all drivers end."""
        end = self._began + 60 * minutes
        due = time.monotonic() + between
        for _ in range(DRIVERS):
            self._start_driver()
        while time.monotonic() < end:
            self._sample()
            if time.monotonic() > due:
                self._strike()
                due = time.monotonic() + between * self._random.uniform(0.7, 1.3)
            time.sleep(BETWEEN_SAMPLES)
        for driver in self._drivers:
            driver.end(kill=False)
        self._ended += self._drivers
        self._drivers = []
        self._drivers_ended = time.monotonic() - self._began
        # Enough also for what the last killed node was writing: its lease has to expire first.
        deadline = time.monotonic() + MOST_EXCESS + LATE
        while time.monotonic() < deadline and (self._sample() or any(left(self.server))):
            time.sleep(BETWEEN_SAMPLES)

    def stop(self) -> None:
        for driver in self._drivers:
            driver.end(kill=True)

    def _start_driver(self) -> None:
        address = self.nodes.address
        self._drivers.append(_Driver(address, self.directory, self.limit, next(self._seeds)))

    def _strike(self) -> None:
        kind = self._random.choices(["node", "driver killed", "driver ended"], [6, 1, 1])[0]
        last = self.samples[-1]
        note(
            f"{time.monotonic() - self._began:.0f} s: {kind}; {last.stored:,.0f} MiB stored, "
            f"{last.excess:,.0f} referenced by nobody, so far for {self.longest[DEAD]:.0f} s on "
            f"dead nodes and {self.longest[LIVING]:.0f} s on living ones"
        )
        self.events[kind] = self.events.get(kind, 0) + 1
        if kind == "node":
            number = self._random.randrange(1, NODES)
            self._killed[self.nodes.list_all_nodes()[number].node_id] = time.time()
            kill_node(self.nodes, number)
            add_node(self.nodes, self._next_node)
            self._next_node += 1
            return
        driver = self._drivers.pop(self._random.randrange(len(self._drivers)))
        driver.end(kill=kind == "driver killed")
        self._ended.append(driver)
        self._start_driver()

    def _sample(self) -> int:
        """Look at everything; returns the number of objects on the server."""
        # What is referenced comes last: an object that appears in between is not excess.
        members = self.server.client.zrange(KEYS.index, 0, -1)
        entries = [Entry.parse(member.decode()) for member in members]
        referenced = set[str]().union(*(driver.referenced() for driver in self._drivers))
        now = time.monotonic()
        stored = {entry.name.object_id for entry in entries}
        waited_for = {i for i in stored if any(driver.waits_for(i) for driver in self._drivers)}
        # Of a task whose node was killed Ray stores an error, and spills that too.
        for entry in entries:
            if entry.size >= MIB:
                self._spilled.setdefault(entry.name.object_id, set()).add(entry.name)
        unreferenced = stored - referenced - waited_for
        self._since = {each: self._since.get(each, now) for each in unreferenced}
        for entry in entries:
            if (since := self._since.get(entry.name.object_id)) is not None:
                self._note_age(entry, now, since)
        in_excess = sum(e.size for e in entries if e.name.object_id in self._since)
        workers = list(_looks())
        self.samples.append(
            _Sample(
                now - self._began,
                sum(entry.size for entry in entries) / MIB,
                sum(e.size for e in entries if e.name.object_id in referenced) / MIB,
                in_excess / MIB,
                self.server.client.info("memory")["used_memory"] / MIB,
                self._metadata() / MIB,
                max((each.memory for each in workers), default=0) / MIB,
                max((each.threads for each in workers), default=0),
                max((each.sockets for each in workers), default=0),
                max((each.files for each in workers), default=0),
                _session_files(),
            )
        )
        return len(entries)

    def _note_age(self, entry: Entry, now: float, since: float) -> None:
        """Note how long an object has stayed that nobody references since then."""
        killed = self._killed.get(entry.name.node)
        of = LIVING if killed is None else DEAD
        if killed is not None:
            since = max(since, now - (time.time() - killed))
        if now - since > self.longest[of]:
            self.longest[of] = now - since
            self.longest_details[of] = (
                f"{entry.name}, {entry.size} bytes, on a {of} node, at {time.strftime('%H:%M:%S')}"
            )

    def _metadata(self) -> int:
        """The bytes that the server needs for the metadata."""
        keys = [f"{ROOT}{{default}}:{name}" for name in METADATA]
        return sum(self.server.client.memory_usage(key) or 0 for key in keys)

    def _growth(self) -> dict[str, list[float]]:
        """As `growth`, for the time before the drivers have ended."""
        during = [sample for sample in self.samples if sample.seconds < self._drivers_ended]
        return growth({name: [getattr(s, name) for s in during] for name in MOST_GROWTH})

    def _was_reported(self, object_id: str) -> bool:
        """Whether an object was spilled so long before its node was killed that Ray knew of it.

        Of others that were in a killed node's memory Ray loses the only copy that it knows.
        """
        return any(
            name.time + REPORTED_WITHIN < self._killed.get(name.node, float("inf"))
            for name in self._spilled.get(object_id, ())
        )

    def results(self) -> dict[str, Any]:
        drivers = [*self._ended, *self._drivers]
        missing = [m for d in drivers for m in d.latest.get("missing", [])]
        declared = _declared_lost()
        lost = [m for m in missing if self._was_reported(m[0]) or m[0] in declared]
        return {
            "seconds": self.samples[-1].seconds,
            "events": self.events,
            "reads": sum(driver.latest.get("reads", 0) for driver in drivers),
            "wrong": sum(len(driver.latest.get("wrong", [])) for driver in drivers),
            "hung": sum(len(driver.latest.get("hung", [])) for driver in drivers),
            "not_made_in_time": sum(len(driver.latest.get("late", [])) for driver in drivers),
            "hung_details": [each for driver in drivers for each in driver.latest.get("hung", [])],
            "lost": len(lost),
            "lost_details": [
                f"{', '.join(map(str, self._spilled.get(object_id, [object_id])))}: {error}"
                for object_id, error in lost
            ],
            "crashed": sum(driver.crashed for driver in drivers),
            "lost_by_ray": len(missing) - len(lost),
            "longest_excess_seconds": self.longest[DEAD],
            "longest_excess_on_living_nodes_seconds": self.longest[LIVING],
            "longest_excess_details": [*self.longest_details.values()],
            "most_excess_mib": max(sample.excess for sample in self.samples),
            "most_stored_mib": max(sample.stored for sample in self.samples),
            "left_objects": len(self._since),
            **left(self.server)._asdict(),
            "growth": self._growth(),
            "metadata_left": [
                key.decode() for key in self.server.our_keys() if b"{default}" in key
            ],
        }


class Left(NamedTuple):
    """What is left that is not a stored object, as numbers.

    Attributes:
        left_values: keys of headers and chunks that no object in the metadata has.
        left_pending: objects whose spill has not ended.
    """

    left_values: int
    left_pending: int


def left(server: Server) -> Left:
    """What is left on a server. Values that are being removed meanwhile may count."""
    keys = {key.decode() for key in server.our_keys() if not key.endswith(BOOKS)}
    stored = (Entry.parse(each.decode()).name for each in server.client.zrange(KEYS.index, 0, -1))
    members = server.client.zrange(KEYS.pending, 0, -1)
    pending = [ObjectName.parse(each.decode()) for each in members]
    named = {key for name in (*stored, *pending) for key in KEYS.values(name)}
    return Left(len(keys - named), len(pending))


def growth(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The median and the most of each column, in the second and in the last third."""
    found = {}
    for name, values in columns.items():
        third = max(1, len(values) // 3)
        parts = (values[third : 2 * third] or values, values[-third:])
        found[name] = [figure for part in parts for figure in (statistics.median(part), max(part))]
    return found


def grown(found: Mapping[str, Sequence[float]]) -> list[str]:
    """The failures of what `growth` returns."""
    return [
        f"{name} grew from {before:,.2f} to {after:,.2f}"
        for name, (before, _, after, _) in found.items()
        if after > MOST_RATIO * before and after - before > MOST_GROWTH[name]
    ]


class _Look(NamedTuple):
    memory: int
    threads: int
    sockets: int
    files: int


def _looks() -> Iterator[_Look]:
    """Yield the memory, threads, connections and open files of each IO worker."""
    for worker in io_workers():
        with contextlib.suppress(psutil.Error):
            yield _Look(
                own_memory(worker),
                worker.num_threads(),
                len(worker.net_connections()),
                worker.num_fds(),
            )


def _session() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path())


def _session_files() -> int:
    """The number of this package's files in the session's directory."""
    return sum(1 for _ in shared_files(_session()).iterdir())


def _declared_lost() -> set[str]:
    """The ids of the objects that IO workers found neither in Valkey nor anywhere else.

    Also of some that were dropped while they were being restored, which no driver misses.
    """
    found: set[str] = set()
    for log in (_session() / "logs").glob("io_worker*.err"):
        for line in log.read_text(errors="replace").splitlines():
            if "ObjectLostError for a reader" in line:
                found |= {*re.findall("[0-9a-f]{56}", line)}
    return found


def churn(
    minutes: float, between: float, limit: int, seed: int
) -> tuple[dict[str, Any], list[_Sample]]:
    """Run once."""
    with (
        tempfile.TemporaryDirectory(prefix="rvs-churn-") as directory,
        valkey_server() as server,
        cluster_with(system_config(server.url) | WORKERS, NODES) as nodes,
    ):
        run = Run(server, nodes, Path(directory), limit, seed)
        try:
            run.go(minutes, between)
        finally:
            run.stop()
        found = run.results()
    bad = ("lost", "wrong", "hung", "crashed", "left_objects", "left_values", "left_pending")
    failures = [f"{name}: {found[name]}" for name in bad if found[name]]
    failures += [f"{name}: 0" for name in ("reads", "most_stored_mib") if not found[name]]
    for name, bound in (
        ("longest_excess_seconds", MOST_EXCESS),
        ("longest_excess_on_living_nodes_seconds", MOST_EXCESS_OF_LIVING),
    ):
        if found[name] > bound + LATE:
            failures.append(f"{name}: {found[name]:.0f}")
    is_judged = minutes >= SHORTEST_JUDGED
    if is_judged:
        failures += grown(found["growth"])
    found = {"seed": seed, **found, "growth_is_judged": is_judged, "failures": failures}
    return found, run.samples


def _draw(samples: list[_Sample], into: Path) -> None:
    """Draw what was stored and referenced over time, and what must not grow."""
    lines(
        into / "churn.png",
        "On the server, and referenced, while nodes come and go",
        ("minutes", "MiB of data"),
        {
            name: {sample.seconds / 60: getattr(sample, name) for sample in samples}
            for name in ("stored", "referenced", "excess")
        },
        logarithmic=False,
    )
    lines(
        into / "churn-growth.png",
        "What must not grow, each as a part of its most",
        ("minutes", "part of the most"),
        {
            name: {s.seconds / 60: getattr(s, name) / (most or 1) for s in samples}
            for name in MOST_GROWTH
            for most in [max(getattr(sample, name) for sample in samples)]
        },
        logarithmic=False,
    )


def _report(about: dict[str, Any], found: dict[str, Any]) -> str:
    names = [name for name, value in found.items() if isinstance(value, int | float)]
    rows = [["what", "value"], *([name, f"{found[name]:,.0f}"] for name in names)]
    rows += [[f"events: {name}", str(count)] for name, count in found["events"].items()]
    columns = [["", "2nd third: median", "most", "last third: median", "most"]]
    columns += [[n, *(f"{each:,.2f}" for each in row)] for n, row in found["growth"].items()]
    parts = [table(rows), table(columns)]
    for name in (name for name in found if name.endswith("_details")):
        parts += [f"{name.removesuffix('_details')}: {each}" for each in found[name] if each]
    if not found["growth_is_judged"]:
        parts.append(f"Growth is not judged in less than {SHORTEST_JUDGED:g} minutes.")
    return "\n\n".join([*parts, f"Failures: {found['failures']}", origin_line(about)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--between", type=float, default=60, help="seconds between two events")
    parser.add_argument("--limit", type=int, default=600, help="MiB that a driver references")
    parser.add_argument("--seed", type=int, default=random.getrandbits(16))
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="for the picture")
    parser.add_argument("--quick", action="store_true", help="two minutes and the end")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.between, options.limit = 2, 20, 150
    options.into.mkdir(parents=True, exist_ok=True)
    about = origin()
    with results_only() as output:
        found, samples = churn(options.minutes, options.between, options.limit, options.seed)
        results = {**about, "runs": [found]}
        print(
            json.dumps(results, indent=2) if options.json else _report(about, found),
            file=output,
            flush=True,
        )
        _draw(samples, options.into)
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
