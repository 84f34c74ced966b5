"""The object store against the raw limit of the wire, and against plain clients.

The raw limit is a scatter-gather loop of the same chunks over one connection to the same server: it
sends `memoryview`s many SETs ahead, receives GETs in place, and does nothing else: no checksum, no
header, no index, no check of replies. Beside that, it is measured how long it takes to find a large
object, which is what a restore waits for before any data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import pyarrow as pa
import valkey
from support.samples import object_id, source
from valkey._parsers import _LibvalkeyParser, _RESP2Parser

from benchmarks.common import (
    KIB,
    MIB,
    Contender,
    Sample,
    bars,
    interleave,
    main,
    note,
    peak_memory,
    same,
    table,
    used_memory,
    valkey_server,
)
from benchmarks.raw_loop import RawLoop
from ray_valkey_spill.config import Config
from ray_valkey_spill.store.object_store import ObjectStore, StoredObject

CHUNK = MIB - 128
# Bytes that a contender moves in one turn, at least.
_IN_A_TURN = 8 * MIB
# Bytes of the object of which it is measured how long it takes to find it.
FOUND = 25_000_000


class Bench:
    """Contenders that spill and restore the same objects on the same server."""

    def __init__(self, url: str, objects: list[memoryview]) -> None:
        self.url = url
        self.objects = objects
        self.size = sum(map(len, objects))
        self.targets = [memoryview(bytearray(len(data))) for data in objects]
        self.client = valkey.from_url(url)
        self.raw = RawLoop(self._socket())
        self.pieces = [d[i : i + CHUNK] for d in objects for i in range(0, len(d), CHUNK)]
        self.places = [t[i : i + CHUNK] for t in self.targets for i in range(0, len(t), CHUNK)]
        self.keys = [b"ray:raw:%d" % i for i in range(len(self.pieces))]
        self._closing = contextlib.ExitStack()
        self._closing.callback(self.client.close)
        self.spill: dict[str, Contender] = {}
        self.restore: dict[str, Contender] = {}
        self._add(
            "raw limit",
            self.keys,
            lambda: self.raw.store(self.pieces, self.keys),
            lambda: self.raw.fetch(self.places, self.keys),
        )

    def _socket(self) -> socket.socket:
        connection = self.client.connection_pool.make_connection()
        connection.connect()
        self._connection = connection  # which would close the socket with itself
        return connection._sock

    def _add(
        self,
        name: str,
        keys: list[bytes],
        store: Callable[[], object],
        fetch: Callable[[], object],
    ) -> None:
        # Everybody writes new keys: what a server does to free an old value is nobody's spill.
        self.spill[name] = Contender(store, prepare=lambda: self.client.unlink(*keys))
        self.restore[name] = Contender(fetch)

    # --- plain clients ---

    def add_valkey_py(self, name: str, parser: type) -> None:
        plain = valkey.from_url(self.url, parser_class=parser)
        self._add_plain(name, plain.set, plain.get)

    def add_glide(self) -> None:
        from glide_sync import GlideClient, GlideClientConfiguration, NodeAddress

        options = self.client.connection_pool.connection_kwargs
        address = NodeAddress(options["host"], options["port"])
        plain = GlideClient.create(GlideClientConfiguration([address], request_timeout=60_000))
        self._closing.callback(plain.close)
        self._add_plain("valkey-glide-sync", plain.set, plain.get)

    def _add_plain(
        self, name: str, write: Callable[[bytes, bytes], object], read: Callable[[bytes], Any]
    ) -> None:
        keys = [f"ray:{name}:{i}".encode() for i in range(len(self.pieces))]

        def store() -> None:
            for key, piece in zip(keys, self.pieces):
                write(key, bytes(piece))

        def fetch() -> None:
            for key, place in zip(keys, self.places):
                place[:] = read(key)

        self._add(name, keys, store, fetch)

    # --- LZ4 in the same thread as the connection ---

    def add_one_lz4_thread(self) -> None:
        keys = [b"ray:lz4:%d" % i for i in range(len(self.pieces))]
        sizes: list[int] = []

        def store() -> None:
            packed = [lz4.block.compress(piece, store_size=False) for piece in self.pieces]
            sizes[:] = map(len, packed)
            self.raw.store([memoryview(data) for data in packed], keys)

        def fetch() -> None:
            packed = [memoryview(bytearray(size)) for size in sizes]
            self.raw.fetch(packed, keys)
            for data, place in zip(packed, self.places):
                place[:] = lz4.block.decompress(data, uncompressed_size=len(place))

        self._add("one lz4 thread", keys, store, fetch)

    # --- this package ---

    def add_store(self, label: str, **params: Any) -> None:
        store = ObjectStore(Config.load({"url": self.url, **params}, {}), "benchmark", label[:4])
        sources = [source(data, i) for i, data in enumerate(self.objects)]
        urls: list[str] = []

        def delete() -> None:
            store.delete(urls)

        def put() -> None:
            stored, failure = store.put(sources)
            assert failure is None
            urls[:] = stored

        def get() -> None:
            wanted = [(url, object_id(i)) for i, url in enumerate(urls)]
            for found, target in zip(store.find_all(wanted), self.targets):
                assert isinstance(found, StoredObject)
                store.fill(found, target)

        self.spill[label] = Contender(put, prepare=delete)
        self.restore[label] = Contender(get)

    def run(self, rounds: int, results: Results) -> None:
        """Run all contenders, and add what was measured to `results`."""
        results.size = self.size
        in_a_row = max(1, _IN_A_TURN // self.size)
        for name, sample in interleave(self.spill, rounds, in_a_row=in_a_row).items():
            results.spill[name].extend(sample)
            self.spill[name].prepare()
            before = used_memory(self.client)
            results.spill_peak[name].append(peak_memory(self.spill[name].run))
            results.server_bytes[name].append(used_memory(self.client) - before)
        for name, sample in interleave(self.restore, rounds, in_a_row=in_a_row).items():
            results.restore[name].extend(sample)
            for target in self.targets:
                target[:] = bytes(len(target))
            results.restore_peak[name].append(peak_memory(self.restore[name].run))
            assert all(map(same, self.targets, self.objects)), name
        self._closing.close()


@dataclass
class Results:
    """What was measured in one case, by contender."""

    size: int = 0
    spill: dict[str, Sample] = field(default_factory=lambda: defaultdict(Sample))
    restore: dict[str, Sample] = field(default_factory=lambda: defaultdict(Sample))
    spill_peak: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    restore_peak: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    server_bytes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"bytes": self.size, "spill": {}, "restore": {}}
        for name in self.spill:
            found["spill"][name] = self.spill[name].figures(self.size)
            found["spill"][name]["peak_bytes"] = statistics.median(self.spill_peak[name])
            found["spill"][name]["server_bytes"] = statistics.median(self.server_bytes[name])
            found["restore"][name] = self.restore[name].figures(self.size)
            found["restore"][name]["peak_bytes"] = statistics.median(self.restore_peak[name])
        return found


# --- data ---


def floats(size: int) -> memoryview:
    return memoryview(np.random.default_rng(0).random(size // 8)).cast("B")


def columns(size: int) -> memoryview:
    return memoryview(np.random.default_rng(0).integers(0, 100, size // 8)).cast("B")


def text(size: int) -> memoryview:
    words = pa.array([f"{word} of {word * word}," for word in range(1000)])
    picks = pa.array(np.random.default_rng(0).integers(0, 1000, size // 8))
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"text": words.take(picks)})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue()).cast("B")[:size]


def zeros(size: int) -> memoryview:
    return memoryview(np.zeros(size, np.uint8)).cast("B")


KINDS = {"random floats": floats, "integer columns": columns, "text table": text, "zeros": zeros}


# --- the cases ---


def measure(quick: bool) -> dict[str, Any]:
    """Run all cases on one fresh server after the other.

    How a server's allocator comes by the memory for a chunk is decided early in its life, and makes
    a difference of up to a half for all that come after.
    """
    starts, rounds = (1, 1) if quick else (6, 4)
    results: dict[str, Results] = defaultdict(Results)
    for transport in ("tcp",) if quick else ("tcp", "unix"):
        for kind, size in _cases(quick):
            case = f"{transport}, {_size(size)}, {kind}"
            data = [KINDS[kind](size)]
            for start in range(starts if size < 512 * MIB else 2):
                note(f"{case}: server {start + 1}")
                with valkey_server() as urls:
                    bench = Bench(urls[transport], data)
                    bench.add_store("auto")
                    if kind == "random floats":
                        bench.add_store("none", compression="none")
                        bench.add_valkey_py("valkey-py", _RESP2Parser)
                        if importlib.util.find_spec("libvalkey"):
                            bench.add_valkey_py("valkey-py, libvalkey", _LibvalkeyParser)
                        if transport == "tcp" and importlib.util.find_spec("glide_sync"):
                            bench.add_glide()
                    else:
                        bench.add_one_lz4_thread()
                    bench.run(rounds if size < 512 * MIB else 2, results[case])
        case = f"{transport}, 1,000 x 128 KiB, random floats"
        whole = floats(1000 * 128 * KIB)
        data = [whole[i : i + 128 * KIB] for i in range(0, len(whole), 128 * KIB)]
        for start in range(starts):
            note(f"{case}: server {start + 1}")
            with valkey_server() as urls:
                bench = Bench(urls[transport], data)
                bench.add_store("auto")
                bench.add_store("none", compression="none")
                bench.run(rounds, results[case])
    note("find")
    finds = [seconds for _ in range(starts) for seconds in _finds(times=20)]
    return {
        "cases": {case: found.figures() for case, found in results.items()},
        "found_ms": 1e3 * statistics.median(finds),
    }


def _finds(times: int) -> Iterator[float]:
    """Yield the seconds that finding a large object takes, without receiving its data."""
    data = floats(FOUND)
    target = memoryview(bytearray(FOUND))
    with valkey_server() as urls:
        config = Config.load({"url": urls["tcp"]}, {})
        with contextlib.closing(ObjectStore(config, "benchmark", "find")) as store:
            (url,), failure = store.put([source(data)])
            assert failure is None
            for number in range(1 + times):  # the first opens the connection, and is not counted
                start = time.perf_counter()
                found = store.find(url, object_id(0))
                seconds = time.perf_counter() - start
                store.fill(found, target)
                if number:
                    yield seconds


def _cases(quick: bool) -> Iterator[tuple[str, int]]:
    sizes = [4 * MIB, 16 * MIB] if quick else [128 * KIB, MIB, 16 * MIB, 64 * MIB, 512 * MIB]
    for kind in KINDS:
        for size in sizes if kind == "random floats" else [16 * MIB if quick else 64 * MIB]:
            yield kind, size


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def tables(results: dict[str, Any]) -> str:
    rows = [["case", "contender", "spill GB/s", "(min to max)", "of raw", "CPU s/GB",
             "restore GB/s", "(min to max)", "of raw", "CPU s/GB",
             "server memory / data", "peak MiB, spill", "restore"]]  # fmt: skip
    for case, found in results["cases"].items():
        for name, spill in found["spill"].items():
            cells = []
            for way in ("spill", "restore"):
                figures, raw = found[way][name], found[way]["raw limit"]
                cells += [
                    f"{figures['gb_per_s']:.2f}",
                    f"{figures['gb_per_s_min']:.2f} to {figures['gb_per_s_max']:.2f}",
                    f"{figures['gb_per_s'] / raw['gb_per_s']:.2f}",
                    f"{figures['cpu_s_per_gb']:.2f}",
                ]
            stored = f"{spill['server_bytes'] / found['bytes']:.3f}"
            peaks = [f"{found[way][name]['peak_bytes'] / MIB:.1f}" for way in ("spill", "restore")]
            rows.append([case, name, *cells, stored, *peaks])
    parts = [table(rows)]
    if "found_ms" in results:
        size = f"{FOUND / 1e6:g} MB"
        parts.append(f"To find an object of {size} takes {results['found_ms']:.2f} ms.")
    return "\n\n".join(parts)


def pictures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw throughput by case and contender."""
    paths = []
    for way in ("spill", "restore"):
        path = directory / f"wire-{way}.png"
        cases = {
            case: {name: figures["gb_per_s"] for name, figures in found[way].items()}
            for case, found in results["cases"].items()
            if case.startswith("tcp")
        }
        bars(path, f"{way}, one connection over loopback TCP", "GB/s of object", cases)
        paths.append(path)
    return paths


if __name__ == "__main__":
    main("Spill and restore over the wire, against its limit", measure, tables)
