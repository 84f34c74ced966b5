"""What a fleet costs: each operation beside many other nodes, and what idle nodes cause together.

The nodes are simulated by one process, with the package's own code: each has a lease, objects, and
what an IO worker at work has in the metadata, left by one that was killed in the middle of a spill.
What is measured is done by the first of them, and what an idle node does by the last one too. Each
contender has a server of its own.

The server's time is what its main thread computes: nobody else is served meanwhile. Commands are
those of `INFO commandstats`, which has those of scripts too. What the look at these figures costs
itself is measured, and taken off.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import valkey
from support.servers import Server, valkey_server

from benchmarks.checkouts import Checkout, contenders, heads, in_turn, main, side_by_side
from benchmarks.common import KIB, MIB, note, table, used_memory
from benchmarks.serving import Process

PERIOD = 10.0  # seconds between two rounds of a node's background work
# Rounds that are measured: ten minutes, so that slices of objects to reclaim, the pauses between
# passes, and what is done every few minutes all have their share. In those before, a node reads the
# headers of its objects, once and for all.
_ROUNDS, _FIRST_ROUNDS = 60, 10
OBJECTS_PER_NODE = 8
# On paper: how many nodes, and what there is of each resource.
PAPER = 10_000
CORE, NETWORK, CLIENTS, HELD = 1.0, 10e9 / 8, 10_000, 0.001

# More than there is: what all nodes together may have under way has to be within it.
_MAXMEMORY = 64 << 30
_GC_PATIENCE = 100.0  # seconds, more than a lease lasts
_SIZES = {"4 KiB": 4 * KIB, "900 KiB": 900 * KIB}
_OPERATIONS = ("spill", "restore", "delete")


# --- what a server tells ---


@dataclass(frozen=True)
class Counters:
    """What a server has done so far: seconds of its main thread, commands, bytes both ways."""

    cpu: float
    commands: float
    bytes: float
    spent: dict[str, tuple[float, float]]  # by command: how many, and their seconds

    @classmethod
    def of(cls, client: valkey.Valkey) -> Counters:
        info = client.info("everything")
        spent = {
            name.removeprefix("cmdstat_"): (float(each["calls"]), each["usec"] / 1e6)
            for name, each in info.items()
            if name.startswith("cmdstat_")
        }
        return cls(
            info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"],
            sum(calls for calls, _ in spent.values()),
            info["total_net_input_bytes"] + info["total_net_output_bytes"],
            spent,
        )

    def since(self, before: Counters) -> dict[str, float]:
        """Differences; `held` is how long a command of the slowest kind took, on average.

        INFO is left out of that: the looks are INFOs too.
        """
        of_each = [
            (seconds - before.spent.get(name, (0, 0))[1]) / calls_now
            for name, (calls, seconds) in self.spent.items()
            if (calls_now := calls - before.spent.get(name, (0, 0))[0]) > 0 and name != "info"
        ]
        return {
            "cpu": self.cpu - before.cpu,
            "commands": self.commands - before.commands,
            "bytes": self.bytes - before.bytes,
            "held": max(of_each, default=0.0),
        }


def counted(client: valkey.Valkey, run: Callable[[], object], times: int) -> dict[str, float]:
    """What the server does for `run`, of which `run` does `times`."""
    looks = [Counters.of(client) for _ in range(6)]
    costs = [after.since(before) for before, after in itertools.pairwise(looks)]
    before = Counters.of(client)
    run()
    found = Counters.of(client).since(before)
    return {
        key: value
        if key == "held"
        else (value - statistics.median(cost[key] for cost in costs)) / times
        for key, value in found.items()
    }


# --- contenders ---


@dataclass(frozen=True)
class Contender:
    """A contender's process, and its server."""

    checkout: Checkout
    process: Process
    server: Server

    @property
    def params(self) -> dict[str, Any]:
        return {"url": self.server.url, "max_bytes": _MAXMEMORY // 2}

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the command line of this checkout."""
        given = [f"--{name.replace('_', '-')}={value}" for name, value in self.params.items()]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "ray_valkey_spill", *arguments, *given],
            env={**os.environ, **self.checkout.environment()},
            stdout=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def _started(compared: Sequence[Checkout]) -> Iterator[dict[str, Contender]]:
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(contenders(compared, "fleet"))
        yield {
            each.name: Contender(
                each,
                processes[each.name],
                stack.enter_context(valkey_server(maxmemory=_MAXMEMORY)),
            )
            for each in compared
        }


def _populate(
    all_: Mapping[str, Contender], first: int, last: int, objects: int, busy: bool
) -> None:
    """Make nodes, for all contenders at the same time."""
    for each in all_.values():
        each.process.send(
            "populate", params=each.params, first=first, last=last, objects=objects, busy=busy
        )
    for each in all_.values():
        each.process.receive()


# --- beside other nodes ---


def beside(all_: Mapping[str, Contender], quick: bool) -> dict[str, Any]:
    """Costs beside more and more nodes, by their number and the contender."""
    found: dict[str, Any] = {}
    first = 0
    for nodes in (1, 10, 100) if quick else (1, 10, 100, 1000):
        note(f"beside {nodes:,} nodes")
        _populate(all_, first, nodes, OBJECTS_PER_NODE, busy=True)
        first = nodes
        rounds, times = (1, 10) if quick else (3, 30)
        node = in_turn({name: partial(_idle, each, nodes) for name, each in all_.items()}, rounds)
        operations = {
            size: in_turn(
                {
                    name: partial(_operations, each, _SIZES[size], times)
                    for name, each in all_.items()
                },
                rounds,
            )
            for size in _SIZES
        }
        found[str(nodes)] = {
            name: {
                **node[name],
                "operations": {size: of_each[name] for size, of_each in operations.items()},
            }
            for name in all_
        }
    return found


def _operations(each: Contender, size: int, times: int) -> dict[str, float]:
    """What the server does for each operation on one object, in the steady state."""
    each.process.ask("open", params=each.params, size=size, count=1)
    for operation in _OPERATIONS:  # opens the connections
        each.process.ask(operation)
    found = {}
    for operation in _OPERATIONS:
        run = partial(_repeat, each.process, operation, times)
        figures = counted(each.server.client, run, times)
        found |= {f"{operation}: {key}": value for key, value in figures.items()}
    each.process.ask("close")
    return found


def _repeat(process: Process, operation: str, times: int) -> None:
    process.ask("repeat", operation=operation, times=times)


def _idle(each: Contender, nodes: int) -> dict[str, Any]:
    """A round of the background work of any node, and of the first one; see `together`.

    The first node of a session also looks after the objects of dead nodes. All others only check
    whether that is up to them.
    """
    first = _node(each, 0, nodes)
    return {**_node(each, nodes - 1, nodes), **_of_first(first)} if nodes > 1 else first


def _of_first(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"first: {key}": value for key, value in figures.items()}


def _node(each: Contender, number: int, nodes: int) -> dict[str, float]:
    """A node with eight IO workers: its connections, and a round of its background work.

    `asked` is for how many objects their owners are asked in a round.
    """
    client = each.server.client
    each.process.ask("renew_leases", params=each.params, first=0, last=nodes)
    by = each.process.ask("open_node", params=each.params, number=number, nodes=nodes)
    asked = 0

    def run(rounds: int) -> None:
        nonlocal asked
        asked = each.process.ask("background", rounds=rounds, period=PERIOD)

    run(_FIRST_ROUNDS)
    connections = len(client.client_list()) - 1  # all others are closed
    found = counted(client, partial(run, _ROUNDS), _ROUNDS)
    each.process.ask("close_node")
    return {"connections": connections, "by": by, "asked": asked / _ROUNDS, **found}


def together(found: Mapping[str, Any], nodes: float, key: str) -> float:
    """What so many idle nodes take, a second."""
    of_first = found.get(f"first: {key}", found[key])
    return float(of_first + (nodes - 1) * found[key]) / PERIOD


def _held(found: Mapping[str, Any]) -> float:
    """Seconds of the slowest command of idle nodes."""
    return float(max(found["held"], found.get("first: held", 0.0)))


# --- many objects ---


def many_objects(all_: Mapping[str, Contender], nodes: int, objects: int) -> dict[str, Any]:
    """Memory of the metadata, tools and a head start, with many nodes and objects."""
    note(f"{objects:,} objects of {nodes:,} nodes")
    before = {name: _memory(each.server.client) for name, each in all_.items()}
    started = time.perf_counter()
    _populate(all_, 0, nodes, objects // nodes, busy=False)
    found: dict[str, Any] = {}
    for name, each in all_.items():
        metadata, used = _memory(each.server.client)
        found[name] = {
            "metadata_bytes": (metadata - before[name][0]) / objects,
            "used_bytes": (used - before[name][1]) / objects,
        }
    note(f"put in {time.perf_counter() - started:.0f} s")
    for name, each in all_.items():
        for tool in (["stats", "--json"], ["gc", "--dry-run", "--json"]):
            note(f"{tool[0]}, {name}")
            found[name][tool[0]] = _run(each, nodes, tool)
        found[name]["head start"] = _head_start(each)
        note(f"idle, {name}")
        found[name]["idle"] = _idle(each, nodes)
    return found


def _memory(client: valkey.Valkey) -> tuple[int, int]:
    """Bytes of memory that the namespace's metadata take, and all that the server uses."""
    keys = client.keys("ray:spill:default:{default}:*")
    return sum(client.memory_usage(key, samples=0) for key in keys), used_memory(client)


def _run(each: Contender, nodes: int, tool: Sequence[str]) -> dict[str, Any]:
    """A command's seconds, its processor's seconds and its memory.

    While a clean-up looks, every node renews its lease, or it would wait for all to run out.
    """
    start = time.perf_counter()
    process = each.command(*tool)
    try:
        while tool[0] == "gc" and _is_running(process):
            each.process.ask("renew_leases", params=each.params, first=0, last=nodes)
            time.sleep(1)
            if time.perf_counter() - start > _GC_PATIENCE:
                process.terminate()
    finally:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": time.perf_counter() - start if process.returncode == 0 else None,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss * KIB,
    }


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _head_start(each: Contender) -> dict[str, float]:
    """Ray's validation at a head start, in a process that has nothing else to do."""
    with each.checkout.contender("fleet") as process:
        process.ask("import_ray")
        seconds: list[float] = []
        run = partial(_append, seconds, process, each.params)
        return {**counted(each.server.client, run, 1), "seconds": seconds[0]}


def _append(seconds: list[float], process: Process, params: dict[str, Any]) -> None:
    seconds.append(process.ask("head_start", params=params))


# --- on paper ---


def on_paper(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What so many nodes would take that do nothing, and which resource gives out first.

    What a node costs is taken to grow with the number of nodes as it was measured to, in a straight
    line through the least number above one, whose only node is the first, and the greatest.
    """
    _, few, *_, many = sorted(map(int, found))
    low, high = (found[str(nodes)][name] for nodes in (few, many))

    def grown(nodes: float) -> dict[str, float]:
        part = (nodes - few) / (many - few)
        return {
            key: max(0.0, value + (high[key] - value) * part)
            for key, value in low.items()
            if key != "operations"
        }

    def rate(nodes: float, key: str) -> float:
        return together(grown(nodes), nodes, key)

    taken: dict[str, tuple[float, Callable[[float], float]]] = {
        "server's core": (CORE, lambda n: rate(n, "cpu")),
        "network": (NETWORK, lambda n: rate(n, "bytes")),
        "connections": (CLIENTS, lambda n: n * grown(n)["connections"]),
        "a command's ms": (HELD, lambda n: _held(grown(n))),
    }
    shares = {what: take(PAPER) / limit for what, (limit, take) in taken.items()}
    reaches = {what: _reach(take, limit) for what, (limit, take) in taken.items()}
    return {"shares": shares, "reaches": reaches, "first": min(reaches, key=reaches.__getitem__)}


def _reach(take: Callable[[float], float], limit: float) -> int:
    """How many nodes take up to `limit`; at most a million."""
    low, high = 0, 1_000_000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if take(middle) <= limit else (low, middle - 1)
    return low


# --- all ---


def measure(quick: bool, compared: Sequence[Checkout]) -> dict[str, Any]:
    objects = 10_000 if quick else 1_000_000
    with _started(compared) as all_:
        found = beside(all_, quick)
        nodes = max(map(int, found))
        return {
            "contenders": [checkout.name for checkout in compared],
            "beside": found,
            "nodes": nodes,
            "objects": objects,
            "many": many_objects(all_, nodes, objects),
            "on_paper": {name: on_paper(found, name) for name in all_},
        }


def tables(results: dict[str, Any]) -> str:
    names = results["contenders"]
    first = ", ".join(f"{results['on_paper'][name]['first']} ({name})" for name in names)
    titled = {
        "**An operation on one object** beside so many nodes: the server's time, commands, and KiB "
        "both ways.": _operation_rows(results["beside"], names),
        "**A fleet that does nothing**: what the background work of all nodes causes, and the "
        "connections of one node, whose eight IO workers have just spilled and restored.": (
            _idle_rows(results["beside"], names)
        ),
        f"**{results['objects']:,} objects of {results['nodes']:,} nodes.** While `gc` looks, all "
        "nodes renew their leases as fast as they can.": _many_rows(
            results["many"], names, results["nodes"]
        ),
        f"**{PAPER:,} nodes on paper**, all idle: what they take of each resource, and how many "
        f"nodes take all of it. First to give out: {first}.": (
            _paper_rows(results["on_paper"], names)
        ),
    }
    return "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in titled.items())


def _idle_rows(beside_: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    columns = ["% of a core", "commands/s", "MB/s", "connections of one", "slowest command, µs"]
    rows = [["nodes", *(head for column in columns for head in heads(names, column))]]
    for nodes, found in beside_.items():
        cpu, commands, moved = (
            {n: together(found[n], int(nodes), key) for n in names}
            for key in ("cpu", "commands", "bytes")
        )
        rows.append(
            [
                f"{int(nodes):,}",
                *side_by_side({n: 100 * cpu[n] for n in names}, 2),
                *side_by_side(commands, 0),
                *side_by_side({n: moved[n] / 1e6 for n in names}, 3),
                *side_by_side({n: found[n]["connections"] for n in names}, 0),
                *side_by_side({n: _held(found[n]) * 1e6 for n in names}, 0),
            ]
        )
    return rows


def _operation_rows(beside_: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    rows = [
        [
            "object",
            "operation",
            "nodes",
            *heads(names, "µs"),
            *heads(names, "commands"),
            *heads(names, "KiB"),
        ]
    ]
    for size in _SIZES:
        for operation in _OPERATIONS:
            for nodes, found in beside_.items():
                of = {name: found[name]["operations"][size] for name in names}
                rows.append(
                    [
                        size,
                        operation,
                        f"{int(nodes):,}",
                        *side_by_side({n: of[n][f"{operation}: cpu"] * 1e6 for n in names}, 0),
                        *side_by_side({n: of[n][f"{operation}: commands"] for n in names}, 1),
                        *side_by_side({n: of[n][f"{operation}: bytes"] / KIB for n in names}, 1),
                    ]
                )
    return rows


def _many_rows(many: Mapping[str, Any], names: Sequence[str], nodes: int) -> list[list[str]]:
    rows = [["", *heads(names)]]
    figures: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "metadata of an object, bytes of server memory": lambda f: f["metadata_bytes"],
        "all of an object of 8 bytes, the same": lambda f: f["used_bytes"],
        "head start, s": lambda f: f["head start"]["seconds"],
        "head start, server's ms": lambda f: f["head start"]["cpu"] * 1e3,
    }
    for tool in ("stats", "gc"):
        figures[f"`{tool}`, s"] = lambda f, tool=tool: f[tool]["seconds"]
        figures[f"`{tool}`, CPU s"] = lambda f, tool=tool: f[tool]["cpu"]
        figures[f"`{tool}`, MiB"] = lambda f, tool=tool: f[tool]["memory"] / MIB
    if all("idle" in many[name] for name in names):
        figures |= {
            "all nodes idle, % of a core": lambda f: 100 * together(f["idle"], nodes, "cpu"),
            "the same, commands/s": lambda f: together(f["idle"], nodes, "commands"),
            "the same, slowest command, µs": lambda f: _held(f["idle"]) * 1e6,
        }
    for what, figure in figures.items():
        rows.append([what, *side_by_side({name: figure(many[name]) for name in names}, 2)])
    return rows


def _paper_rows(papers: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    rows = [["resource", "limit", *heads(names, "share"), *heads(names, "nodes")]]
    limits = {
        "server's core": "1 core",
        "network": "10 Gbit/s",
        "connections": f"{CLIENTS:,} (maxclients)",
        "a command's ms": f"{HELD * 1e3:g} ms",
    }
    for what, limit in limits.items():
        shares = {name: papers[name]["shares"][what] for name in names}
        reaches = {name: papers[name]["reaches"][what] for name in names}
        rows.append([what, limit, *side_by_side(shares, 3), *side_by_side(reaches, 0)])
    return rows


if __name__ == "__main__":
    main("What a fleet of nodes costs the server", measure, tables)
