"""What nobody can need goes, on the word of owners; what is in doubt stays. Over real servers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.clock import Clock
from support.owners import Oracle
from support.samples import METADATA, noise, object_id
from support.servers import Server
from support.stores import Store
from support.topologies import cluster_servers

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import OverflowUnavailableError, ServerError
from ray_valkey_spill.format.names import Keyspace, NodeName
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.store.cleanup import LEASE
from ray_valkey_spill.store.observer import Observer, Reason
from ray_valkey_spill.store.reclaim import (
    Left,
    Pace,
    Reclaimer,
    Verdict,
    reclaim_of_dead_nodes,
)
from ray_valkey_spill.tiers.ledger import Ledger, link_to

SESSION = "session_1"
FIRST, SECOND, THIRD = ("aa" * 28, "bb" * 28, "cc" * 28)
SIZES = [100, 30_000]  # inline, and in chunks
# No age, since the objects of a test are new.
PACE = Pace(age=0.0)
REFERENCED, UNREFERENCED = Verdict.REFERENCED, Verdict.UNREFERENCED


class Counts(Observer):
    def __init__(self) -> None:
        self.objects: dict[Reason, int] = {}
        self.stored = 0

    def reclaimed(self, reason: Reason, objects: int, stored: int) -> None:
        self.objects[reason] = self.objects.get(reason, 0) + objects
        self.stored += stored


class Session:
    """Nodes of a session, with objects of which each has its number as its id."""

    def __init__(self, contents: Any, params: Mapping[str, Any], clock: Clock) -> None:
        self.contents = contents
        self.clock = clock
        self.config = Config.load({"chunk_size": 10_000, "retry_timeout": 5, **params}, {})
        self.keys = Keyspace.of(self.config)
        self.counts = Counts()
        self.oracle = Oracle(FIRST, SECOND, THIRD)
        self.nodes = {
            node: Store(self.config, SESSION, node, self.counts) for node in (FIRST, SECOND, THIRD)
        }
        self.urls: dict[int, str] = {}

    def put(self, node: str, numbers: Sequence[int]) -> None:
        store = self.nodes[node]
        store.renew_lease("", lambda: False)
        if self.config.overflow_uri:
            store.join_overflow()
        sources = [
            SourceObject(
                object_id(n), METADATA, b"owner", memoryview(noise(SIZES[n % len(SIZES)], n))
            )
            for n in numbers
        ]
        urls, failure = store.put(sources)
        assert failure is None
        self.urls |= dict(zip(numbers, urls))
        store.give_back()

    def reclaimer(self, node: str = SECOND, pace: Pace = PACE) -> Reclaimer:
        return self.nodes[node].background.reclaimer(self.oracle, pace, lambda: self.clock.now)

    def steps(self, reclaimer: Reclaimer, count: int = 12) -> None:
        """Steps as a keeper does them, ten seconds apart."""
        for _ in range(count):
            reclaimer.step()
            self.clock.now += 10.0

    def steps_past_failures(self, reclaimer: Reclaimer, count: int) -> int:
        """As `steps`; returns in how many of them the overflow could not be used."""
        failures = 0
        for _ in range(count):
            try:
                self.steps(reclaimer, 1)
            except OverflowUnavailableError:
                failures += 1
                self.clock.now += 10.0
        return failures

    def answer(self, verdict: Verdict, numbers: Sequence[int]) -> None:
        self.oracle.answers |= {object_id(n): verdict for n in numbers}

    def kill(self, *nodes: str) -> None:
        """Let nodes be dead to the GCS, and have been silent for longer than a lease."""
        assert self.oracle.alive is not None
        self.oracle.alive |= dict.fromkeys(nodes, False)
        client, leases = self.contents.client, self.keys.leases
        for member, renewed in client.zrange(leases, 0, -1, withscores=True):
            if member.split(b":")[1].decode() in nodes:
                client.zadd(leases, {member: renewed - 1000 * (LEASE + 1)})

    @property
    def left(self) -> set[int]:
        """The numbers of the objects of which there is anything, in either tier."""
        keys = [key.decode() for key in self.contents.our_keys(self.keys.root)]
        found = {key.split(":")[5].split(".")[0] for key in keys if key.count(":") > 4}
        if self.config.overflow_uri:
            directory = Path(self.config.overflow_uri.removeprefix("file://"))
            found |= {
                path.name.split(".")[0]
                for path in directory.rglob("*")
                if path.is_file() and not path.name.startswith("place.")
            }
        return {int(each, 16) for each in found}

    def expect_readable(self, numbers: Sequence[int]) -> None:
        for n in numbers:
            found = self.nodes[THIRD].find(self.urls[n], object_id(n))
            target = bytearray(found.header.size)
            self.nodes[THIRD].fill(found, memoryview(target))
            assert target == noise(SIZES[n % len(SIZES)], n)

    def close(self) -> None:
        for store in self.nodes.values():
            store.destroy(lambda pid: False)
            store.close()


@contextlib.contextmanager
def a_session(contents: Any, params: Mapping[str, Any], clock: Clock) -> Iterator[Session]:
    session = Session(contents, params, clock)
    try:
        yield session
    finally:
        session.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def session(server: Server, clock: Clock) -> Iterator[Session]:
    with a_session(server, {"url": server.url}, clock) as made:
        yield made


def keys_file(directory: Path) -> str:
    path = directory / "keys"
    path.write_text(os.urandom(32).hex() + "\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture(params=["plain", "sealed", "overflow", "cluster"])
def any_session(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Session]:
    with contextlib.ExitStack() as stack:
        if request.param == "cluster":
            contents = stack.enter_context(cluster_servers(tmp_path))
        else:
            contents = request.getfixturevalue("server")
        params = {"url": contents.url}
        if request.param == "sealed":
            params["encryption_key_file"] = keys_file(tmp_path)
        if request.param == "overflow":
            params |= {"overflow_uri": (tmp_path / "overflow").as_uri(), "max_bytes": 0}
        yield stack.enter_context(a_session(contents, params, clock))


def test_of_a_dead_node_all_goes_that_nobody_can_need(any_session: Session) -> None:
    session = any_session
    session.put(FIRST, range(12))
    session.put(SECOND, range(12, 20))
    session.kill(FIRST)
    session.answer(UNREFERENCED, range(4))
    session.answer(Verdict.OWNER_DEAD, range(4, 8))
    session.answer(Verdict.UNKNOWN, range(8, 10))
    reclaimer = session.reclaimer()
    session.steps(reclaimer)
    assert session.left == {*range(8, 20)}
    session.expect_readable(range(8, 20))
    assert {owned.owner_address for owned in session.oracle.asked} == {b"owner"}
    assert session.counts.objects == {"unreferenced": 4, "owner_dead": 4}
    assert session.counts.stored > 4 * 30_000
    assert reclaimer.of_dead_nodes
    session.answer(UNREFERENCED, range(12))
    session.steps(reclaimer, 20)
    assert session.left == {*range(12, 20)}
    assert reclaimer.of_dead_nodes == 0


def test_one_answer_alone_is_not_believed(session: Session) -> None:
    session.put(FIRST, range(4))
    session.kill(FIRST)
    session.answer(UNREFERENCED, range(4))
    reclaimer = session.reclaimer()
    reclaimer.step()
    assert session.left == {*range(4)}
    # The owner has learnt of two of them meanwhile, and the second answer counts.
    session.answer(REFERENCED, range(2))
    session.steps(reclaimer)
    assert session.left == {0, 1}


def test_an_owner_that_misses_its_second_answer_is_asked_again(session: Session) -> None:
    """A pass over all objects, to find them anew, would take long."""
    session.put(FIRST, range(3))
    session.kill(FIRST)
    session.answer(UNREFERENCED, range(3))
    reclaimer = session.reclaimer()
    session.steps(reclaimer, 2)
    session.answer(Verdict.UNKNOWN, range(3))
    session.steps(reclaimer, 3)
    assert session.left == {0, 1, 2}
    session.answer(UNREFERENCED, [0])
    session.answer(REFERENCED, [1])
    session.steps(reclaimer, 2)
    assert session.left == {1, 2}
    # One that never answers is forgotten, and found anew.
    session.clock.now += 600
    session.steps(reclaimer, 1)
    session.answer(UNREFERENCED, [2])
    session.steps(reclaimer, 1)
    assert session.left == {1, 2}
    session.steps(reclaimer)
    assert session.left == {1}


def test_a_tier_that_fails_does_not_hold_up_the_other(
    server: Server, clock: Clock, tmp_path: Path
) -> None:
    directory = tmp_path / "overflow"
    params = {"url": server.url, "overflow_uri": directory.as_uri()}
    with a_session(server, params, clock) as session:
        session.put(FIRST, range(3))
        full = {**params, "max_bytes": 0}
        with a_session(server, full, clock) as other:
            other.put(FIRST, range(3, 6))
            session.kill(FIRST)
            session.oracle.usual = UNREFERENCED
            reclaimer = session.reclaimer()
            session.steps(reclaimer, 2)
            assert session.left == {*range(6)}
            hidden = directory.rename(tmp_path / "hidden")
            with pytest.raises(OverflowUnavailableError):
                reclaimer.step()
            assert session.left == set()
            hidden.rename(directory)
            session.steps(reclaimer, 4)
            assert session.left == set()


def test_an_overflow_that_is_away_does_not_hold_up_what_is_in_valkey(
    server: Server, clock: Clock, tmp_path: Path
) -> None:
    """From the first pass on: it is just then that room in Valkey is needed."""
    directory = tmp_path / "overflow"
    params = {"url": server.url, "overflow_uri": directory.as_uri()}
    with a_session(server, params, clock) as session:
        session.put(FIRST, range(3))
        session.put(SECOND, range(3, 6))
        with a_session(server, {**params, "max_bytes": 0}, clock) as other:
            other.put(FIRST, range(6, 9))
            session.kill(FIRST, SECOND)
            session.oracle.usual = UNREFERENCED
            session.put(THIRD, [])
            hidden = directory.rename(tmp_path / "hidden")
            directory.touch()
            reclaimer = session.reclaimer(THIRD)
            assert session.steps_past_failures(reclaimer, 6)
            directory.unlink()
            hidden.rename(directory)
            assert session.left == {6, 7, 8}
            session.steps(reclaimer, 20)
            assert session.left == set()
            assert not any(key for key in session.contents.our_keys() if FIRST.encode() in key)


def test_a_file_that_cannot_be_used_does_not_hold_up_others(
    server: Server, clock: Clock, tmp_path: Path
) -> None:
    """Neither of the same node nor of others. Faked: no disk here fails for a single file."""
    params = {
        "url": server.url,
        "overflow_uri": (tmp_path / "overflow").as_uri(),
        "max_bytes": 0,
    }
    with a_session(server, params, clock) as session:
        session.put(FIRST, range(4))
        session.put(SECOND, range(4, 8))
        session.kill(FIRST, SECOND)
        session.oracle.usual = UNREFERENCED
        session.put(THIRD, [])
        tier = session.nodes[THIRD].overflow
        stat, remove = tier.stat, tier.remove

        def failing(number: int, use: Any) -> Any:
            def fail(place: Any, *token: Any) -> Any:
                if place.name.object_id == object_id(number):
                    raise OverflowUnavailableError("the disk is broken", "Replace it")
                return use(place, *token)

            return fail

        tier.stat, tier.remove = failing(0, stat), failing(5, remove)
        reclaimer = session.reclaimer(THIRD)
        assert session.steps_past_failures(reclaimer, 20)
        assert session.left == {0, 5}
        assert session.counts.objects == {"unreferenced": 6}
        tier.stat, tier.remove = stat, remove
        session.steps(reclaimer, 20)
        assert session.left == set()


@contextlib.contextmanager
def no_more_clients(session: Session) -> Iterator[None]:
    """With a server that takes none, and all that the nodes had closed."""
    client = session.contents.client
    client.config_set("maxclients", 1)
    try:
        for store in session.nodes.values():
            store.close()
        yield
    finally:
        client.config_set("maxclients", 1000)


def test_suspects_are_asked_for_again_after_a_failure(session: Session) -> None:
    session.put(FIRST, range(3))
    session.kill(FIRST)
    session.answer(UNREFERENCED, range(3))
    reclaimer = session.reclaimer()
    session.steps(reclaimer, 2)
    with no_more_clients(session), pytest.raises(ServerError):
        reclaimer.step()
    session.steps(reclaimer, 3)
    assert session.left == set()


def test_without_a_gcs_that_answers_nothing_of_other_nodes_goes(session: Session) -> None:
    session.put(FIRST, range(4))
    session.oracle.usual = Verdict.OWNER_DEAD
    session.oracle.alive = None
    session.steps(session.reclaimer())
    assert session.left == {*range(4)}


def test_a_node_asks_for_its_own_objects_which_are_older_than_a_while(session: Session) -> None:
    session.put(SECOND, range(10))
    session.put(FIRST, range(10, 14))
    session.answer(UNREFERENCED, [3, 4, 11])
    session.answer(Verdict.OWNER_DEAD, [5])
    session.steps(session.reclaimer(pace=dataclasses.replace(PACE, age=3600)))
    assert session.left == {*range(14)}
    # A slice of three at a time; those of the living node FIRST are not asked for.
    session.steps(session.reclaimer(pace=dataclasses.replace(PACE, own=3)), 30)
    assert session.left == {*range(14)} - {3, 4, 5}


def test_a_step_asks_for_a_slice_of_its_own_and_of_the_dead_nodes_objects(
    session: Session,
) -> None:
    """So that it never takes a core for long, however many objects there are."""
    session.put(FIRST, range(20))
    session.put(SECOND, range(20, 30))
    session.kill(FIRST)
    reclaimer = session.reclaimer(pace=dataclasses.replace(PACE, own=2, of_dead=3))
    asked: set[int] = set()
    for _ in range(12):
        session.oracle.asked.clear()
        session.steps(reclaimer, 1)
        numbers = [int(owned.object_id, 16) for owned in session.oracle.asked]
        assert len(numbers) <= 2 + 3
        asked |= {*numbers}
    assert asked == {*range(30)}


def test_slices_keep_their_distance_however_often_a_keeper_makes_a_round(session: Session) -> None:
    """As where spills fail, each of which wakes it."""
    session.put(SECOND, range(4))
    reclaimer = session.reclaimer(pace=dataclasses.replace(PACE, own=1))
    for _ in range(20):
        reclaimer.step()
        session.clock.now += 1.0
    assert len(session.oracle.asked) == 3


def test_nodes_that_are_dead_for_long_cost_no_connection(session: Session) -> None:
    """What they were writing is removed once, and what they had stored is still needed."""
    dead = [f"{number:056x}" for number in range(5)]
    for number, node in enumerate(dead):
        session.nodes[node] = Store(session.config, SESSION, node, session.counts)
        session.put(node, [number])
    session.put(SECOND, [])
    session.kill(*dead)
    reclaimer = session.reclaimer()
    session.steps(reclaimer)

    def connections() -> int:
        stats = session.contents.client.info("stats")
        of_all = stats.values() if isinstance(next(iter(stats.values())), dict) else [stats]
        return sum(each["total_connections_received"] for each in of_all)

    before = connections()
    session.steps(reclaimer)
    # Another server's may be the one that looks.
    assert connections() - before <= 1
    assert session.left == {*range(5)}


def test_dead_nodes_count_for_a_slice_also_where_they_have_nothing(session: Session) -> None:
    dead = [f"{number:056x}" for number in range(6)]
    for node in dead:
        session.nodes[node] = Store(session.config, SESSION, node, session.counts)
        session.put(node, [])
    session.put(SECOND, [])
    session.kill(*dead)
    # Each counts for fifty objects.
    reclaimer = session.reclaimer(pace=dataclasses.replace(PACE, of_dead=100, settling=0.0))
    counts = []
    with contextlib.closing(link_to(session.config)) as link:
        for _ in range(4):
            session.steps(reclaimer, 1)
            names = Ledger(link, session.keys).node_names()
            counts.append(sum(name.node in dead for name in names))
    assert counts == [4, 2, 0, 0]


@pytest.mark.parametrize(("seconds", "passes"), [(0.1, 11), (5.0, 6)])
def test_the_longer_a_pass_over_dead_nodes_takes_the_longer_the_next_one_waits(
    session: Session, monkeypatch: pytest.MonkeyPatch, seconds: float, passes: int
) -> None:
    """Here in 220 seconds: at least 15 between two, and eight times what one takes of a core."""
    session.put(FIRST, range(3))
    session.put(SECOND, [])
    session.kill(FIRST)
    monkeypatch.setattr(time, "thread_time", itertools.count(0.0, seconds).__next__)
    session.steps(session.reclaimer(), 22)
    assert len(session.oracle.asked) == 3 * passes


def test_only_the_copy_that_was_asked_for_goes(session: Session) -> None:
    """The same object, spilled again, has another name; and what is pending is not asked for."""
    session.put(FIRST, [1])
    session.kill(FIRST)
    session.answer(UNREFERENCED, [1])
    reclaimer = session.reclaimer()
    reclaimer.step()
    old = session.urls[1]
    session.put(THIRD, [1])
    session.steps(reclaimer)
    names = [key.decode() for key in session.contents.our_keys() if object_id(1) in key.decode()]
    assert names and all(THIRD in name for name in names)
    assert old != session.urls[1]
    session.expect_readable([1])


def test_one_node_asks_for_the_dead_and_another_once_that_is_dead_too(session: Session) -> None:
    session.put(FIRST, range(4))
    session.put(SECOND, range(4, 6))
    session.put(THIRD, range(6, 8))
    session.kill(FIRST)
    second, third = session.reclaimer(SECOND), session.reclaimer(THIRD)
    session.steps(third, 3)
    session.steps(second, 3)
    assert (second.of_dead_nodes is None, third.of_dead_nodes is None) == (False, True)
    session.kill(SECOND)
    session.answer(Verdict.OWNER_DEAD, range(4))
    session.steps(second, 6)
    assert session.left == {*range(8)}, "a dead node asks only for its own"
    session.answer(Verdict.OWNER_DEAD, range(4, 8))
    session.steps(third, 20)
    assert session.left == set()


def test_the_node_that_started_first_goes_on_asking_while_others_come(session: Session) -> None:
    """Whatever their ids: each one would begin anew."""
    session.put(THIRD, range(4))
    session.put(SECOND, range(4, 6))
    assert session.oracle.alive is not None
    session.oracle.alive = dict.fromkeys((SECOND, THIRD), True)
    session.kill(THIRD)
    second, first = session.reclaimer(SECOND), session.reclaimer(FIRST)
    session.answer(UNREFERENCED, range(4))
    session.steps(second, 1)
    # One with a lower id comes.
    session.oracle.alive |= {FIRST: True}
    session.put(FIRST, [6])
    session.steps(first, 3)
    session.steps(second, 3)
    assert (second.of_dead_nodes is None, first.of_dead_nodes is None) == (False, True)
    assert session.left == {4, 5, 6}


def test_a_node_stands_in_for_one_that_renews_its_lease_and_does_not_ask(session: Session) -> None:
    session.put(FIRST, range(4))
    session.put(SECOND, range(4, 6))
    session.kill(FIRST)
    session.answer(Verdict.OWNER_DEAD, range(4))
    third = session.reclaimer(THIRD)
    session.steps(third, 10)
    assert session.left == {*range(6)}
    session.steps(third, 6)
    assert session.left == {4, 5}
    assert third.of_dead_nodes is None, "the other one reports them"


def test_a_node_id_that_comes_back_is_as_good_as_new(session: Session) -> None:
    session.put(FIRST, range(4))
    session.kill(FIRST)
    reclaimer = session.reclaimer()
    session.steps(reclaimer, 2)
    assert session.oracle.alive is not None
    session.oracle.alive[FIRST] = True
    session.put(FIRST, range(4, 8))
    session.steps(reclaimer)
    session.expect_readable(range(8))
    # Of the dead it has been the first to ask for; now it is asked for nothing any more.
    session.steps(session.reclaimer(FIRST))
    session.expect_readable(range(8))


def test_what_a_dead_node_was_writing_goes_with_its_lease(session: Session) -> None:
    session.put(FIRST, [1])
    ledger = session.nodes[SECOND].background
    client = session.contents.client
    name = next(key for key in session.contents.our_keys() if object_id(1).encode() in key)
    pending = name.decode().removeprefix(session.keys.root).replace(object_id(1), object_id(2))
    client.zadd(session.keys.pending, {pending: 0})
    client.set(session.keys.root + pending, b"half")
    session.kill(FIRST)
    session.answer(Verdict.OWNER_DEAD, [1])
    session.put(SECOND, [3])
    session.steps(session.reclaimer())
    assert session.left == {3}
    assert client.zrange(session.keys.pending, 0, -1) == []
    leases = client.zrange(session.keys.leases, 0, -1)
    assert not [lease for lease in leases if FIRST.encode() in lease]
    assert ledger.room().used > 0


def test_what_a_node_may_still_be_writing_stays_while_it_has_its_lease(session: Session) -> None:
    """The GCS takes a host for dead that stands still, and goes on in the middle of a spill."""
    session.put(FIRST, [1])
    client = session.contents.client
    name = next(key for key in session.contents.our_keys() if object_id(1).encode() in key)
    pending = name.decode().removeprefix(session.keys.root).replace(object_id(1), object_id(2))
    client.zadd(session.keys.pending, {pending: 0})
    client.set(session.keys.root + pending, b"half")
    session.kill(FIRST)
    session.nodes[FIRST].renew_lease("", lambda: False)
    session.answer(Verdict.OWNER_DEAD, [1])
    session.put(SECOND, [3])
    reclaimer = session.reclaimer()
    session.steps(reclaimer)
    assert session.left == {2, 3}
    session.kill(FIRST)
    session.steps(reclaimer)
    assert session.left == {3}
    assert client.zrange(session.keys.pending, 0, -1) == []


def test_a_header_is_read_once(session: Session) -> None:
    """An idle node would otherwise read all of its objects again and again."""
    session.put(SECOND, range(20))
    reclaimer, client = session.reclaimer(), session.contents.client
    session.steps(reclaimer, 8)
    client.config_resetstat()
    session.oracle.asked.clear()
    session.steps(reclaimer, 8)
    assert {owned.object_id for owned in session.oracle.asked} == {*map(object_id, range(20))}
    assert "cmdstat_getrange" not in client.info("commandstats")
    # After a while they are read again: values may have gone meanwhile.
    name = session.keys.parse_url(session.urls[0]).name
    for key in session.keys.values(name):
        client.delete(key)
    session.steps(reclaimer, 8)
    assert session.counts.objects == {}
    session.clock.now += 1000
    session.steps(reclaimer, 8)
    assert session.counts.objects == {"gone": 1}


def test_another_session_of_the_namespace_is_left_alone(session: Session) -> None:
    other = Store(session.config, "session_2", FIRST, session.counts)
    source = SourceObject(object_id(9), METADATA, b"owner", memoryview(b"data"))
    urls, _ = other.put([source])
    session.put(FIRST, range(4))
    session.kill(FIRST)
    session.oracle.usual = Verdict.OWNER_DEAD
    session.oracle.answers = {object_id(9): Verdict.OWNER_DEAD}
    session.put(SECOND, [])
    session.steps(session.reclaimer())
    assert session.left == {9}
    found = other.find(urls[0], object_id(9))
    assert found.header.size == 4
    other.destroy(lambda pid: False)
    other.close()


def test_the_budget_follows_what_version_0_1_stores_and_removes_beside(session: Session) -> None:
    session.put(FIRST, range(3))
    store, reclaimer = session.nodes[FIRST], session.reclaimer(FIRST)
    before = store.room().used
    # Version 0.1 changes the usage of its nodes, and no totals.
    client, usage = session.contents.client, session.keys.usage
    client.hset(usage, "session_0_1:aa", "2 2000 3000 1")
    assert store.room().used == before
    session.steps(reclaimer)
    assert store.room().used == before + 3000
    client.hdel(usage, "session_0_1:aa")
    session.steps(reclaimer)
    assert store.room().used == before


def test_objects_without_a_header_that_can_be_read_stay(session: Session) -> None:
    session.put(FIRST, range(6))
    client = session.contents.client
    for n in (0, 1):
        client.delete(session.urls[n].partition("?")[0])
    for n in (2, 3):
        client.setrange(session.urls[n].partition("?")[0], 50, b"damage")
    session.kill(FIRST)
    session.oracle.usual = Verdict.OWNER_DEAD
    session.steps(session.reclaimer())
    assert {owned.object_id for owned in session.oracle.asked} == {object_id(4), object_id(5)}
    assert session.left >= {1, 2, 3} and not session.left & {4, 5}


def test_entries_without_any_value_go(any_session: Session) -> None:
    """Of the living too: an entry that a failover has brought back would take room for ever."""
    session = any_session
    session.put(FIRST, range(8))
    session.put(SECOND, range(8, 16))
    session.kill(FIRST)
    session.oracle.usual = Verdict.REFERENCED
    gone = {n for n in (0, 1, 2, 8, 9, 10) if not session.urls[n].startswith("overflow:")}
    for n in gone:
        name = session.keys.parse_url(session.urls[n]).name
        for key in session.keys.values(name):
            session.contents.client.delete(key)
    session.steps(session.reclaimer())
    ledger = session.nodes[THIRD].valkey.ledger
    stored = [
        int(entry.name.object_id, 16)
        for node in (FIRST, SECOND)
        for page in ledger.stored(NodeName(SESSION, node))
        for entry in page
    ]
    assert not gone & {*stored}
    assert session.counts.objects == ({"gone": len(gone)} if gone else {})
    session.expect_readable(sorted({*range(16)} - gone))


def test_a_server_that_is_away_is_asked_again(session: Session) -> None:
    session.put(FIRST, range(4))
    session.kill(FIRST)
    session.answer(Verdict.OWNER_DEAD, range(4))
    reclaimer = session.reclaimer()
    with no_more_clients(session), pytest.raises(ServerError):
        reclaimer.step()
    session.clock.now += 100
    session.steps(reclaimer)
    assert session.left == set()


def test_whoever_joins_the_cluster_reclaims_once(any_session: Session) -> None:
    """As `gc` does."""
    session = any_session
    session.put(FIRST, range(6))
    session.put(SECOND, range(6, 8))
    session.kill(FIRST)
    session.answer(UNREFERENCED, [0, 1, 6])
    session.answer(Verdict.OWNER_DEAD, [2])
    counts, waited = Counts(), list[float]()
    pace = dataclasses.replace(PACE, confirmation=0.0)
    left = reclaim_of_dead_nodes(
        session.config, SESSION, session.oracle, counts, pace, waited.append
    )
    assert left == Left(referenced=3, unknown=0)
    assert session.left == {*range(3, 8)}
    assert (counts.objects, waited) == ({"unreferenced": 2, "owner_dead": 1}, [0.0])
    session.oracle.alive = None
    found = reclaim_of_dead_nodes(session.config, SESSION, session.oracle, counts, pace)
    assert found is None
    session.expect_readable(range(3, 8))


def test_whoever_joins_the_cluster_reclaims_all_of_it(any_session: Session) -> None:
    """More than is asked for at once; and says what it leaves, and why."""
    session = any_session
    session.put(FIRST, range(20))
    session.kill(FIRST)
    session.oracle.usual = UNREFERENCED
    session.answer(REFERENCED, range(3))
    session.answer(Verdict.UNKNOWN, range(3, 5))
    counts, pace = Counts(), dataclasses.replace(PACE, confirmation=0.0, of_dead=3)
    left = reclaim_of_dead_nodes(
        session.config, SESSION, session.oracle, counts, pace, lambda seconds: None
    )
    assert left == Left(referenced=3, unknown=2)
    assert session.left == {*range(5)}
    assert counts.objects == {"unreferenced": 15}


def test_a_node_that_joins_meanwhile_is_not_taken_for_a_dead_one(session: Session) -> None:
    """Nor its objects that are half written, between the first answers and the second ones."""
    session.put(FIRST, [1])
    session.kill(FIRST)
    session.answer(UNREFERENCED, [1])
    assert session.oracle.alive is not None
    alive, client = session.oracle.alive, session.contents.client
    del alive[THIRD]

    def join(seconds: float) -> None:
        alive[THIRD] = True
        session.put(THIRD, [2])
        (name,) = [key for key in session.contents.our_keys() if object_id(2).encode() in key]
        pending = name.decode().removeprefix(session.keys.root).replace(object_id(2), object_id(4))
        client.zadd(session.keys.pending, {pending: 0})
        client.set(session.keys.root + pending, b"half")

    pace = dataclasses.replace(PACE, confirmation=0.0)
    found = reclaim_of_dead_nodes(session.config, SESSION, session.oracle, Counts(), pace, join)
    assert found == Left(0, 0)
    assert session.left == {2, 4}


@pytest.mark.slow
def test_many_objects_of_a_dead_node_go_within_two_minutes(session: Session) -> None:
    count = 20_000
    for start in range(0, count, 1000):
        sources = [
            SourceObject(object_id(n), METADATA, b"owner", memoryview(b"x" * 100))
            for n in range(start, start + 1000)
        ]
        urls, failure = session.nodes[FIRST].put(sources)
        assert failure is None and len(urls) == 1000
    session.nodes[FIRST].give_back()
    session.put(SECOND, [])
    session.kill(FIRST)
    session.oracle.usual = UNREFERENCED
    kept = range(0, count, 100)
    session.answer(REFERENCED, kept)
    reclaimer = session.reclaimer()
    began = session.clock.now
    while len(session.left) > len(kept):
        session.steps(reclaimer, 1)
        # A keeper's rounds are up to 13 s apart.
        session.clock.now += 3.0
        assert session.clock.now - began < 120
    assert session.left == {*kept}


_NOT_CONNECTED = """
import logging
from ray.core.generated.common_pb2 import Address
from ray_valkey_spill.plugin.owners import RayOwners
from ray_valkey_spill.store.reclaim import Owned
logging.basicConfig()
address = Address(ip_address="127.0.0.1", port=1, worker_id=b"w" * 28)
# The field has another name in earlier versions of Ray.
setattr(address, "node_id" if hasattr(address, "node_id") else "raylet_id", b"n" * 28)
owner = address.SerializeToString()
owners = RayOwners()
for _ in range(2):
    print(owners.nodes(), owners.verdicts([Owned("ab" * 28, owner)])[0].name)
"""


def test_where_ray_cannot_be_asked_the_log_says_so_once() -> None:
    # A process that is not connected lacks what is asked for, as a Ray of another shape does.
    command = [sys.executable, "-c", _NOT_CONNECTED]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == 2 * "None UNKNOWN\n"
    for question in ("who needs an object", "which nodes are alive"):
        assert result.stderr.count(f"cannot be asked {question}") == 1
