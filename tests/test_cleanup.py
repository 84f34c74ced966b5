"""Clean-up: what the dead have left goes, all of it; what the living have stays, all of it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from packaging.version import Version
from support.clock import Clock
from support.clusters import (
    MIB,
    cluster,
    io_workers,
    kill_node,
    local_ray,
    starting_ray,
    system_config,
)
from support.faults import is_restarted_and_has_its_snapshot, resets_connections
from support.guardians import end_guardians
from support.rigs import Rig
from support.samples import source
from support.servers import (
    PATIENCE,
    Server,
    dead_port,
    valkey_server,
    wait_until,
)
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError, OverflowUnavailableError
from ray_valkey_spill.format.names import Keyspace, NodeName, ObjectName, new_attempt
from ray_valkey_spill.plugin import gcs
from ray_valkey_spill.plugin.gcs import running_at
from ray_valkey_spill.plugin.interpreter import module_command
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.cleanup import LEASE, RENEWAL, CleanUp, Remains
from ray_valkey_spill.store.liveness import UNKNOWN, UNREACHABLE, RunningSession
from ray_valkey_spill.store.session import EndingSession, note_gcs_address
from ray_valkey_spill.tiers.ledger import Grant, Ledger, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.valkey import ValkeyTier

DEAD, LIVING = "session_dead", "session_living"
GCS = {DEAD: "10.0.0.1:6379", LIVING: "10.0.0.2:6379"}
NODES = ["aa" * 28, "bb" * 28]
SMALL, LARGE = 3_000, 85_000


class Namespace:
    """What nodes of sessions have on a server and in an overflow, and looks for the dead there."""

    def __init__(self, url: str, client: Any, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self.client = client
        self.directory = directory
        self.params = {
            "url": url,
            "chunk_size": 10_000,
            "retry_timeout": 5,
            "overflow_uri": directory.as_uri(),
        }
        self.config = Config.load(self.params, {})
        self.keys = Keyspace.of(self.config)
        self.link = link_to(self.config)
        self.ledger = Ledger(self.link, self.keys)
        self.told: list[str] = []
        self.running: dict[str, RunningSession | None] = {}
        self.data: dict[str, bytes] = {}
        self._closing = contextlib.ExitStack()
        self._closing.callback(self.link.close)

    def store(self, session: str, node: str = NODES[0], **params: Any) -> Store:
        store = Store(Config.load({**self.params, **params}, {}), session, node)
        self._closing.callback(store.close)
        return store

    def node(self, session: str, node: str = NODES[0]) -> list[str]:
        """A node with a lease, a grant, and objects in Valkey, in the overflow, and half-written.

        Returns the URLs of those that are whole.
        """
        store = self.store(session, node)
        self.come_to_life(store, session)
        self.grant(session, node, "1-x", 5)
        return [
            *self.put(store),
            *self.put(self.store(session, node, max_bytes=0)),
            *self.half_write(session, node),
        ]

    def grant(self, session: str, node: str, writer: str, size: int) -> None:
        owner, nothing = NodeName(session, node), Grant(0, 0)
        self.link.execute(self.ledger.reservation(owner, writer, nothing, size, size, None, None))

    def come_to_life(self, store: Store, session: str) -> None:
        """What an IO worker does first, and again and again."""
        store.renew_lease(GCS[session], lambda: False)
        store.join_overflow()
        store.recover(lambda pid: True)

    def put(self, store: Store) -> list[str]:
        values = [np.random.default_rng().bytes(size) for size in (SMALL, LARGE)]
        urls, failure = store.put([source(value, i) for i, value in enumerate(values)])
        assert failure is None
        self.data |= zip(urls, values)
        return urls

    def half_write(self, session: str, node: str) -> list[str]:
        """Leave what a killed writer leaves. Nothing of it is whole."""
        name = ObjectName(session, node, "f" * 56, new_attempt(), 3)
        self.link.execute(*self.ledger.registrations([name]))
        self.client.set(self.keys.chunks(name)[0], b"some")
        part = self.directory / self.keys.root.rstrip(":") / session / node
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{name.object_id}.{name.attempt}.3.99.part").write_bytes(b"some")
        return []

    def half_written(self, session: str, node: str) -> tuple[int, int]:
        """How many objects there are in Valkey and in the overflow that are half-written."""
        owner = NodeName(session, node)
        overflow = OverflowTier.of(self.config)
        assert overflow is not None
        with contextlib.closing(overflow):
            parts = [file for file in overflow.files(owner) if not file.is_whole]
        return sum(map(len, self.ledger.pending(owner))), len(parts)

    def renew(self, session: str, node: str = NODES[0], address: str | None = None) -> None:
        """A renewal, ten seconds after the one before by the server's clock."""
        address = GCS[session] if address is None else address
        self.client.zincrby(self.keys.leases, 10_000, f"{session}:{node}:{address}")

    def lose_all(self) -> None:
        """The server loses every key of ours."""
        for key in self.client.keys(f"{self.keys.root}*"):
            self.client.delete(key)

    def look(self) -> CleanUp:
        look = CleanUp(self.config, self.running.get)
        self._closing.callback(look.close)
        return look

    def gc(self) -> list[Remains]:
        look = self.look()
        remains = look.find(self.told.append)
        look.remove(remains)
        return remains

    def expect_all(self, urls: list[str]) -> None:
        """All objects come back, read from a node that has not spilled them."""
        store = self.store("session_reader")
        for url in urls:
            (number,) = [i for i in range(2) if f"{i:056x}" in url]
            found = store.find(url, f"{number:056x}")
            target = bytearray(found.header.size)
            store.fill(found, memoryview(target))
            assert target == self.data[url]

    def data_keys(self) -> list[bytes]:
        return sorted(self.client.keys(f"{self.keys.root}*:*:*"))

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.directory)) for path in self.directory.rglob("*"))

    def left_of(self, session: str) -> list[str]:
        """Every key, member of the metadata, and file that names a session."""
        keys = [key.decode() for key in self.client.keys(f"{self.keys.root}*")]
        members: list[bytes] = []
        for key in (self.keys.index, self.keys.pending, self.keys.leases):
            members += self.client.zrange(key, 0, -1)
        for key in (self.keys.usage, self.keys.writers, self.keys.overflows):
            members += self.client.hkeys(key)
        everything = [*keys, *(member.decode() for member in members), *self.files()]
        return sorted(each for each in everything if session in each)

    def expect_nothing(self) -> None:
        assert self.client.keys(f"{self.keys.root}*") == []
        assert self.files() == []

    def close(self) -> None:
        self._closing.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cleanup, "time", clock)
    return clock


@pytest.fixture
def namespace(
    server: Server, tmp_path: Path, clock: Clock, no_thread_left: None
) -> Iterator[Namespace]:
    namespace = Namespace(server.url, server.client, tmp_path / "overflow", clock)
    namespace.directory.mkdir()
    yield namespace
    namespace.close()
    namespace.lose_all()


# --- who is dead ---


def test_all_of_a_dead_session_goes_and_nothing_of_one_that_renews_its_leases(
    namespace: Namespace,
) -> None:
    for node in NODES:
        namespace.node(DEAD, node)
    urls = [url for node in NODES for url in namespace.node(LIVING, node)]
    before = namespace.left_of(LIVING)
    for node in NODES:
        namespace.clock.every(RENEWAL, lambda node=node: namespace.renew(LIVING, node))
    remains = namespace.gc()
    assert [each.node_name for each in remains] == [NodeName(DEAD, node) for node in NODES]
    for each in remains:
        assert each.session_is_dead
        assert (each.usage.objects, each.pending, each.files) == (2, 1, 3)
    assert namespace.left_of(DEAD) == []
    assert namespace.left_of(LIVING) == before
    namespace.expect_all(urls)


def test_after_the_only_session_no_key_and_no_file_is_left(namespace: Namespace) -> None:
    namespace.node(DEAD)
    namespace.gc()
    assert LEASE <= namespace.clock.now < LEASE + 3
    namespace.expect_nothing()


def test_to_find_is_not_to_remove(namespace: Namespace) -> None:
    urls = namespace.node(DEAD)
    before = namespace.left_of(DEAD)
    assert len(namespace.look().find()) == 1
    assert namespace.left_of(DEAD) == before
    namespace.expect_all(urls)


def test_a_lease_that_has_run_out_long_ago_is_watched_for_some_renewals_more(
    namespace: Namespace,
) -> None:
    namespace.node(DEAD)
    namespace.client.zadd(namespace.keys.leases, {f"{DEAD}:{NODES[0]}:{GCS[DEAD]}": 1})
    namespace.gc()
    assert 3 * RENEWAL <= namespace.clock.now < LEASE - 3
    namespace.expect_nothing()


@pytest.mark.parametrize("renewals", [[34], [55], [59], [20, 40]])
def test_renewals_may_stop_and_go(namespace: Namespace, renewals: list[int]) -> None:
    urls = namespace.node(LIVING)
    for seconds in renewals:
        namespace.clock.at(seconds, lambda: namespace.renew(LIVING))
    assert namespace.gc() == []
    namespace.expect_all(urls)


@pytest.mark.parametrize("jump", [-(10**12), -1000, 1000, 10**12])
def test_the_servers_clock_may_jump(namespace: Namespace, jump: int) -> None:
    """Leases are then of another time than the server's; renewals are of it again."""
    urls = namespace.node(LIVING)
    namespace.node(DEAD)
    for session in (DEAD, LIVING):
        member = f"{session}:{NODES[0]}:{GCS[session]}"
        namespace.client.zincrby(namespace.keys.leases, jump, member)
    namespace.clock.at(RENEWAL * 3, lambda: namespace.ledger.renew(owner, GCS[LIVING], new=False))
    owner = NodeName(LIVING, NODES[0])
    namespace.gc()
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)


@pytest.mark.parametrize("stood", [6.0, 1000.0])
def test_time_in_which_this_process_stood_still_does_not_count(
    namespace: Namespace, stood: float
) -> None:
    """Others may have stood still with it, as with their machine."""
    urls = namespace.node(LIVING)
    namespace.node(DEAD)

    def stand_still() -> None:
        namespace.clock.now += stood
        woken = namespace.clock.now
        namespace.clock.at(woken + 50, lambda: namespace.renew(LIVING))

    namespace.clock.at(30, stand_still)
    namespace.gc()
    assert namespace.clock.now >= 30 + stood + LEASE
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)


@pytest.mark.parametrize(
    "answer",
    [RunningSession(LIVING, frozenset(NODES)), UNKNOWN],
    ids=["the session", "who does not tell"],
)
def test_a_session_is_kept_while_its_gcs_answers(
    namespace: Namespace, answer: RunningSession
) -> None:
    urls = namespace.node(LIVING)
    before = namespace.left_of(LIVING)
    namespace.running[GCS[LIVING]] = answer
    assert namespace.gc() == []
    assert namespace.left_of(LIVING) == before
    assert any(LIVING in line and line.startswith("Kept") for line in namespace.told)
    namespace.expect_all(urls)


def test_another_session_at_a_dead_ones_address_does_not_keep_it(namespace: Namespace) -> None:
    namespace.node(DEAD)
    namespace.running[GCS[DEAD]] = RunningSession(LIVING, frozenset(NODES))
    namespace.gc()
    namespace.expect_nothing()


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "[::1]:6379", "localhost:6379"])
@pytest.mark.parametrize(
    "found",
    [None, UNKNOWN, RunningSession("session_other", frozenset())],
    ids=["refused", "who does not tell", "another session"],
)
def test_what_is_at_a_loopback_address_is_believed_only_on_the_sessions_host(
    namespace: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    address: str,
    found: RunningSession | None,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setitem(GCS, LIVING, address)
    namespace.running[address] = found
    urls = namespace.node(LIVING)
    namespace.clock.at(9 * LEASE, lambda: namespace.renew(LIVING))
    assert namespace.gc() == []
    assert namespace.clock.now >= 9 * LEASE
    namespace.expect_all(urls)
    (tmp_path / "ray" / LIVING).mkdir(parents=True)
    began = namespace.clock.now
    namespace.gc()
    assert namespace.clock.now < began + 2 * LEASE
    assert (namespace.left_of(LIVING) == []) == (found is not UNKNOWN)


def test_one_of_the_addresses_that_a_gcs_had_is_enough(namespace: Namespace) -> None:
    urls = namespace.node(LIVING)
    owner = NodeName(LIVING, NODES[0])
    namespace.ledger.renew(owner, "10.0.0.3:6379", new=True)
    namespace.running["10.0.0.3:6379"] = RunningSession(LIVING, frozenset(NODES))
    assert namespace.gc() == []
    namespace.expect_all(urls)


def test_a_session_is_kept_if_one_of_its_nodes_lives(namespace: Namespace) -> None:
    urls = [url for node in NODES for url in namespace.node(LIVING, node)]
    namespace.clock.every(RENEWAL, lambda: namespace.renew(LIVING, NODES[1]))
    assert namespace.gc() == []
    namespace.expect_all(urls)


def test_a_node_that_joins_while_its_session_is_watched_keeps_it(namespace: Namespace) -> None:
    urls = namespace.node(LIVING, NODES[0])
    namespace.clock.at(50, lambda: urls.extend(namespace.node(LIVING, NODES[1])))
    assert namespace.gc() == []
    assert len(urls) == 8
    namespace.expect_all(urls)


def test_a_session_whose_gcs_cannot_be_asked_is_dead_only_after_long(
    namespace: Namespace,
) -> None:
    namespace.running = dict.fromkeys(GCS.values(), UNREACHABLE)
    urls = namespace.node(LIVING)
    namespace.node(DEAD)
    namespace.clock.at(9 * LEASE, lambda: namespace.renew(LIVING))
    namespace.gc()
    assert namespace.clock.now >= 10 * LEASE
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)


def test_a_session_that_outlives_its_gcs_is_dead_only_after_long(namespace: Namespace) -> None:
    """Nothing listens at the address of its GCS, until there is another head."""
    urls = namespace.node(LIVING)
    namespace.store(LIVING).background.note_outliving(lambda: False)
    namespace.node(DEAD)
    namespace.clock.at(9 * LEASE, lambda: namespace.renew(LIVING))
    namespace.gc()
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)
    # It has no other head.
    began = namespace.clock.now
    namespace.gc()
    assert namespace.clock.now - began >= 10 * LEASE
    assert namespace.client.zrange(namespace.keys.leases, 0, -1) == []


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_session_whose_head_comes_back_while_it_is_watched_is_kept(
    namespace: Namespace, is_listening: bool
) -> None:
    """Also where no node of it has spilled since, so that no lease changes."""
    urls = namespace.node(LIVING)
    if is_listening:
        namespace.running[GCS[LIVING]] = UNREACHABLE
    else:
        namespace.store(LIVING).background.note_outliving(lambda: False)
    back = RunningSession(LIVING, frozenset(["cc" * 28]))
    namespace.clock.at(5 * LEASE, lambda: namespace.running.update({GCS[LIVING]: back}))
    (remains,) = namespace.gc()
    assert not remains.session_is_dead
    namespace.expect_all(urls)


def test_a_session_whose_head_is_back_elsewhere_is_kept_until_that_goes_too(
    namespace: Namespace,
) -> None:
    """No node of it has spilled since; the head has noted where its GCS is."""
    urls = namespace.node(LIVING)
    namespace.store(LIVING).background.note_outliving(lambda: False)
    note_gcs_address(namespace.config, LIVING, "10.0.0.9:6379", 1)
    namespace.running["10.0.0.9:6379"] = RunningSession(LIVING, frozenset(["cc" * 28]))
    (remains,) = namespace.gc()
    assert not remains.session_is_dead
    namespace.expect_all(urls)
    del namespace.running["10.0.0.9:6379"]
    namespace.gc()
    namespace.expect_nothing()


def test_a_session_without_any_lease_is_dead_only_after_long(namespace: Namespace) -> None:
    """As when the server has lost some of its data, and nodes are cut off from it."""
    urls = namespace.node(LIVING)
    namespace.node(DEAD)
    namespace.client.delete(namespace.keys.leases)
    store = namespace.store(LIVING)
    namespace.clock.at(9 * LEASE, lambda: namespace.come_to_life(store, LIVING))
    namespace.gc()
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)


def test_nobody_is_watched_where_there_is_nobody(namespace: Namespace) -> None:
    assert namespace.gc() == []
    assert namespace.clock.now == 0


# --- dead nodes of running sessions ---


def test_of_a_dead_node_of_a_running_session_only_what_is_half_written_goes(
    namespace: Namespace,
) -> None:
    dead, living = NODES
    urls = [url for node in NODES for url in namespace.node(LIVING, node)]
    namespace.running[GCS[LIVING]] = RunningSession(LIVING, frozenset([living]))
    (remains,) = namespace.gc()
    assert remains.node_name == NodeName(LIVING, dead)
    assert not remains.session_is_dead
    assert (remains.pending, remains.files) == (1, 1)
    assert remains.kept == len(urls) // 2
    assert remains.kept_bytes > remains.usage.stored
    assert namespace.half_written(LIVING, dead) == (0, 0)
    assert namespace.half_written(LIVING, living) == (1, 1)
    assert [*namespace.ledger.grants()] == [NodeName(LIVING, living)]
    namespace.expect_all(urls)
    assert all(each.is_empty for each in namespace.gc())


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("session_is_dead", [True, False])
def test_what_was_removed_while_its_writer_was_stopped_is_not_reported_as_stored(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, size: int, session_is_dead: bool
) -> None:
    """Its node was taken for dead; it goes on where it was, with all chunks written."""
    if not session_is_dead:
        namespace.running[GCS[LIVING]] = RunningSession(LIVING, frozenset())
    store = namespace.store(LIVING)
    namespace.come_to_life(store, LIVING)
    settlements = Ledger.settlements

    def stopped(self: Ledger, *args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        self.totals()  # over the same connection: all before has been carried out by then
        assert namespace.data_keys() != []
        monkeypatch.setattr(cleanup, "time", namespace.clock)
        namespace.gc()
        assert namespace.data_keys() == []
        return settlements(self, *args, **options)

    monkeypatch.setattr(Ledger, "settlements", stopped)
    urls, failure = store.put([source(bytes(size))])
    assert urls == []
    assert isinstance(failure, LostObjectError)
    assert namespace.data_keys() == []
    assert namespace.half_written(LIVING, NODES[0]) == (0, 0)
    assert namespace.ledger.usages() == namespace.ledger.grants() == {}


# --- faults while it watches and removes ---


@pytest.fixture
def rig(tmp_path: Path, clock: Clock, no_thread_left: None) -> Iterator[tuple[Rig, Namespace]]:
    rig = Rig(tmp_path / "server")
    directory = tmp_path / "overflow"
    directory.mkdir()
    namespace = Namespace(f"valkey://127.0.0.1:{rig.proxy.port}/0", rig.client, directory, clock)
    yield rig, namespace
    namespace.close()
    rig.close()


@pytest.mark.parametrize(
    "fault", [resets_connections, is_restarted_and_has_its_snapshot], ids=lambda f: f.__name__
)
def test_the_watch_begins_again_when_the_server_was_away(
    rig: tuple[Rig, Namespace], fault: Any
) -> None:
    """Meanwhile nobody could renew, and it may take each a while to find out that one can."""
    faulty, namespace = rig
    urls = namespace.node(LIVING)
    namespace.node(DEAD)

    def strike() -> None:
        with fault(faulty):
            pass
        namespace.client = faulty.client

    namespace.clock.at(50, strike)
    namespace.clock.at(50 + LEASE - 5, lambda: namespace.renew(LIVING))
    namespace.gc()
    assert namespace.clock.now >= 50 + LEASE
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)


def test_a_session_that_comes_to_life_before_its_remains_are_removed_keeps_them(
    namespace: Namespace,
) -> None:
    urls = namespace.node(LIVING)
    before = namespace.left_of(LIVING)
    look = namespace.look()
    remains = look.find()
    assert len(remains) == 1
    namespace.renew(LIVING)
    look.remove(remains)
    assert namespace.left_of(LIVING) == before
    namespace.expect_all(urls)


def test_a_session_that_comes_to_life_while_it_is_removed_keeps_the_rest(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = namespace.node(LIVING)
    look = namespace.look()
    remains = look.find()
    remove = ValkeyTier.remove_objects

    def and_it_comes_to_life(self: ValkeyTier, names: Any, **options: Any) -> None:
        remove(self, names, **options)
        namespace.renew(LIVING)

    monkeypatch.setattr(ValkeyTier, "remove_objects", and_it_comes_to_life)
    look.remove(remains)
    namespace.expect_all(urls)
    assert namespace.half_written(LIVING, NODES[0]) == (0, 1)


def test_a_session_that_comes_to_life_while_its_files_are_removed_keeps_those_of_other_nodes(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = {node: namespace.node(LIVING, node) for node in NODES}
    look = namespace.look()
    remains = look.find()
    destroy = OverflowTier.destroy

    def and_it_comes_to_life(self: OverflowTier, node_name: NodeName) -> int:
        count = destroy(self, node_name)
        namespace.renew(LIVING, NODES[1])
        return count

    monkeypatch.setattr(OverflowTier, "destroy", and_it_comes_to_life)
    assert look.remove(remains) == []
    namespace.expect_all([url for url in urls[NODES[1]] if url.startswith("overflow:")])
    assert LIVING in namespace.ledger.overflows()
    assert {lease.node_name.node for lease in namespace.ledger.leases()} == {*NODES}


def test_a_session_that_comes_to_life_after_its_files_were_removed_keeps_its_leases_and_place(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.node(LIVING)
    look = namespace.look()
    remains = look.find()
    destroy = OverflowTier.destroy

    def and_it_comes_to_life(self: OverflowTier, node_name: NodeName) -> int:
        count = destroy(self, node_name)
        namespace.renew(LIVING)
        return count

    monkeypatch.setattr(OverflowTier, "destroy", and_it_comes_to_life)
    assert look.remove(remains) == []
    assert [lease.node_name.node for lease in namespace.ledger.leases()] == [NODES[0]]
    token = namespace.ledger.overflows()[LIVING]
    assert [file for file in namespace.files() if file.endswith(("ending", token))] == [
        f"{namespace.keys.root.rstrip(':')}/{LIVING}/place.{token}"
    ]


class Killed(BaseException):
    pass


def test_a_clean_up_that_is_killed_anywhere_is_completed_by_the_next(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    survived = 0
    while True:
        for node in NODES:
            namespace.node(DEAD, node)
        look = namespace.look()
        remains = look.find()
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            _kill_after(survived, patched)
            look.remove(remains)
            break
        namespace.clock.now = 0
        namespace.gc()
        namespace.expect_nothing()
        survived += 1
    assert survived > 20
    namespace.expect_nothing()


def _kill_after(steps: int, patched: pytest.MonkeyPatch) -> None:
    """Have everything that goes to the server or the overflow fail from the given step on."""
    left = [steps]

    def mortal(function: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **options)

        return step

    for kind, name in [
        (Link, "run"),
        (OverflowTier, "begin_end"),
        (OverflowTier, "destroy"),
        (OverflowTier, "destroy_session"),
        (OverflowTier, "remove_parts"),
    ]:
        patched.setattr(kind, name, mortal(getattr(kind, name)))


def test_two_clean_ups_at_once_do_no_harm(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in NODES:
        namespace.node(DEAD, node)
    one, other = namespace.look(), namespace.look()
    of_one, of_other = one.find(), other.find()
    assert of_one == of_other
    remove = ValkeyTier.remove_objects

    def interrupted(self: ValkeyTier, names: Any, **options: Any) -> None:
        monkeypatch.undo()
        other.remove(of_other)
        remove(self, names, **options)

    monkeypatch.setattr(ValkeyTier, "remove_objects", interrupted)
    one.remove(of_one)
    namespace.expect_nothing()


def test_a_node_may_be_destroyed_while_it_is_removed(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.node(DEAD)
    look = namespace.look()
    remains = look.find()
    remove = ValkeyTier.remove_objects

    def interrupted(self: ValkeyTier, names: Any, **options: Any) -> None:
        monkeypatch.undo()
        namespace.store(DEAD).destroy(lambda pid: False)
        remove(self, names, **options)

    monkeypatch.setattr(ValkeyTier, "remove_objects", interrupted)
    look.remove(remains)
    namespace.gc()
    namespace.expect_nothing()


def test_the_place_that_a_session_agreed_on_is_removed_if_nothing_else_is_left(
    namespace: Namespace,
) -> None:
    store = namespace.store(DEAD)
    store.join_overflow()
    store.recover(lambda pid: True)
    assert namespace.left_of(DEAD) != []
    assert namespace.look().sessions() == {DEAD}
    assert namespace.gc() == []
    namespace.expect_nothing()


def test_what_an_overflow_has_of_a_session_of_another_server_is_kept_unless_it_is_named(
    namespace: Namespace,
) -> None:
    with (
        valkey_server() as server,
        contextlib.closing(
            Namespace(server.url, server.client, namespace.directory, namespace.clock)
        ) as other,
    ):
        namespace.node(DEAD)
        urls = other.node(LIVING)
        before = other.left_of(LIVING)
        assert namespace.look().sessions() == {DEAD}
        assert {each.node_name.session for each in namespace.gc()} == {DEAD}
        (told,) = namespace.told
        assert re.fullmatch(f"Kept: the files of {LIVING} in .* give its whole name .*", told)
        assert namespace.left_of(DEAD) == []
        assert other.left_of(LIVING) == before
        other.expect_all(urls)
        look = namespace.look()
        # As much of a name is no name.
        assert look.find(named=LIVING[:-1]) == []
        look.remove(look.find(named=LIVING))
        assert [file for file in namespace.files() if LIVING in file] == []
    namespace.expect_nothing()


def test_a_dead_session_whose_overflow_is_not_mounted_is_found_when_it_is(
    namespace: Namespace, tmp_path: Path
) -> None:
    namespace.node(DEAD)
    away = namespace.directory.rename(tmp_path / "away")
    namespace.directory.mkdir()
    look = namespace.look()
    (removed,) = look.remove(look.find())
    assert (removed.usage.objects, removed.files) == (2, 0)
    assert look.unavailable is not None
    assert f"has nothing of session {DEAD} any more" in look.unavailable.message
    assert namespace.data_keys() == []
    assert namespace.ledger.overflows().keys() == {DEAD}
    namespace.directory.rmdir()
    away.rename(namespace.directory)
    look = namespace.look()
    assert [each.files for each in look.remove(look.find())] == [3]
    assert look.unavailable is None
    namespace.expect_nothing()


def test_a_dead_session_whose_files_somebody_has_removed_is_forgotten_if_it_is_named(
    namespace: Namespace,
) -> None:
    namespace.node(DEAD)
    for path in namespace.directory.iterdir():
        shutil.rmtree(path)
    namespace.gc()
    assert namespace.ledger.overflows().keys() == {DEAD}
    look = namespace.look()
    look.remove(look.find(named=DEAD))
    assert look.unavailable is None
    namespace.expect_nothing()


def test_a_session_that_gets_its_place_again_while_it_ends_leaves_nothing(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an IO worker that writes to its overflow just then."""
    namespace.node(DEAD)
    unsign = OverflowTier.unsign

    def and_it_is_taken_again(self: OverflowTier, session: str, token: str) -> None:
        unsign(self, session, token)
        namespace.ledger.agree_on_overflow(session, token)

    monkeypatch.setattr(OverflowTier, "unsign", and_it_is_taken_again)
    with contextlib.closing(EndingSession(namespace.config, DEAD, 5)) as ending:
        assert ending.remove(lambda node: True, lambda pid: False)
    namespace.expect_nothing()


def test_a_session_that_ends_while_its_overflow_is_not_mounted_says_so_and_ends_when_it_is(
    namespace: Namespace, tmp_path: Path
) -> None:
    for node in NODES:
        namespace.node(DEAD, node)
    away = namespace.directory.rename(tmp_path / "away")
    namespace.directory.mkdir()
    # One of them was on this host.
    ending = EndingSession(namespace.config, DEAD, 5)
    with contextlib.closing(ending):
        with pytest.raises(OverflowUnavailableError, match=f"has nothing of session {DEAD}"):
            ending.remove(NODES[0].__eq__, lambda pid: False)
        assert namespace.ledger.overflows().keys() == {DEAD}
        namespace.directory.rmdir()
        away.rename(namespace.directory)
        assert ending.remove(lambda node: True, lambda pid: False)
    namespace.expect_nothing()


def test_a_place_is_kept_if_its_session_gets_a_lease(namespace: Namespace) -> None:
    store = namespace.store(LIVING)
    store.join_overflow()
    store.recover(lambda pid: True)
    before = namespace.left_of(LIVING)
    namespace.clock.at(20, lambda: namespace.come_to_life(store, LIVING))
    namespace.gc()
    assert {*before} < {*namespace.left_of(LIVING)}


def test_what_is_left_of_a_session_is_found_with_and_without_the_overflow(
    namespace: Namespace,
) -> None:
    namespace.node(DEAD)
    del namespace.params["overflow_uri"]
    namespace.config = Config.load(namespace.params, {})
    namespace.gc()
    # By which the files are found with the overflow.
    assert namespace.client.keys(f"{namespace.keys.root}*") == [namespace.keys.overflows.encode()]
    kept = f"Kept: the files of {DEAD} in its overflow. Give its overflow_uri"
    assert namespace.told == [kept]
    namespace.params["overflow_uri"] = namespace.directory.as_uri()
    namespace.config = Config.load(namespace.params, {})
    namespace.gc()
    namespace.expect_nothing()


def test_an_overflow_that_is_away_holds_up_nothing_in_valkey_and_is_found_when_it_is_back(
    namespace: Namespace, tmp_path: Path
) -> None:
    namespace.node(DEAD)
    urls = namespace.node(LIVING)
    away = namespace.directory.rename(tmp_path / "away")
    namespace.directory.write_bytes(b"not a directory")
    namespace.clock.every(RENEWAL, lambda: namespace.renew(LIVING))
    look = namespace.look()
    found = look.find(namespace.told.append)
    removed = look.remove(found)
    assert [(each.node_name.session, each.usage.objects, each.files) for each in removed] == [
        (DEAD, 2, 0)
    ]
    assert look.unavailable is not None
    assert any("Kept: all data in the overflow" in note for note in namespace.told)
    assert [key for key in namespace.data_keys() if DEAD.encode() in key] == []
    assert DEAD in namespace.ledger.overflows()
    namespace.directory.unlink()
    away.rename(namespace.directory)
    namespace.clock.every(RENEWAL, lambda: namespace.renew(LIVING))
    look = namespace.look()
    assert [each.files for each in look.remove(look.find())] == [3]
    assert look.unavailable is None
    assert namespace.left_of(DEAD) == []
    namespace.expect_all(urls)


def test_a_recount_corrects_everybodys_usage(namespace: Namespace) -> None:
    namespace.node(DEAD)
    namespace.node(LIVING)
    right = {owner: usage[:3] for owner, usage in namespace.ledger.usages().items()}
    namespace.client.hset(namespace.keys.usage, f"{DEAD}:{NODES[0]}", "9 9 9 9")
    namespace.client.hdel(namespace.keys.usage, f"{LIVING}:{NODES[0]}")
    namespace.client.set(namespace.keys.totals, "9 9 9 9 9 9")
    namespace.look().recount()
    stored = sum(usage[2] for usage in right.values())
    assert namespace.ledger.totals()[:5] == (4, 2 * (SMALL + LARGE), stored, 10, 0)
    assert {owner: usage[:3] for owner, usage in namespace.ledger.usages().items()} == right


# --- what runs at an address ---


def test_where_nothing_listens_nothing_runs() -> None:
    assert running_at(f"127.0.0.1:{dead_port()}") is None


@pytest.mark.parametrize("address", ["", "nowhere", "nowhere.invalid:6379"])
def test_a_host_that_is_not_known_cannot_be_asked(address: str) -> None:
    assert running_at(address) is UNREACHABLE


def test_what_does_not_answer_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "ANSWER_TIMEOUT", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert running_at(f"127.0.0.1:{listener.getsockname()[1]}") is UNKNOWN


def test_a_server_of_another_kind_does_not_tell(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "ANSWER_TIMEOUT", 4.0)
    assert running_at(f"127.0.0.1:{server.port}") is UNKNOWN


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose modules must not be imported; returns what exists if they are."""
    directory, imported = tmp_path / "trapped", tmp_path / "imported"
    directory.mkdir()
    for module in ("json", "click", "runpy", "ray", "ray_valkey_spill"):
        trap = f"import pathlib; pathlib.Path({str(imported)!r}).touch()"
        (directory / f"{module}.py").write_text(trap)
    monkeypatch.chdir(directory)
    return imported


@pytest.mark.parametrize("safe_path", [True, False])
def test_no_module_is_taken_from_the_working_directory(
    trapped: Path, monkeypatch: pytest.MonkeyPatch, safe_path: bool
) -> None:
    if safe_path:
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
    result = subprocess.run(
        module_command("ray_valkey_spill", "gc", "--help"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "--dry-run" in result.stdout, result.stderr
    assert not trapped.exists()


def test_to_ask_a_gcs_imports_nothing_from_the_working_directory(
    trapped: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "ANSWER_TIMEOUT", 10.0)
    assert running_at(f"127.0.0.1:{server.port}") is UNKNOWN
    assert not trapped.exists()


# --- with Ray ---

# A cluster of its own that spills more than `max_bytes`, and says so.
_DOOMED = """
import time
refs = [ray.put(np.frombuffer(np.random.default_rng(i).bytes(4 << 20), "u1")) for i in range(40)]
print("spilled", flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def doomed_cluster(params: dict[str, Any], directory: Path) -> Iterator[Callable[[], None]]:
    """Yields what kills all of its processes."""
    log = directory / "doomed"
    with log.open("wb") as out:
        script = starting_ray(system_config(**params)) + _DOOMED
        driver = subprocess.Popen([sys.executable, "-c", script], stdout=out)

    def kill_all() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(driver.pid)
            everybody = [process, *process.children(recursive=True)]
            for each in everybody:
                each.suspend()  # so that nobody notices the others' deaths and cleans up
            end_guardians(driver.pid)
            for each in everybody:
                each.kill()
            psutil.wait_procs(everybody, timeout=PATIENCE)
        driver.wait()

    try:
        wait_until(lambda: driver.poll() is None and b"spilled" in log.read_bytes())
        yield kill_all
    finally:
        kill_all()


def array(number: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(np.random.default_rng(number).bytes(4 * MIB), np.uint8)


def expect_arrays(refs: list[Any]) -> None:
    for number, ref in enumerate(refs):
        assert np.array_equal(ray.get(ref), array(number))


@pytest.mark.slow
def test_after_everything_of_a_cluster_was_killed_one_clean_up_leaves_nothing_but_the_livings(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The living are known by their leases alone here: nobody is asked."""
    overflow = tmp_path / "overflow"
    overflow.mkdir()
    params = {"url": server.url, "overflow_uri": overflow.as_uri()}
    monkeypatch.setattr(cleanup, "LEASE", 1.6 * RENEWAL)
    monkeypatch.setattr(cleanup, "CONFIRMATION", 1.6 * RENEWAL)
    namespace = Namespace(server.url, server.client, overflow, Clock())
    with local_ray(**params, max_bytes=20 * MIB):
        living = ray._private.worker._global_node.session_name
        refs = [ray.put(array(i)) for i in range(40)]
        with doomed_cluster({**params, "max_bytes": 40 * MIB}, tmp_path) as kill_all:
            (dead,) = {owner.session for owner in namespace.ledger.node_names()} - {living}
            kill_all()
            for session in (dead, living):
                assert namespace.left_of(session) != []
            assert any(dead in file for file in namespace.files())
            (remains,) = namespace.gc()
        assert remains.node_name.session == dead
        assert remains.usage.objects > 0 and remains.files > 0
        assert namespace.left_of(dead) == []
        expect_arrays(refs)
        del refs
    namespace.close()
    wait_until(lambda: server.our_keys() == [])
    assert namespace.files() == []


@pytest.mark.slow
def test_a_running_session_is_known_by_its_gcs_and_so_are_its_dead_nodes(
    server: Server, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its IO workers are stopped while it is watched, and renew nothing."""
    namespace = Namespace(server.url, server.client, tmp_path, clock)
    with cluster(server.url) as made:
        session = ray._private.worker._global_node.session_name
        head, other = (node.node_id for node in made.list_all_nodes())

        @ray.remote(resources={"node1": 1})
        def array_there(number: int) -> Any:
            return np.frombuffer(np.random.default_rng(number).bytes(4 * MIB), np.uint8)

        refs = [ray.put(array(i)) for i in range(40)]
        theirs = [array_there.remote(i) for i in range(40)]
        ray.wait(theirs, num_returns=len(theirs), fetch_local=False)
        wait_until(lambda: len(namespace.ledger.usages()) == 2)

        with everybody_stopped(io_workers()):
            look = CleanUp(namespace.config, running_at)
            assert look.find(namespace.told.append) == []
            look.close()
        assert len([line for line in namespace.told if "alive according to its GCS" in line]) == 2
        assert running_at(made.address) == RunningSession(session, frozenset([head, other]))
        with monkeypatch.context() as patched:
            patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
            patched.setattr(gcs, "ANSWER_TIMEOUT", 10.0)
            # Rays before 2.52 ask for no token.
            answers = Version(ray.__version__) < Version("2.52")
            assert (running_at(made.address) is UNKNOWN) != answers

        kill_node(made, 1)
        assert running_at(made.address) == RunningSession(session, frozenset([head]))
        namespace.half_write(session, other)
        finished = list(namespace.ledger.stored(NodeName(session, other)))
        look = CleanUp(namespace.config, running_at)
        (remains,) = look.find()
        look.remove([remains])
        look.close()
        assert remains.node_name == NodeName(session, other)
        assert not remains.session_is_dead
        assert namespace.half_written(session, other) == (0, 0)
        assert list(namespace.ledger.stored(NodeName(session, other))) == finished != []
        expect_arrays(refs)
        of_the_dead = {entry.name.object_id for page in finished for entry in page}
        for number, ref in enumerate(theirs):
            if ref.hex() in of_the_dead:
                assert np.array_equal(ray.get(ref), array(number))
        del ref, refs, theirs
    namespace.close()
    namespace.lose_all()


@contextlib.contextmanager
def everybody_stopped(processes: list[psutil.Process]) -> Iterator[None]:
    assert processes
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
