"""What an operation costs far from the server: round trips that it waits for, and throughput.

The round trips are counted through a proxy that delays each direction by a fixed time: the elapsed
time divided by that of a PING through the same proxy. What the data take themselves over loopback
is in it. The first operation of a process opens its connections. TCP does not see the delay, so a
store that asks TCP for the distance takes the wire for a short one: objects of many chunks may wait
for more round trips than they would at the same distance over a network.

The throughput is that through a link between two network namespaces, with a limited rate and real
TCP, where the machine has them; beside that of a raw loop which moves the same chunks over the same
link and does nothing else, with up to as many bytes under way as the store may have.
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import valkey
from support.servers import answers, free_port, server_binary, valkey_server, wait_until
from support.topologies import cluster_servers

from benchmarks import delay_line
from benchmarks.checkouts import (
    HERE,
    Checkout,
    contenders,
    heads,
    in_turn,
    main,
    side_by_side,
)
from benchmarks.common import KIB, MIB, note, table
from benchmarks.serving import Process

# Seconds, of each direction.
DELAY = 0.01
OPERATIONS = ("spill", "restore", "delete")


# --- round trips ---


@dataclass(frozen=True)
class Batch:
    """Objects that are spilled and deleted together; the first of them is restored."""

    size: int
    count: int = 1

    def __str__(self) -> str:
        size = f"{self.size // MIB} MiB" if self.size >= MIB else f"{self.size // KIB} KiB"
        return size if self.count == 1 else f"{self.count} x {size}"


_SMALL = [Batch(128 * KIB), Batch(900 * KIB), Batch(MIB)]
_MANY = [Batch(128 * KIB, 16), Batch(900 * KIB, 16), Batch(MIB, 16)]
_LARGE = [Batch(25 * MIB), Batch(64 * MIB)]
_BATCHES = {
    "no limit": [*_SMALL[:2], _MANY[1], _LARGE[0]],
    "max_bytes": [*_SMALL[:2], _MANY[1], _LARGE[0]],
    "maxmemory": [*_SMALL, *_MANY, *_LARGE, Batch(25 * MIB, 2)],
    "maxmemory, sealed": [*_SMALL[:2], _LARGE[0]],
    "cluster of 3, maxmemory": [*_SMALL[:2], _MANY[1], _LARGE[0]],
}
_QUICK = {kind: [Batch(128 * KIB), Batch(900 * KIB)] for kind in _BATCHES} | {
    "maxmemory": [*_SMALL[:2], _MANY[1]]
}


@contextlib.contextmanager
def _servers(directory: Path) -> Iterator[dict[str, tuple[dict[str, Any], list[int]]]]:
    """The parameters of each kind but its port, and the ports of its server or servers."""
    key_file = directory / "spill.key"
    key_file.write_text(secrets.token_hex(32))
    bounded = {"maxmemory": "4gb"}
    with (
        valkey_server() as plain,
        valkey_server(**bounded) as full,
        cluster_servers(directory / "cluster", replicas=0, **bounded) as cluster,
    ):
        yield {
            "no limit": ({}, [plain.port]),
            "max_bytes": ({"max_bytes": 4 << 30}, [plain.port]),
            "maxmemory": ({}, [full.port]),
            "maxmemory, sealed": ({"encryption_key_file": str(key_file)}, [full.port]),
            "cluster of 3, maxmemory": ({}, [node.port for node in cluster.nodes]),
        }


def round_trips(compared: Sequence[Checkout], quick: bool) -> dict[str, Any]:
    """Those of each operation, by the kind of server, the batch and the contender."""
    found: dict[str, Any] = {}
    batches = _QUICK if quick else _BATCHES
    with (
        tempfile.TemporaryDirectory(prefix="rvs-") as directory,
        _servers(Path(directory)) as servers,
        contenders(compared, "distance") as processes,
    ):
        for kind, (params, ports) in servers.items():
            with delay_line.proxy(ports, DELAY) as far_ports:
                _announce(ports, far_ports)
                url = f"valkey://127.0.0.1:{far_ports[0]}/0"
                round_trip = _round_trip(url)
                found[kind] = {"round_trip": round_trip, "batches": {}}
                for batch in batches[kind]:
                    note(f"round trips: {kind}, {batch}")
                    rounds = 2 if quick or batch.size * batch.count > 16 * MIB else 5
                    found[kind]["batches"][str(batch)] = _operations(
                        processes, {"url": url, **params}, batch, round_trip, rounds
                    )
    return found


def _announce(ports: list[int], far_ports: list[int]) -> None:
    """Have a cluster's nodes tell clients of the ports that are far away."""
    if len(ports) == 1:
        return
    clients = [valkey.Valkey(port=port) for port in ports]
    for client, far_port in zip(clients, far_ports):
        client.config_set("cluster-announce-port", far_port)
    for client in clients:
        wait_until(partial(_tells_of, client, far_ports))
        client.close()


def _tells_of(client: valkey.Valkey, ports: list[int]) -> bool:
    return {node[2][1] for node in client.execute_command("CLUSTER SLOTS")} == {*ports}


def _round_trip(url: str) -> float:
    with valkey.from_url(url) as client:
        client.ping()
        return statistics.median(_seconds(client.ping) for _ in range(5))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _operations(
    processes: Mapping[str, Process],
    params: dict[str, Any],
    batch: Batch,
    round_trip: float,
    rounds: int,
) -> dict[str, Any]:
    """Round trips of the first operations of a process, and of those that follow."""

    def once(process: Process) -> dict[str, float]:
        return {name: process.ask(name) / round_trip for name in OPERATIONS}

    first = {}
    for name, process in processes.items():
        process.ask(
            "open",
            params={**params, "namespace": name},
            size=batch.size,
            count=batch.count,
        )
        first[name] = once(process)
    steady = in_turn(
        {name: partial(once, process) for name, process in processes.items()}, rounds, warm_up=0
    )
    for process in processes.values():
        process.ask("close")
    return {"first": first, "steady": steady}


# --- throughput ---

SIZE = 64 * MIB
CHUNK = 512 * KIB - 128  # the store's
_WINDOWS = (2, 4, 8, 16)  # chunks under way of the raw loop: 1 MiB to the most that the store has
_RATES = (10e9, 5e9, 2.5e9, 1e9)
_WANTED, _ROUND_TRIP = _RATES[0], 0.001
# Seconds before each operation, of which TCP makes use to start slowly again; and rounds.
_PAUSES = (("steady", 0.0, 4), ("after a second's pause", 1.0, 2))


def throughput(compared: Sequence[Checkout], quick: bool) -> dict[str, Any]:
    """Gbit/s of spills and restores, of the raw loop and of each contender; or why there are none.

    At the highest rate that the raw loop fills on this machine. If that is not the one wanted, once
    more at a distance at which as many bytes are on their way as there.
    """
    try:
        with delay_line.link(_ROUND_TRIP / 2) as link:
            link.limit(_WANTED)
    except (OSError, subprocess.CalledProcessError) as error:
        return {"unavailable": f"{type(error).__name__}: {error}", "cases": []}
    rate = _rate(_RATES[2:] if quick else _RATES)
    distances = [_ROUND_TRIP]
    if rate < _WANTED and not quick:
        distances.append(_ROUND_TRIP * _WANTED / rate)
    cases = [_throughput(compared, rate, distance, quick) for distance in distances]
    return {"unavailable": None, "wanted": _WANTED, "rate": rate, "cases": cases}


@contextlib.contextmanager
def _far_server(round_trip: float) -> Iterator[tuple[delay_line.Link, str, int]]:
    """A link, and the address of a server at its far end."""
    with (
        tempfile.TemporaryDirectory(prefix="rvs-") as directory,
        delay_line.link(round_trip / 2) as link,
    ):
        _, there = link.commands
        host, port, path = delay_line.ADDRESSES[1], free_port(), f"{directory}/s"
        server = subprocess.Popen(
            [
                *(*there, server_binary(), "--bind", host, "--port", str(port)),
                # Nobody else is in its namespace. The socket is for this process, which is not.
                *("--protected-mode", "no", "--unixsocket", path, "--save", ""),
            ],
            stdout=subprocess.DEVNULL,
            cwd=directory,
        )
        try:
            with valkey.Valkey(unix_socket_path=path) as client:
                wait_until(lambda: answers(client))
            yield link, host, port
        finally:
            server.terminate()
            server.wait()


def _raw_loop(link: delay_line.Link, host: str, port: int) -> Process:
    here, _ = link.commands
    command = [*here, sys.executable, "-m", "benchmarks.raw_loop", host, str(port)]
    return Process(command, {"PYTHONPATH": str(HERE.parent)})


def _rate(rates: Sequence[float]) -> float:
    """The highest of `rates` that the raw loop fills to nine tenths here, in bits per second."""
    with _far_server(_ROUND_TRIP) as (link, host, port), _raw_loop(link, host, port) as raw:
        raw.ask("open", size=SIZE, chunk=CHUNK)
        for rate in rates:
            note(f"throughput: does the raw loop fill {rate / 1e9:g} Gbit/s?")
            link.limit(rate)
            figures = in_turn({"raw": partial(_raw, raw, _WINDOWS[-1])}, 3)["raw"]
            if min(figures.values()) >= 0.9 * rate:
                return rate
    return rates[-1]


def _throughput(
    compared: Sequence[Checkout], rate: float, round_trip: float, quick: bool
) -> dict[str, Any]:
    with (
        _far_server(round_trip) as (link, host, port),
        _raw_loop(link, host, port) as raw,
        contenders(compared, "distance", link.commands[0]) as processes,
    ):
        link.limit(rate)
        raw.ask("open", size=SIZE, chunk=CHUNK)
        url = f"valkey://{host}:{port}/0"
        for name, process in processes.items():
            params = {"url": url, "namespace": name}
            process.ask("open", params=params, size=SIZE, count=1)
        found: dict[str, Any] = {"rate": rate, "round_trip": round_trip}
        for case, idle, rounds in _PAUSES[:1] if quick else _PAUSES:
            note(f"throughput: {rate / 1e9:g} Gbit/s, {round_trip * 1e3:g} ms, {case}")
            windows = _WINDOWS[-2:] if idle else _WINDOWS
            actions: dict[str, Callable[[], dict[str, float]]] = {
                f"raw, {window} chunks": partial(_raw, raw, window, idle) for window in windows
            }
            for name, process in processes.items():
                actions[name] = partial(_moved, process, idle)
            found[case] = in_turn(actions, 1 if quick else rounds)
    return found


def _raw(raw: Process, window: int, idle: float = 0.0) -> dict[str, float]:
    figures = {}
    for way, name in (("spill", "store"), ("restore", "fetch")):
        time.sleep(idle)
        figures[way] = SIZE * 8 / raw.ask(name, window=window)
    raw.ask("delete")
    return figures


def _moved(process: Process, idle: float = 0.0) -> dict[str, float]:
    figures = {}
    for way in ("spill", "restore"):
        time.sleep(idle)
        figures[way] = SIZE * 8 / process.ask(way)
    process.ask("delete")
    return figures


# --- all ---


def measure(quick: bool, compared: Sequence[Checkout]) -> dict[str, Any]:
    return {
        "contenders": [checkout.name for checkout in compared],
        "round_trips": round_trips(compared, quick),
        "throughput": throughput(compared, quick),
    }


def tables(results: dict[str, Any]) -> str:
    return "\n\n".join(_tables(results))


def _tables(results: dict[str, Any]) -> Iterator[str]:
    names = results["contenders"]
    for when, title in (("steady", "in the steady state"), ("first", "first of a process")):
        rows = [["server", "objects"]]
        for way in OPERATIONS:
            rows[0] += heads(names, way)
        for kind, found in results["round_trips"].items():
            for batch, figures in found["batches"].items():
                row = [kind, batch]
                for way in OPERATIONS:
                    row += side_by_side({name: figures[when][name][way] for name in names})
                rows.append(row)
        trips = [found["round_trip"] for found in results["round_trips"].values()]
        yield (
            f"**Round trips** of {min(trips) * 1e3:.1f} to {max(trips) * 1e3:.1f} ms that an "
            f"operation waits for, {title}. Spills and deletions are of all objects in one batch, "
            f"and the restore is of one.\n\n{table(rows)}"
        )
    through = results["throughput"]
    if through["unavailable"]:
        yield f"**Throughput** was not measured. This machine cannot: {through['unavailable']}"
        return
    if through["rate"] < through["wanted"]:
        yield (
            f"**Throughput**: this machine cannot fill {through['wanted'] / 1e9:g} Gbit/s between "
            f"two namespaces; {through['rate'] / 1e9:g} Gbit/s is the highest rate that the raw "
            "loop fills. At the longer round trip as many bytes are on their way as at the rate "
            "and the distance that were wanted."
        )
    for case in through["cases"]:
        yield _throughput_table(case, names)


def _throughput_table(case: dict[str, Any], names: Sequence[str]) -> str:
    rows = [["64 MiB", "", "spill Gbit/s", "of raw", "restore Gbit/s", "of raw"]]
    for when in (when for when, *_ in _PAUSES if when in case):
        best = {
            way: max(figures[way] for name, figures in case[when].items() if name not in names)
            for way in ("spill", "restore")
        }
        for name, figures in case[when].items():
            row = [when, name]
            for way, limit in best.items():
                row += [f"{figures[way] / 1e9:.2f}", f"{figures[way] / limit:.2f}"]
            rows.append(row)
    rate, distance = case["rate"] / 1e9, case["round_trip"] * 1e3
    return (
        f"**Throughput** at {rate:g} Gbit/s and a round trip of {distance:g} ms, of the best raw "
        f"loop.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main("What an operation costs far from the server", measure, tables)
