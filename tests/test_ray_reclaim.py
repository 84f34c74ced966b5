"""What a dead node of a running session has spilled goes once nobody needs it, and not before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from support.clusters import (
    MIB,
    OBJECT_STORE,
    cluster,
    kill_node,
    on,
)
from support.servers import INDEX, ROOT, Server, valkey_server, wait_until

from ray_valkey_spill.format.names import Entry, Keyspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LEASES = Keyspace(ROOT).leases
# Seconds from the death of a node or the end of the last reference until nothing is left.
TARGET = 120
EACH = 4

Refs = list[Any]


@pytest.fixture
def spilling() -> Iterator[Server]:
    with valkey_server() as server:
        server.settle_foreign()
        yield server
        server.assert_foreign_untouched()


@ray.remote(max_retries=0)
def produce(i: int) -> np.ndarray:
    return np.full(MIB, i)


@ray.remote(max_retries=0, num_returns="streaming")
def stream(count: int, gate: str = "") -> Iterator[np.ndarray]:
    for i in range(count):
        yield np.full(MIB, i)
    while gate and not os.path.exists(gate):
        time.sleep(0.1)


@ray.remote(num_cpus=0)
def total(gate: str, arrays: Refs, direct: np.ndarray) -> list[int]:
    """Waits for a file before it looks at its arguments."""
    while not os.path.exists(gate):
        time.sleep(0.1)
    return [int(direct[0]), *(int(array[0]) for array in ray.get(arrays))]


@ray.remote(num_cpus=0)
class Holder:
    """Owns and borrows objects."""

    def __init__(self) -> None:
        self.refs: Refs = []

    def hold(self, refs: Refs) -> int:
        self.refs += refs
        return os.getpid()

    def put(self, count: int) -> Refs:
        return self.hold_and_return([ray.put(np.full(MIB, i)) for i in range(count)])

    def have_made(self, count: int) -> Refs:
        refs = [produce.options(resources={"node1": 1}).remote(i) for i in range(count)]
        ray.wait(refs, num_returns=count, fetch_local=False)
        return self.hold_and_return(refs)

    def hold_and_return(self, refs: Refs) -> Refs:
        self.refs += refs
        return [ref.hex() for ref in refs]

    def read(self) -> list[int]:
        return [int(ray.get(ref)[0]) for ref in self.refs]

    def drop(self) -> None:
        self.refs.clear()


DRIVER = """
import sys, numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
@ray.remote(max_retries=0, resources={"node1": 1})
def produce(i):
    return np.full(1 << 20, i)
refs = [produce.remote(i) for i in range(int(sys.argv[2]))]
ray.wait(refs, num_returns=len(refs), fetch_local=False)
print(*[ref.hex() for ref in refs], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_driver(address: str, count: int) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A driver that has made objects on node 1, and their ids; it ends when its stdin does."""
    command = [sys.executable, "-c", DRIVER, address, str(count)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        try:
            yield driver, driver.stdout.readline().split()
        finally:
            driver.kill()


def hexes(refs: Refs) -> set[str]:
    return {ref.hex() for ref in refs}


def entries_of(server: Server, node: str) -> dict[str, Entry]:
    """What the index has of a node, by the ids of the objects."""
    members = server.client.zrange(INDEX, 0, -1)
    found = [Entry.parse(member.decode()) for member in members]
    return {e.name.object_id: e for e in found if e.name.node == node}


def spill_all(server: Server, node: str, wanted: set[str]) -> None:
    """Fill the object store of node 1 until it has spilled the wanted objects."""
    filler: Refs = []
    for i in range(3 * OBJECT_STORE // (8 * MIB)):
        filler.append(produce.options(**on(1)).remote(i))
        if i > OBJECT_STORE // (8 * MIB) and wanted <= entries_of(server, node).keys():
            break
    ray.wait(filler, num_returns=len(filler), fetch_local=False)
    wait_until(lambda: wanted <= entries_of(server, node).keys())


def expect_left(server: Server, node: str, wanted: set[str], timeout: float = TARGET) -> float:
    """Wait until exactly the wanted objects of a node are left; returns how long that took."""
    started = time.monotonic()
    wait_until(lambda: entries_of(server, node).keys() <= wanted, timeout=timeout)
    assert entries_of(server, node).keys() == wanted
    return time.monotonic() - started


def has_lease(server: Server, node: str) -> bool:
    return any(node.encode() in member for member in server.client.zrange(LEASES, 0, -1))


def test_of_a_dead_node_there_is_left_what_is_referenced_and_nothing_else(
    spilling: Server, tmp_path: Any
) -> None:
    gate = str(tmp_path / "gate")
    with cluster(spilling.url, nodes=3) as nodes:
        dead = nodes.list_all_nodes()[1].node_id
        everything, kept, names = _objects_of_node_1(spilling, nodes, gate)
        with another_driver(nodes.address, EACH) as (driver, drivers_ids):
            spill_all(spilling, dead, set().union(*everything.values(), drivers_ids))
            kill_node(nodes, 1)
            names["dropped"].clear()
            ray.kill(names["killed"])
            os.kill(names["pid of the paused"], signal.SIGSTOP)
            # A driver that goes on keeps its own.
            needed = kept | {*drivers_ids}
            print("first", expect_left(spilling, dead, needed))
            assert driver.stdin is not None
            driver.stdin.close()
            driver.wait()
            print("driver", expect_left(spilling, dead, kept))
            os.kill(names["pid of the paused"], signal.SIGCONT)
        numbers = list(range(EACH))
        assert [int(ray.get(ref)[0]) for ref in names["kept"]] == numbers
        assert [int(ray.get(ref)[0]) for ref in ray.get(names["outer"])] == numbers
        assert [int(ray.get(ref)[0]) for ref in names["stream"]] == numbers
        assert ray.get(names["borrower"].read.remote()) == numbers
        assert ray.get(names["paused"].read.remote()) == numbers
        tmp_path.joinpath("gate").touch()
        assert ray.get(names["result"]) == [0, *numbers[1:]]
        ray.get([names[each].drop.remote() for each in ("borrower", "paused")])
        for each in ("kept", "outer", "stream", "borrower", "paused", "result"):
            del names[each]
        print("all", expect_left(spilling, dead, set()))
        wait_until(lambda: not has_lease(spilling, dead), timeout=60)


def _objects_of_node_1(
    server: Server, nodes: Cluster, gate: str
) -> tuple[dict[str, set[str]], set[str], dict[str, Any]]:
    """Make objects on node 1 in all ways in which they can be referenced.

    Returns:
        Their ids, by kind; the ids of those that are still needed when the node is dead; and what
        holds them.
    """
    made = {
        kind: [produce.options(**on(1)).remote(i) for i in range(EACH)]
        for kind in ("kept", "dropped", "nested", "borrowed", "arguments")
    }
    borrower, paused, killed, dying = (Holder.options(**on(node)).remote() for node in (2, 2, 2, 1))
    for refs in made.values():
        ray.wait(refs, num_returns=EACH, fetch_local=False)
    ids = {kind: hexes(refs) for kind, refs in made.items()}
    ids["of the paused"] = {*ray.get(paused.have_made.remote(EACH))}
    ids["of the killed"] = {*ray.get(killed.have_made.remote(EACH))}
    ids["of the dying"] = {*ray.get(dying.put.remote(EACH))}
    generator = stream.options(**on(1)).remote(EACH)
    items = list(generator)
    ids["stream"] = hexes(items)
    ray.get(borrower.hold.remote(made.pop("borrowed")))
    arguments = made.pop("arguments")
    names = {
        "kept": made.pop("kept"),
        "dropped": made.pop("dropped"),
        "outer": ray.put(made.pop("nested")),
        "stream": items,
        "borrower": borrower,
        "paused": paused,
        "killed": killed,
        "dying": dying,
        "result": total.options(**on(2)).remote(gate, arguments[1:], arguments[0]),
        "pid of the paused": ray.get(paused.hold.remote([])),
    }
    gone = {"dropped", "of the killed", "of the dying"}
    needed = set().union(*(found for kind, found in ids.items() if kind not in gone))
    return ids, needed, names
