"""One IO worker of a node does the node's background work; whichever lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.io_worker import IoWorker, io_workers
from support.servers import Server, wait_until
from support.stores import Lease

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.plugin.keeper import NodeLock

NODE = "ab" * 28

_HOLDER = """
import sys
from pathlib import Path
from ray_valkey_spill.plugin.keeper import NodeLock
lock = NodeLock(lambda: Path(sys.argv[1]), sys.argv[2])
print(lock.take(), flush=True)
sys.stdin.read()
"""


def new_lock(directory: Path | None, name: str = "node") -> NodeLock:
    return NodeLock(lambda: directory, name)


def test_one_at_a_time_has_the_lock_until_it_drops_it(tmp_path: Path) -> None:
    first, second = new_lock(tmp_path), new_lock(tmp_path)
    assert first.take() and first.take()
    assert not second.take()
    first.drop()
    assert second.take()
    assert not first.take()
    second.drop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_process_that_ended_is_taken_by_another(
    tmp_path: Path, number: signal.Signals
) -> None:
    lock = new_lock(tmp_path)
    command = [sys.executable, "-c", _HOLDER, str(tmp_path), "node"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        assert not lock.take()
        holder.send_signal(number)
    assert lock.take()
    lock.drop()


def test_a_stopped_process_keeps_the_lock(tmp_path: Path) -> None:
    """Which is why the lease does not depend on it."""
    lock = new_lock(tmp_path)
    command = [sys.executable, "-c", _HOLDER, str(tmp_path), "node"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        holder.send_signal(signal.SIGSTOP)
        assert not lock.take()
        holder.kill()


def test_where_no_file_can_be_had_each_process_keeps_the_node(tmp_path: Path) -> None:
    for directory in (None, tmp_path / "missing"):
        locks = [new_lock(directory), new_lock(directory)]
        assert all(lock.take() for lock in locks)
        for lock in locks:
            lock.note_renewal()
            assert lock.since_renewal() == float("inf")
            lock.drop()


def test_whoever_renews_the_lease_all_know_of_it(tmp_path: Path) -> None:
    first, second = new_lock(tmp_path), new_lock(tmp_path)
    assert second.since_renewal() == float("inf")
    first.note_renewal()
    assert 0 <= second.since_renewal() < 60
    os.utime(tmp_path / "node.keeper", (0, 0))
    assert second.since_renewal() > 1e9
    # A clock that was put back says nothing.
    os.utime(tmp_path / "node.keeper", (1e11, 1e11))
    assert second.since_renewal() == float("inf")


# By node: how long ago its lease was renewed, in seconds.
AGES = {"ended": 3600, "ended2": 60, "kept": 3600, "later": -3600}


def test_files_of_nodes_that_died_long_ago_are_removed(tmp_path: Path) -> None:
    """Only of those: not of one that may live, is kept, or had its lease renewed a while ago."""
    own = new_lock(tmp_path, "own")
    assert own.take()
    kept = {tmp_path / name for name in ("own.keeper", "logs", "session.json")}
    for path in kept:
        path.touch()
    for name, ago in AGES.items():
        files = [tmp_path / f"{name}{end}" for end in (".outages", "-12-ab.deletions", ".keeper")]
        for path in files:
            path.touch()
        (tmp_path / f"{name}.restores").mkdir()
        (tmp_path / f"{name}.restores" / "0a").touch()
        os.utime(files[-1], (time.time() - ago, time.time() - ago))
        if name != "ended":
            kept |= {*files, tmp_path / f"{name}.restores"}
    other = new_lock(tmp_path, "kept")
    assert other.take()
    own.remove_abandoned(lambda name: name == "other")
    assert {path.stem for path in tmp_path.glob("*.keeper")} == {"own", *AGES}
    own.remove_abandoned(lambda name: True)
    assert {*tmp_path.iterdir()} == kept
    other.drop()
    own.drop()


def test_without_a_directory_there_is_nothing_to_remove(tmp_path: Path) -> None:
    for directory in (None, tmp_path / "missing"):
        new_lock(directory).remove_abandoned(lambda name: True)
    assert [*tmp_path.iterdir()] == []


# --- IO workers ---


@pytest.fixture
def lease(server: Server) -> Iterator[Lease]:
    made = Lease(server, Keyspace.of(Config.load({"url": server.url}, {})))
    yield made
    made.remove()


def keeper_of(workers: list[IoWorker]) -> IoWorker:
    """The one of them that keeps the node, once one does."""
    wait_until(lambda: any(worker.keeps_the_node for worker in workers))
    (keeper,) = [worker for worker in workers if worker.keeps_the_node]
    return keeper


@pytest.mark.slow
def test_of_the_io_workers_of_a_node_one_keeps_it_and_another_when_that_is_killed(
    server: Server, lease: Lease, tmp_path: Path
) -> None:
    with io_workers(3, tmp_path, NODE, {"url": server.url}) as workers:
        while len(workers) > 1:
            keeper = keeper_of(workers)
            wait_until(lease.renewed)
            keeper.kill()
            workers.remove(keeper)
            before = lease.age()
            assert keeper_of(workers) is not keeper
            wait_until(lambda: lease.renewed() > before)  # noqa: B023


@pytest.mark.slow
def test_while_the_keeper_is_stopped_another_io_worker_renews_the_lease(
    server: Server, lease: Lease, tmp_path: Path
) -> None:
    with io_workers(2, tmp_path, NODE, {"url": server.url}) as workers:
        keeper = keeper_of(workers)
        wait_until(lease.renewed)
        os.kill(keeper.process.pid, signal.SIGSTOP)
        before = lease.age()
        wait_until(lambda: lease.renewed() > before)
        assert keeper_of(workers) is keeper
