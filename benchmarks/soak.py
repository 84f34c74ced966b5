"""Hours of random work on a Ray that spills, with random faults; nothing may be lost or hang.

Two drivers and the tasks of two nodes put, read and drop objects, several times what the object
stores hold, and compare every byte that they read. Meanwhile one fault after the other strikes the
connections, the server, and Ray's processes. Which, when, and for how long follows from the seed.

`python -m benchmarks.soak --minutes 20 --seeds 1 2 3` fails if an object came back wrong, or not at
all without data having been destroyed; if anything waited for five minutes; or if at the end keys,
threads, sockets or memory are left that should not be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.clusters import add_node, cluster, io_workers, kill_node, talks_to
from support.faults import DESTROYING, PASSING, REFUSING, Fault, Rig
from support.servers import wait_until

from benchmarks.common import MIB, machine, note, results_only, table
from benchmarks.soak_driver import HANG
from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace, ObjectName
from ray_valkey_spill.tiers.overflow import OverflowTier

DRIVERS = 2
SAMPLE_INTERVAL = 5.0
# What an IO worker may grow by, from when it was first looked at: the data under way, and LZ4's
# threads.
MOST_GROWTH = {"memory": 64 * MIB, "threads": 8, "files": 8}
# Seconds within which Ray hears of a spill, from its beginning.
REPORTED_WITHIN = 5.0
KEYS = Keyspace.of(Config())
# Odds that the next fault is one of these.
ODDS = {"passing": 12, "refusing": 4, "process": 5, "destroying": 1}


# --- the parts ---


class Driver:
    """A process of `soak_driver`, replaced when it is killed."""

    def __init__(self, address: str, seed: int, destroyed: Path) -> None:
        self._latest: dict[str, int] = {}
        self.progress = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak_driver", address, str(seed), str(destroyed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._hear)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if found != self._latest:
                    self.progress = time.monotonic()
                self._latest = found

    def _hear(self) -> None:
        assert self._process.stderr is not None
        self._errors += self._process.stderr

    @property
    def is_at_work(self) -> bool:
        return bool(self._latest)

    def failure(self) -> str | None:
        if self._process.poll() is not None:
            self._join()
            return f"a driver ended: {''.join(self._errors[-30:])}"
        if time.monotonic() - self.progress > HANG + 60:
            return f"a driver did nothing for {HANG + 60} seconds"
        return None

    def stop(self, *, kill: bool = False) -> collections.Counter[str]:
        """End it, which without `kill` is after the step it is at; returns what it did."""
        assert self._process.stdin is not None
        if kill:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(HANG)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._join()
        return collections.Counter(self._latest)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


class Watch(threading.Thread):
    """Looks at the IO workers every few seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[int, _Looks] = {}
        self.growth: dict[str, int] = dict.fromkeys(MOST_GROWTH, 0)
        self._grown: dict[str, str] = {}  # by what
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def failures(self) -> list[str]:
        return [
            f"an IO worker grew by {self.growth[name]} ({name}): {self._grown[name]}"
            for name, most in MOST_GROWTH.items()
            if self.growth[name] > most
        ]

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_INTERVAL):
            for worker in io_workers():
                with contextlib.suppress(psutil.Error):
                    self._look_at(worker)

    def _look_at(self, worker: psutil.Process) -> None:
        found = _looks_of(worker)
        first = self._first.setdefault(worker.pid, found)
        for name, has in found.items():
            growth = has.total() - first[name].total()
            if growth > self.growth[name]:
                self.growth[name] = growth
                self._grown[name] = (
                    f"{dict(has - first[name])} came, {dict(first[name] - has)} went"
                )


_Looks = dict[str, collections.Counter[str]]


def _looks_of(worker: psutil.Process) -> _Looks:
    """What a process has: bytes of memory, threads by name, and open files by what they are."""
    process = Path(f"/proc/{worker.pid}")
    threads, files = collections.Counter[str](), collections.Counter[str]()
    with contextlib.suppress(FileNotFoundError):  # gone meanwhile
        for thread in process.glob("task/*/comm"):
            threads[thread.read_text().strip()] += 1
        for file in process.glob("fd/*"):
            files[str(file.readlink()).partition(":")[0]] += 1
        for connection in worker.net_connections("tcp"):
            files[f"{connection.status} to {connection.raddr and connection.raddr.port}"] += 1
            files["socket"] -= 1
    memory = collections.Counter({"bytes": worker.memory_full_info().uss})
    return {"memory": memory, "threads": threads, "files": files}


# --- a run ---


@dataclass
class Run:
    """One seed's cluster, server and drivers, and what came of them.

    Attributes:
        longest: seconds that a fault lasts, at most.
    """

    rig: Rig
    nodes: Any
    destroyed: Path
    overflow: OverflowTier | None
    random: random.Random
    longest: float
    drivers: list[Driver] = field(default_factory=list)
    operations: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    dead_nodes: set[str] = field(default_factory=set)
    killed_workers: dict[int, float] = field(default_factory=dict)  # when, by process id

    def go_on_for(self, seconds: float) -> list[str]:
        """Returns what went wrong, as soon as something does."""
        while len(self.drivers) < DRIVERS:
            self._add_driver()
        wait_until(lambda: all(each.is_at_work or each.failure() for each in self.drivers), HANG)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self.random.uniform(0.5, 4))
            for driver in self.drivers:
                if failure := driver.failure():
                    return [failure]
            self._strike()
        return []

    def end(self) -> list[str]:
        """Stop the drivers; returns what is left that should not be."""
        for driver in self.drivers:
            self.operations += driver.stop()
        try:
            wait_until(lambda: not self._left(), timeout=120)
        except AssertionError:
            left = self._left()
            return [f"keys and files are left: {left[:5]}, {len(left)} in all"]
        return []

    def _strike(self) -> None:
        kind = self.random.choices(list(ODDS), list(ODDS.values()))[0]
        fault = self.random.choice(self._faults(kind))
        lasts = self.random.choice([0, 1, 1, 3, 15, 40]) * self.random.uniform(0.5, 1)
        lasts = min(lasts, self.longest)
        note(f"{time.strftime('%H:%M:%S')} {fault.__name__} for {lasts:.1f} s")
        if kind == "destroying":
            self.destroyed.write_text("inf")
        with fault(self.rig):
            time.sleep(0 if kind in ("process", "destroying") else lasts)
        if kind == "destroying":
            self.destroyed.write_text(str(time.monotonic()))
        self.faults[fault.__name__] += 1

    def _faults(self, kind: str) -> list[Fault]:
        process: list[Fault] = [
            _of_a_process(self._kill_an_io_worker, "an IO worker is killed"),
            _of_a_process(self._kill_a_driver, "a driver is killed"),
            _of_a_process(self._kill_a_node, "a node is killed"),
        ]
        # IO workers are at hand most often.
        return {
            "passing": PASSING,
            "refusing": REFUSING,
            "process": [process[0], *process],
            "destroying": DESTROYING,
        }[kind]

    def _add_driver(self) -> None:
        seed = self.random.getrandbits(32)
        self.drivers.append(Driver(self.nodes.address, seed, self.destroyed))

    def _kill_an_io_worker(self) -> None:
        # One that is at work, or was: killed before it has registered, it costs Ray a minute.
        at_work = [worker for worker in io_workers() if talks_to(worker, self.rig.proxy.port)]
        if at_work:
            with contextlib.suppress(psutil.Error):
                worker = self.random.choice(at_work)
                worker.send_signal(signal.SIGKILL)
                self.killed_workers[worker.pid] = time.time()

    def _kill_a_driver(self) -> None:
        driver = self.drivers.pop(self.random.randrange(len(self.drivers)))
        self.operations += driver.stop(kill=True)
        self._add_driver()

    def _kill_a_node(self) -> None:
        self.dead_nodes.add(self.nodes.list_all_nodes()[1].node_id)
        kill_node(self.nodes, 1)
        add_node(self.nodes, 1)

    def _left(self) -> list[str]:
        """Keys and files, but those that are for the clean-up: see `_is_for_clean_up`."""
        names = {
            key.decode(): ":".join(key.decode().removeprefix(KEYS.root).split(":")[:3])
            for key in self.rig.data_keys()
        }
        if self.overflow is not None:
            owners = self.overflow.node_names()
            files = [file for owner in owners for file in self.overflow.files(owner)]
            names |= {file.path: str(file.entry.name) for file in files}
        return [
            what
            for what, name in names.items()
            if not self._is_for_clean_up(ObjectName.parse(name))
        ]

    def _is_for_clean_up(self, name: ObjectName) -> bool:
        """Whether a dead node left it, or an IO worker killed before Ray heard that it was done."""
        killed = self.killed_workers.get(name.writer, 0)
        just_done = 0 < killed - name.time < REPORTED_WITHIN and not self.rig.client.zscore(
            KEYS.pending, str(name)
        )
        return name.node in self.dead_nodes or just_done


def _of_a_process(strike: Callable[[], None], name: str) -> Fault:
    @contextlib.contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        strike()
        yield

    fault.__name__ = name
    return fault


def soak(seed: int, minutes: float, longest: float) -> dict[str, Any]:
    """Run one seed; `failures` of the report is empty if all went well."""
    choices = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="rvs-") as directory, contextlib.ExitStack() as stack:
        rig = stack.enter_context(contextlib.closing(Rig(Path(directory, "valkey"), seed)))
        destroyed = Path(directory, "destroyed")
        destroyed.write_text("0")
        params: dict[str, Any] = {"retry_timeout": choices.choice([1, 5, 30])}
        if choices.random() < 0.5:
            params |= {"overflow_uri": str(Path(directory, "overflow")), "max_bytes": 100 * MIB}
        nodes = stack.enter_context(cluster(rig.proxy.url, **params))
        watch = Watch()
        watch.start()
        overflow = OverflowTier.of(Config.load(params, {}))
        run = Run(rig, nodes, destroyed, overflow, choices, longest)
        start = time.monotonic()
        failures: list[str] = []
        try:
            failures += run.go_on_for(60 * minutes)
        finally:
            failures += run.end()
            watch.stop()
    return {
        "seed": seed,
        "params": params,
        "seconds": time.monotonic() - start,
        "faults": dict(run.faults.most_common()),
        "operations": dict(run.operations.most_common()),
        "io_worker_growth": watch.growth,
        "failures": failures + watch.failures(),
    }


# --- the report ---


def report(machine: dict[str, str], runs: list[dict[str, Any]]) -> str:
    """Markdown."""
    operations, faults = (
        sum((collections.Counter(run[what]) for run in runs), collections.Counter[str]())
        for what in ("operations", "faults")
    )
    hours = sum(run["seconds"] for run in runs) / 3600
    failures = [f"seed {run['seed']}: {failure}" for run in runs for failure in run["failures"]]
    seeds = ", ".join(f"{run['seed']} ({run['seconds'] / 60:.0f} min)" for run in runs)
    growth = {name: max(run["io_worker_growth"][name] for run in runs) for name in MOST_GROWTH}
    summary = (
        f"{hours:.2f} hours, {sum(faults.values())} faults, {sum(operations.values()):,} "
        f"operations, **{len(failures)} failures**. Seeds: {seeds}."
    )
    grown = (
        f"An IO worker grew by at most {growth['memory'] / MIB:.0f} MiB, {growth['threads']} "
        f"threads and {growth['files']} files and sockets, from when it was first looked at."
    )
    about = "{cpu}, {memory}, kernel {kernel}, Python {python}, Ray {ray}".format(**machine)
    operation_rows = [[name, f"{count:,}"] for name, count in operations.most_common()]
    fault_rows = [[name.replace("_", " "), str(count)] for name, count in faults.most_common()]
    tables = (
        table([["operation", "times"], *operation_rows]),
        table([["fault", "times"], *fault_rows]),
    )
    return "\n\n".join(["# Soak", summary, *failures, *tables, grown, about])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="for each seed")
    parser.add_argument("--longest", type=float, default=40, help="seconds of a fault, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[random.getrandbits(32)])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")
    parser.add_argument("--render", type=Path, nargs="+", help="report on these JSON files instead")
    options = parser.parse_args()
    if options.render:
        found = [json.loads(path.read_text()) for path in options.render]
        print(report(found[0]["machine"], [run for each in found for run in each["runs"]]))
        return
    runs = []
    with results_only() as output:
        for seed in options.seeds:
            note(f"seed {seed}")
            runs.append(soak(seed, options.minutes, options.longest))
            note(json.dumps(runs[-1], indent=2))
        results = json.dumps({"machine": machine(), "runs": runs}, indent=2)
        print(results if options.json else report(machine(), runs), file=output)
    sys.exit(any(run["failures"] for run in runs))


if __name__ == "__main__":
    main()
