"""Ray jobs that need several times their object store, with each storage that Ray can spill to.

Every job has a Ray of its own, on this machine, in a process of its own. Objects are of random
floats, of 25 MB each unless told otherwise. Before anything is measured, as much is spilled and
restored as starts Ray's IO workers. Files are on the disk of the temporary directory.

Throughput is what the raylet logs of its own: bytes over the time in which at least one spill (or
restore) was under way. The log has whole MiB and MiB/s.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import valkey
from support.clusters import ray_with

import ray_valkey_spill
from benchmarks.common import MIB, bars, main, note, table, used_memory, valkey_server

STORE = 200 * MIB
STORAGES = ("valkey", "filesystem", "smart_open")
ROUNDS = 5
# A get that took less was served from the object store.
_RESTORED = 0.0005
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Job:
    """What is run: `working_set` is in multiples of the object store."""

    working_set: int = 4
    writers: int = 1
    reads: str = "sequential"  # "random", "repeated", or one of DATA_JOBS instead
    cold_files: bool = False  # drop the page cache before the reads
    object_size: int = 25_000_000

    def __str__(self) -> str:
        if self.reads in DATA_JOBS:
            return f"{self.working_set} x store, Ray Data {self.reads}"
        writers = "1 writer" if self.writers == 1 else f"{self.writers} writers"
        cold = ", page cache dropped" if self.cold_files else ""
        default = self.object_size == Job.object_size
        size = "" if default else f" of {self.object_size / 1e6:g} MB"
        return f"{self.working_set} x store{size}, {writers}, {self.reads} reads{cold}"


# Whole jobs of Ray Data.
DATA_JOBS = ("shuffle", "sort")
QUICK = (Job(),)
JOBS = (
    Job(),
    Job(cold_files=True),
    Job(object_size=1_000_000),
    Job(writers=4),
    Job(working_set=2),
    Job(working_set=8),
    Job(reads="random"),
    Job(reads="repeated"),
    *(Job(reads=name) for name in DATA_JOBS),
)


# --- one job ---


def run_job(job: Job, storage: str) -> dict[str, float]:
    """Run `job` in this process and return its figures."""
    with _storage(storage) as (config, bytes_at_rest):
        spilling = {"object_spilling_config": json.dumps(config)}
        with ray_with(spilling, object_store=STORE, num_cpus=4):
            if job.reads in DATA_JOBS:
                return _data_job(job)
            return _write_and_read(job, bytes_at_rest)


@contextlib.contextmanager
def _storage(name: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The spilling config, and a function that tells the bytes at rest."""
    if name == "valkey":
        with valkey_server() as urls:
            client = valkey.from_url(urls["tcp"])
            empty = used_memory(client)
            config = json.loads(ray_valkey_spill.spilling_config(url=urls["tcp"]))
            yield config, lambda: used_memory(client) - empty
            client.close()
        return
    directory = Path(tempfile.mkdtemp(prefix="rvs-"))
    try:
        params = (
            {"directory_path": str(directory)}
            if name == "filesystem"
            else {"uri": f"file://{directory}"}
        )
        yield {"type": name, "params": params}, lambda: _size_of(directory)
    finally:
        shutil.rmtree(directory)


def _size_of(directory: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in directory.rglob("*") if p.is_file())


def _write_and_read(job: Job, bytes_at_rest: Any) -> dict[str, float]:
    data = np.random.default_rng(0).random(job.object_size // 8)
    count = job.working_set * STORE // job.object_size
    warm = [ray.put(data) for _ in range(2 * STORE // job.object_size)]
    for ref in warm:
        ray.get(ref)
    del ref, warm
    _settle()
    at_start, cpu = _Counters.read(), _io_workers_cpu()

    start = time.perf_counter()
    refs = _write(data, count, job.writers)
    written = time.perf_counter()
    _settle()
    at_rest = bytes_at_rest()
    after_writes = _Counters.read()
    if job.cold_files:
        os.sync()
        _DROP_CACHES.write_text("3")

    reading = time.perf_counter()
    seconds = []
    for number in _order(job.reads, count):
        before = time.perf_counter()
        value = ray.get(refs[number])
        seconds.append(time.perf_counter() - before)
        assert value[0] == number
        assert value[-1] == data[-1]
        del value
    read = time.perf_counter()
    _settle()
    ray.get(refs[0])  # one more, which has the log written
    ray.get(refs[-1])
    after_reads = _Counters.read()

    restored = sorted(s for s in seconds if s > _RESTORED)
    return {
        "spill_mb_per_s": after_writes.spill_rate_since(at_start),
        "restore_mb_per_s": after_reads.restore_rate_since(at_start),
        "job_s": written - start + read - reading,
        "get_p50_ms": 1e3 * statistics.median(restored),
        "get_p99_ms": 1e3 * restored[int(0.99 * len(restored))],
        "io_workers_cpu_s": _io_workers_cpu() - cpu,
        "bytes_at_rest_mb": at_rest / 1e6,
    }


def _write(data: np.ndarray, count: int, writers: int) -> list[Any]:
    def put(numbers: range) -> list[Any]:
        refs = []
        for number in numbers:
            own = data.copy()
            own[0] = number
            refs.append(ray.put(own))
        return refs

    if writers == 1:
        return put(range(count))
    task = ray.remote(put)
    parts = [range(i * count // writers, (i + 1) * count // writers) for i in range(writers)]
    return list(itertools.chain.from_iterable(ray.get([task.remote(part) for part in parts])))


def _order(reads: str, count: int) -> list[int]:
    if reads == "random":
        return list(np.random.default_rng(1).permutation(count))
    return list(range(count)) * (2 if reads == "repeated" else 1)


def _data_job(job: Job) -> dict[str, float]:
    """Shuffle or sort rows of 1 MiB, then read all of them."""
    import ray.data

    # Not of this module, which Ray's workers do not have.
    def with_payload(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        payload = np.random.default_rng(0).random((len(batch["id"]), MIB // 8))
        payload[:, 0] = batch["id"]
        return {"id": batch["id"], "payload": payload}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # By default one task of a sort takes more than all that the object store holds here.
    context.shuffle_input_batch_bytes = STORE // 8
    rows = job.working_set * STORE // MIB
    start = time.perf_counter()
    made = ray.data.range(rows, override_num_blocks=32).map_batches(with_payload)
    if job.reads == "shuffle":
        result = made.random_shuffle(seed=0).materialize()
    else:
        result = made.sort("id", descending=True).materialize()
    read = [
        (int(id_), float(payload[0]))
        for batch in result.iter_batches(batch_size=16)
        for id_, payload in zip(batch["id"], batch["payload"])
    ]
    seconds = time.perf_counter() - start
    expected = [(number, float(number)) for number in reversed(range(rows))]
    assert (read if job.reads == "sort" else sorted(read, reverse=True)) == expected
    _settle()
    counters = _Counters.read()
    return {
        "spill_mb_per_s": counters.spill_rate_since(_Counters()),
        "restore_mb_per_s": counters.restore_rate_since(_Counters()),
        "job_s": seconds,
        "io_workers_cpu_s": _io_workers_cpu(),
    }


# --- what Ray and the system tell ---


@dataclass(frozen=True)
class _Counters:
    """The raylet's totals: MiB, and the seconds it took."""

    spilled: int = 0
    spill_s: float = 0
    restored: int = 0
    restore_s: float = 0

    @classmethod
    def read(cls) -> _Counters:
        session = ray._private.worker._global_node.get_session_dir_path()
        log = Path(session, "logs", "raylet.out").read_text(errors="replace")
        values: list[float] = []
        for pattern in (
            r"Spilled (\d+) MiB, \d+ objects, write throughput (\d+)",
            r"Restored (\d+) MiB, \d+ objects, read throughput (\d+)",
        ):
            size, rate = ([("0", "1"), *re.findall(pattern, log)])[-1]
            values += [int(size), int(size) / max(1, int(rate))]
        return cls(int(values[0]), values[1], int(values[2]), values[3])

    def spill_rate_since(self, before: _Counters) -> float:
        return _rate(self.spilled - before.spilled, self.spill_s - before.spill_s)

    def restore_rate_since(self, before: _Counters) -> float:
        return _rate(self.restored - before.restored, self.restore_s - before.restore_s)


def _rate(mebibytes: int, seconds: float) -> float:
    return mebibytes * MIB / 1e6 / seconds if seconds > 0 else 0.0


def _settle() -> None:
    """Let what goes on by itself end; the raylet logs each kind of thing once a second at most."""
    time.sleep(1.2)
    while any("IDLE" not in _title(process) for process in _io_workers()):
        time.sleep(0.1)


def _io_workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [p for p in children if re.search("(Spill|Restore)Worker", _title(p))]


def _io_workers_cpu() -> float:
    times = [process.cpu_times() for process in _io_workers()]
    return float(sum(t.user + t.system for t in times))


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


# --- all jobs ---


def measure(quick: bool) -> dict[str, Any]:
    cold = os.access(_DROP_CACHES, os.W_OK)
    results: dict[str, Any] = {}
    for job in QUICK if quick else JOBS:
        if job.cold_files and not cold:
            note(f"left out, because the page cache cannot be dropped: {job}")
            continue
        samples: dict[str, list[dict[str, float]]] = {storage: [] for storage in STORAGES}
        rounds = 1 if quick else ROUNDS
        for number in range(rounds):
            for storage in STORAGES:
                note(f"{job}: {storage}, round {number + 1} of {rounds}")
                samples[storage].append(_in_a_process(job, storage))
        results[str(job)] = {
            "rounds": rounds,
            "job": asdict(job),
            "storages": {
                storage: {
                    name: {
                        "median": statistics.median(s[name] for s in found),
                        "min": min(s[name] for s in found),
                        "max": max(s[name] for s in found),
                    }
                    for name in found[0]
                }
                for storage, found in samples.items()
            },
        }
    return {"jobs": results}


def _in_a_process(job: Job, storage: str) -> dict[str, float]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(run_job, job, storage).result()


FIGURES = {
    "spill_mb_per_s": "spill MB/s",
    "restore_mb_per_s": "restore MB/s",
    "job_s": "job s",
    "get_p50_ms": "get p50 ms",
    "get_p99_ms": "get p99 ms",
    "io_workers_cpu_s": "IO workers' CPU s",
    "bytes_at_rest_mb": "at rest MB",
}


def tables(results: dict[str, Any]) -> str:
    rows = [["job", "rounds", "storage", *FIGURES.values(), "spill, restore of filesystem's"]]
    for name, found in results["jobs"].items():
        files = found["storages"]["filesystem"]
        for storage, figures in found["storages"].items():
            medians = {key: found["median"] for key, found in figures.items()}
            cells = [f"{medians[key]:,.1f}" if key in medians else "" for key in FIGURES]
            ratios = [
                f"{medians[key] / max(1, files[key]['median']):.2f}"
                for key in ("spill_mb_per_s", "restore_mb_per_s")
            ]
            rows.append([name, str(found["rounds"]), storage, *cells, ", ".join(ratios)])
    return table(rows)


def pictures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw throughput and wall time by job and storage."""
    paths = []
    for key, unit in (("spill_mb_per_s", "MB/s"), ("restore_mb_per_s", "MB/s"), ("job_s", "s")):
        path = directory / f"memory-pressure-{key.partition('_')[0]}.png"
        groups = {
            name: {s: figures[key]["median"] for s, figures in found["storages"].items()}
            for name, found in results["jobs"].items()
        }
        bars(path, FIGURES[key], unit, groups)
        paths.append(path)
    return paths


if __name__ == "__main__":
    main("Ray under memory pressure, by storage", measure, tables)
