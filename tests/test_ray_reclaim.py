"""What a dead node of a running session has spilled goes once nobody needs it, and not before."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from packaging.version import Version
from support.clusters import MIB, OBJECT_STORE, cluster, kill_node, on, starting_ray, system_config
from support.guardians import end_guardians
from support.servers import INDEX, PATIENCE, ROOT, TARGET, Server, valkey_server, wait_until

from ray_valkey_spill.format.names import Entry, Keyspace
from ray_valkey_spill.plugin.owners import RayOwners

pytestmark = pytest.mark.slow

# Workers cannot import it, and what its tasks and actors use comes with them.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

LEASES = Keyspace(ROOT).leases
EACH = 4
# `ray.put(_owner=...)`, which Ray 2.56 has removed.
PUTS_FOR_OTHERS = Version(ray.__version__) < Version("2.56")
MANY = OBJECT_STORE // (8 * MIB)

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
def stream(count: int) -> Iterator[np.ndarray]:
    for i in range(count):
        yield np.full(MIB, i)


@ray.remote(max_retries=0, num_cpus=0)
def go_on_for_long(count: int, gate: str) -> Iterator[np.ndarray]:
    """A generator that has not ended: of what it has made, its owner may not know everything."""
    for i in range(count):
        yield np.full(MIB, i)
    while not os.path.exists(gate):
        time.sleep(0.1)


@ray.remote(max_retries=0)
def put_for(owner: Any) -> Refs:
    return [ray.put(np.full(MIB, i), _owner=owner) for i in range(EACH)]


# Of a task that may be retried, Ray keeps the arguments for longer.
@ray.remote(max_retries=0, num_cpus=0)
def total(gate: str, refs: Refs, direct: np.ndarray) -> dict[str, int]:
    """Waits for a file before it looks at its arguments."""
    while not os.path.exists(gate):
        time.sleep(0.1)
    return {"direct": int(direct[0]), **values(refs)}


def values(refs: Refs) -> dict[str, int]:
    """The numbers in objects, by id, without those that were lost."""
    found = {}
    for ref in refs:
        try:
            found[ref.hex()] = int(ray.get(ref, timeout=PATIENCE)[0])
        except ray.exceptions.ObjectLostError:
            continue
    # An exception refers to the frames it came through, and so to `refs`, until this.
    gc.collect()
    return found


@ray.remote(num_cpus=0)
class Holder:
    """Owns and borrows objects."""

    def __init__(self) -> None:
        self.refs: Refs = []

    def hold(self, refs: Refs) -> int:
        self.refs += refs
        return os.getpid()

    def put(self, count: int) -> list[str]:
        return self._add([ray.put(np.full(MIB, i)) for i in range(count)])

    def have_made(self, count: int) -> list[str]:
        refs = [produce.options(resources={"node1": 1}).remote(i) for i in range(count)]
        ray.wait(refs, num_returns=count, fetch_local=False)
        return self._add(refs)

    def _add(self, refs: Refs) -> list[str]:
        self.refs += refs
        return [ref.hex() for ref in refs]

    def read(self) -> dict[str, int]:
        return values(self.refs)

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


ANOTHER_CLUSTER = """
refs = [ray.put(np.full(1 << 20, i)) for i in range(30)]
print("has spilled", flush=True)
sys.stdin.read()
print(*[int(ray.get(ref, timeout=300)[0]) for ref in refs])
"""


@contextlib.contextmanager
def another_cluster(server: Server) -> Iterator[None]:
    """One in the same namespace. Nothing of it may go, and at the end it reads all its objects."""

    def stored() -> set[bytes]:
        return {each for each in server.client.zrange(INDEX, 0, -1) if session in each}

    script = starting_ray(system_config(server.url)) + ANOTHER_CLUSTER
    before = {*server.client.zrange(LEASES, 0, -1)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        try:
            assert driver.stdin is not None and driver.stdout is not None
            assert driver.stdout.readline() == "has spilled\n"
            (lease,) = {*server.client.zrange(LEASES, 0, -1)} - before
            session, _, _ = lease.partition(b":")
            assert (its := stored())
            yield
            assert stored() >= its
            driver.stdin.close()
            assert driver.stdout.read().split() == [str(i) for i in range(30)]
        finally:
            driver.kill()
            driver.wait()
            end_guardians(driver.pid)


def numbered(ids: Iterable[str]) -> dict[str, int]:
    return {each: number for number, each in enumerate(ids)}


def entries_of(server: Server, node: str) -> dict[str, Entry]:
    """What the index has of a node, by the ids of the objects."""
    members = server.client.zrange(INDEX, 0, -1)
    found = [Entry.parse(member.decode()) for member in members]
    return {e.name.object_id: e for e in found if e.name.node == node}


def spill_some(server: Server, node: str, kinds: Mapping[str, Mapping[str, int]]) -> set[str]:
    """Fill the object store of node 1 until it has spilled some of each kind; returns all ids."""
    filler: Refs = []

    def unspilled() -> list[str]:
        spilled = entries_of(server, node).keys()
        return [kind for kind, ids in kinds.items() if not ids.keys() & spilled]

    for i in range(10 * OBJECT_STORE // (8 * MIB)):
        filler.append(produce.options(**on(1)).remote(i))
        ray.wait(filler, num_returns=len(filler), fetch_local=False)
        if i > OBJECT_STORE // (8 * MIB) and not unspilled():
            break
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not unspilled(), timeout=PATIENCE)
    assert unspilled() == []
    ids = {ref.hex() for ref in filler}
    filler.clear()
    # What Ray asks to be deleted now is none of the test's.
    wait_until(lambda: not ids & entries_of(server, node).keys())
    return {*entries_of(server, node)}


def expect_left(
    server: Server, node: str, kinds: Mapping[str, Mapping[str, int]], wanted: set[str]
) -> None:
    """Wait until exactly the wanted objects of a node are left."""
    left = wait_for_less(server, node, wanted)
    assert {kind for kind, ids in kinds.items() if (left - wanted) & ids.keys()} == set()
    assert left == wanted


def wait_for_less(server: Server, node: str, wanted: set[str]) -> set[str]:
    """Wait until none but the wanted objects are left, if that comes; returns what is left."""
    with contextlib.suppress(AssertionError):
        # Ten seconds are for Ray to notice what has happened.
        wait_until(lambda: entries_of(server, node).keys() <= wanted, timeout=TARGET + 10)
    return {*entries_of(server, node)}


def has_lease(server: Server, node: str) -> bool:
    return any(node.encode() in member for member in server.client.zrange(LEASES, 0, -1))


def test_of_a_dead_node_there_is_left_what_is_referenced_and_nothing_else(
    spilling: Server, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with another_cluster(spilling), cluster(spilling.url, nodes=3) as nodes:
        (dead,) = [node["NodeID"] for node in ray.nodes() if "node1" in node["Resources"]]
        # More than node 2 has room for.
        generators = [
            go_on_for_long.options(num_returns=kind, **on(2)).remote(MANY, str(gate))
            for kind in ("dynamic", "streaming")
        ]
        kinds, held = _objects_of_node_1()
        with another_driver(nodes.address, EACH) as (driver, ids):
            assert len(ids) == EACH
            kinds["of a driver"] = numbered(ids)
            spilled = spill_some(spilling, dead, kinds)
            arguments = held.pop("arguments")
            direct = next(ref for ref in arguments if ref.hex() in spilled)
            result = total.options(**on(2)).remote(str(gate), arguments, direct)
            number = kinds["arguments"][direct.hex()]
            del arguments, direct
            # Ray's cluster keeps its workers in no order.
            kill_node(nodes, [node.node_id for node in nodes.list_all_nodes()].index(dead))
            held["dropped"].clear()
            ray.kill(held["killed"])
            os.kill(held["pid of the paused"], signal.SIGSTOP)
            gone = ("dropped", "of the killed", "put for the killed", "of the dying")
            needed = spilled.difference(*(kinds.get(kind, ()) for kind in gone))
            expect_left(spilling, dead, kinds, needed)
            assert driver.stdin is not None
            driver.stdin.close()
            driver.wait()
            needed -= {*ids}
            expect_left(spilling, dead, kinds, needed)
            os.kill(held["pid of the paused"], signal.SIGCONT)
        gate.touch()
        found = {
            "kept": values(held["kept"]),
            "nested": values(ray.get(held["outer"])),
            "stream": values(held["stream"]),
            "borrowed": ray.get(held["borrower"].read.remote()),
            "of the paused": ray.get(held["paused"].read.remote()),
            "arguments": ray.get(result),
        }
        if PUTS_FOR_OTHERS:
            found["put for another"] = values(held["put for another"])
        for items in (ray.get(generators[0]), generators[1]):
            assert [int(ray.get(item)[0]) for item in items] == [*range(MANY)]
        assert found["arguments"].pop("direct") == number
        for kind, read in found.items():
            assert read == {i: n for i, n in kinds[kind].items() if i in spilled}, kind
        ray.get([held[each].drop.remote() for each in ("borrower", "paused")])
        held.clear()
        del result
        expect_left(spilling, dead, kinds, set())
        wait_until(lambda: not has_lease(spilling, dead))


def _objects_of_node_1() -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Make objects on node 1 in all ways in which they can be referenced.

    Returns:
        Their ids and numbers, by kind; and what holds them.
    """
    made = {
        kind: [produce.options(**on(1)).remote(i) for i in range(EACH)]
        for kind in ("kept", "dropped", "nested", "borrowed", "arguments")
    }
    borrower, paused, killed, dying = (Holder.options(**on(node)).remote() for node in (2, 2, 2, 1))
    for refs in made.values():
        ray.wait(refs, num_returns=EACH, fetch_local=False)
    kinds = {kind: numbered(ref.hex() for ref in refs) for kind, refs in made.items()}
    kinds["of the paused"] = numbered(ray.get(paused.have_made.remote(EACH)))
    kinds["of the killed"] = numbered(ray.get(killed.have_made.remote(EACH)))
    kinds["of the dying"] = numbered(ray.get(dying.put.remote(EACH)))
    made["stream"] = list(stream.options(**on(1)).remote(EACH))
    kinds["stream"] = numbered(ref.hex() for ref in made["stream"])
    if PUTS_FOR_OTHERS:
        for kind, owner in (("put for another", borrower), ("put for the killed", killed)):
            made[kind] = ray.get(put_for.options(**on(1)).remote(owner))
            kinds[kind] = numbered(ref.hex() for ref in made[kind])
    pid = ray.get(paused.hold.remote([]))
    ray.get(borrower.hold.remote(made.pop("borrowed")))
    held = {
        **made,
        "outer": ray.put(made.pop("nested")),
        "borrower": borrower,
        "paused": paused,
        "killed": killed,
        "dying": dying,
        "pid of the paused": pid,
    }
    return kinds, {name: each for name, each in held.items() if name != "nested"}


# Put into IO workers: one that has settled one of these objects never answers Ray.
HANGING = """
import os, pathlib, sys, time

if any("SPILL_WORKER" in argument for argument in sys.orig_argv):
    from ray_valkey_spill.store.spill import Batch

    commit = Batch.commit

    def commit_and_hang(self):
        commit(self)
        named = pathlib.Path(os.environ["HANGING"])
        while named.exists() and {e.name.object_id for e in self.stored} & {
            *named.read_text().split()
        }:
            time.sleep(0.1)

    Batch.commit = commit_and_hang
"""


def test_gc_joins_a_cluster_and_what_was_spilled_twice_goes_with_its_last_reference(
    spilling: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster whose living node has not spilled yet: nobody reclaims there but `gc`."""
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    hanging = tmp_path / "hanging"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("HANGING", str(hanging))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster(spilling.url) as nodes:
        head, dead = (node.node_id for node in nodes.list_all_nodes())
        # By when they started.
        assert [*(RayOwners().nodes() or ())] == [head, dead]
        held = {
            kind: [produce.options(**on(1)).remote(i) for i in range(EACH)]
            for kind in ("kept", "dropped")
        }
        for refs in held.values():
            ray.wait(refs, num_returns=EACH, fetch_local=False)
        kinds = {kind: numbered(ref.hex() for ref in refs) for kind, refs in held.items()}
        spill_some(spilling, dead, kinds)
        # Of these there are copies in the memory of the head.
        held["twice"] = [produce.options(**on(1)).remote(i) for i in range(EACH)]
        kinds["twice"] = numbered(ref.hex() for ref in held["twice"])
        arrays = ray.get(held["twice"])
        hanging.write_text(" ".join(kinds["twice"]))
        filler = [produce.options(**on(1)).remote(i) for i in range(3 * MANY)]
        wait_until(lambda: kinds["twice"].keys() & entries_of(spilling, dead).keys())
        kill_node(nodes, 1)
        hanging.unlink()
        held["dropped"].clear()
        del filler
        spilled = entries_of(spilling, dead).keys()
        needed = spilled & {*kinds["kept"], *kinds["twice"]}
        _expect_gc_to_leave(spilling, nodes.address, dead, needed)
        kept = [ref for ref in held["kept"] if ref.hex() in needed]
        assert values(kept) == {i: n for i, n in kinds["kept"].items() if i in needed}
        # The head has taken these over.
        arrays.clear()
        twice = needed & kinds["twice"].keys()
        spill_on_the_head(spilling, head, twice)
        assert values(held["twice"]) == kinds["twice"]
        assert entries_of(spilling, dead).keys() == needed
        held["twice"].clear()
        expect_left(spilling, dead, kinds, needed - twice)
        wait_until(lambda: not twice & entries_of(spilling, head).keys())
        assert values(kept) == {i: n for i, n in kinds["kept"].items() if i in needed}
        # A GCS that is busy may not answer at once.
        wait_until(lambda: states(spilling) == {head: "alive", dead: "dead"})


def states(server: Server) -> dict[str, str]:
    """By node, what `stats` says of it."""
    command = [sys.executable, "-m", "ray_valkey_spill", "stats", "--json", "--url", server.url]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {node["node"]: node["state"] for each in found["sessions"] for node in each["nodes"]}


def spill_on_the_head(server: Server, head: str, ids: set[str]) -> None:
    """Fill the object store of the head, where the driver is, until these are spilled there."""
    filler: Refs = []
    for i in range(10 * OBJECT_STORE // (8 * MIB)):
        filler.append(ray.put(np.full(MIB, i)))
        if ids <= entries_of(server, head).keys():
            return
    raise AssertionError(f"not spilled: {ids - entries_of(server, head).keys()}")


def _expect_gc_to_leave(server: Server, address: str, dead: str, needed: set[str]) -> None:
    """Run `gc` with and without the cluster's address: only the first one removes objects."""
    before = entries_of(server, dead).keys()
    session = Path(ray._private.worker._global_node.get_session_dir_path()).name
    command = [sys.executable, "-m", "ray_valkey_spill", "gc", "--yes", "--url", server.url]
    # They watch leases for a minute, both at the same time; then one asks each owner twice.
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
        for env in ({}, {"RAY_ADDRESS": address})
    ]
    alone, joined = (" ".join(process.communicate()[0].split()) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    kept = f"Kept: {len(before)} objects"
    assert re.search(f"{kept} .* of dead nodes of {session}, which runs.* give --address", alone)
    assert "nobody needed" not in alone
    assert "Kept:" not in joined
    stays = f"{len(needed)} objects that somebody references" if len(needed) > 1 else "1 object"
    assert f"Kept of dead nodes of {session}, which runs: {stays}" in joined
    assert "Nothing to remove" not in joined
    removed = f"Removed {len(before - needed)} objects"
    assert re.search(rf"{removed} \([^)]*\) of dead nodes that nobody needed any more", joined)
    assert entries_of(server, dead).keys() == needed
