"""The metadata on the server: each script may be sent twice, and works on a full server."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import valkey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.servers import PRODUCTS, server_of

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName
from ray_valkey_spill.tiers.ledger import (
    Grant,
    Kept,
    Ledger,
    Reservation,
    Totals,
    Usage,
    link_to,
)
from ray_valkey_spill.units import MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

OWNER, OTHER = NodeName("session_1", "aa"), NodeName("session_1", "bb")
# Beside those: the one's name begins as theirs, the other comes right after them.
ALIKE, NEXT = NodeName("session_1", "aab"), NodeName("session_10", "aa")
GCS = "127.0.0.1:6379"


class Metadata:
    """A ledger, what it is on, and how often each of its scripts is sent."""

    def __init__(self, url: str, client: valkey.Valkey) -> None:
        config = Config.load({"url": url, "retry_timeout": 5}, {})
        self.keys = Keyspace.of(config)
        self.client = client
        self.link = link_to(config)
        self.ledger = Ledger(self.link, self.keys)

    def register(self, *names: ObjectName) -> None:
        self.link.execute(*self.ledger.registrations(names))

    def settle(self, *entries: Entry, owner: NodeName = OWNER) -> int:
        replies = self.link.execute(*self.ledger.settlements(owner, entries))
        return sum(settled for settled, _, _ in replies)

    def settle_and_keep(self, kept: Kept, *entries: Entry) -> tuple[int, ...]:
        """Returns how many are stored, what their writer keeps, and what all may still write."""
        (reply,) = self.link.execute(*self.ledger.settlements(OWNER, entries, kept))
        return tuple(reply)

    def forget(self, *names: ObjectName) -> None:
        self.link.execute(*self.ledger.forget(names))

    def store(self, *entries: Entry, owner: NodeName = OWNER) -> None:
        self.register(*(entry.name for entry in entries))
        assert self.settle(*entries, owner=owner) == len(entries)

    def reserve(
        self,
        writer: str,
        grant: Grant,
        least: int,
        most: int,
        budget: int | None,
        room: int | None,
        owner: NodeName = OWNER,
    ) -> tuple[int, ...]:
        """Returns what is granted on top, what was used before, and what all may still write."""
        request = self.ledger.reservation(owner, writer, grant, least, most, budget, room)
        (reply,) = self.link.execute(request)
        return Reservation(*reply)[:3]

    def grants(self, owner: NodeName = OWNER) -> dict[str, Grant]:
        found = self.ledger.grants_of(owner)
        assert self.ledger.grants().get(owner, {}) == found
        return found

    def expect_totals(self) -> None:
        """The totals are the sums of what the metadata have of each node."""
        usages = self.ledger.usages().values()
        grants = [grant for of_node in self.ledger.grants().values() for grant in of_node.values()]
        sums = [sum(usage[i] for usage in usages) for i in range(3)]
        sums += [sum(grant[i] for grant in grants) for i in range(2)]
        assert [*self.ledger.totals()[:5]] == sums

    def stored(self, owner: NodeName | None = None) -> list[Entry]:
        return [entry for page in self.ledger.stored(owner) for entry in page]

    def pending(self, owner: NodeName = OWNER) -> list[ObjectName]:
        return [name for page in self.ledger.pending(owner) for name in page]

    def usage(self, owner: NodeName = OWNER) -> tuple[int, ...]:
        return self.ledger.usages().get(owner, Usage())[:3]


def entry(number: int, owner: NodeName = OWNER, size: int = 10, stored: int = 20) -> Entry:
    return Entry(ObjectName(*owner, f"{number:08x}", f"{number:027x}", 1), size, stored)


@pytest.fixture(scope="module", params=PRODUCTS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with server_of(request.param, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(params=[0, 1], ids=["with room", "full"])
def metadata(
    running: tuple[str, valkey.Valkey], request: pytest.FixtureRequest
) -> Iterator[Metadata]:
    """On a server with room, and on one that is full."""
    url, client = running
    client.flushall()
    client.config_set("maxmemory", request.param)
    made = Metadata(url, client)
    yield made
    made.link.close()
    client.config_set("maxmemory", 0)
    client.flushall()


# --- what is stored and what is being written ---


def test_what_is_registered_is_pending_and_what_is_settled_is_stored(metadata: Metadata) -> None:
    metadata.client.config_set("maxmemory", 0)  # an object is registered with ZADD
    first, second = entry(1, size=3, stored=7), entry(2, size=30, stored=70)
    metadata.register(first.name, second.name)
    assert metadata.pending() == [first.name, second.name]
    assert metadata.stored() == []
    assert metadata.settle(first, second) == 2
    assert metadata.pending() == []
    assert metadata.stored() == [first, second]
    assert metadata.usage() == (2, 33, 77)
    metadata.forget(first.name)
    assert metadata.stored() == [second]
    assert metadata.usage() == (1, 30, 70)
    metadata.forget(second.name)
    assert metadata.client.keys("*") == []


def test_each_script_does_the_same_when_it_comes_twice(metadata: Metadata) -> None:
    stored = [entry(i) for i in range(250)]  # more than one script takes
    with room(metadata):
        metadata.register(*(each.name for each in stored))
    for _ in range(2):
        assert metadata.settle(*stored) == 250
        assert metadata.usage() == (250, 2500, 5000)
    for _ in range(2):
        metadata.forget(*(each.name for each in stored[:130]))
        assert metadata.usage() == (120, 1200, 2400)
    for _ in range(2):
        assert metadata.reserve("w", Grant(0, 0), 5, 50, 10_000, None) == (50, 2400, 50)
        assert metadata.reserve("w", Grant(50, 20), 5, 50, 10_000, None) == (50, 2450, 80)
        assert metadata.grants() == {"w": Grant(100, 20)}
        metadata.expect_totals()
    for _ in range(2):
        metadata.ledger.release(OWNER, ["w"])
        assert metadata.ledger.grants() == {}
        metadata.expect_totals()
    for _ in range(2):
        assert metadata.ledger.renew(OWNER, GCS, new=True)
        assert [lease.node_name for lease in metadata.ledger.leases()] == [OWNER]
    for _ in range(2):
        assert metadata.ledger.agree_on_overflow("session_1", "token") == "token"
        assert metadata.ledger.agree_on_overflow("session_1", "another") == "token"
    for _ in range(2):
        metadata.ledger.close_account(OWNER)
        assert metadata.ledger.leases() == []
    for _ in range(2):
        assert metadata.ledger.forget_overflow("session_1")
        assert metadata.ledger.overflows() == {}


def test_a_settlement_that_comes_late_after_a_deletion_stores_nothing(metadata: Metadata) -> None:
    kept, deleted = entry(1), entry(2)
    with room(metadata):
        metadata.register(kept.name, deleted.name)
    assert metadata.settle(kept, deleted) == 2
    metadata.forget(deleted.name)
    assert metadata.settle(kept, deleted) == 1
    assert metadata.stored() == [kept]
    assert metadata.usage() == (1, 10, 20)


def test_what_was_destroyed_or_never_registered_is_not_settled(metadata: Metadata) -> None:
    registered, never = entry(1), entry(2)
    with room(metadata):
        metadata.register(registered.name)
    assert metadata.settle(registered, never) == 1
    assert metadata.stored() == [registered]


def test_a_registration_that_comes_late_does_not_make_a_stored_object_half_written(
    metadata: Metadata,
) -> None:
    with room(metadata):
        metadata.store(entry(1))
        metadata.register(entry(1).name)
        assert metadata.pending() == []
        metadata.forget(entry(1).name)
    assert metadata.client.keys("*") == []


def test_what_is_forgotten_of_several_nodes_is_taken_from_each(metadata: Metadata) -> None:
    with room(metadata):
        for owner in (OWNER, OTHER):
            metadata.store(entry(1, owner), entry(2, owner), owner=owner)
    metadata.forget(*(entry(i, owner).name for owner in (OWNER, OTHER) for i in (1, 7)))
    assert metadata.ledger.usages().keys() == {OWNER, OTHER}
    assert metadata.usage(OWNER) == metadata.usage(OTHER) == (1, 10, 20)


def test_metadata_are_read_by_the_page_and_by_the_node(metadata: Metadata) -> None:
    count = 1203
    stored = {o: [entry(i, o) for i in range(count)] for o in (OWNER, ALIKE, NEXT)}
    half = [entry(i).name for i in range(count, 2 * count)]
    with room(metadata):
        for owner, entries in stored.items():
            metadata.store(*entries, owner=owner)
        # Whole pages of what is stored already hide nothing of what is pending.
        metadata.register(*(each.name for each in stored[OWNER]), *half)
    for owner, entries in stored.items():
        assert metadata.stored(owner) == entries
    assert len(metadata.stored()) == 3 * count
    assert max(map(len, metadata.ledger.stored())) < count
    assert metadata.pending() == half
    assert metadata.pending(ALIKE) == metadata.pending(NEXT) == []


def test_whoever_is_anywhere_in_the_metadata_is_found(metadata: Metadata) -> None:
    session = "session_1"
    with room(metadata):
        metadata.store(
            *(entry(i, NodeName(session, "a")) for i in range(3)), owner=NodeName(session, "a")
        )
        metadata.register(*(entry(i, NodeName(session, "b")).name for i in range(3)))
        metadata.store(entry(0, NodeName("session_0", "z")), owner=NodeName("session_0", "z"))
    metadata.ledger.renew(NodeName(session, "c"), GCS, new=True)
    metadata.reserve("1-x", Grant(0, 0), 1, 1, None, None, NodeName(session, "d"))
    metadata.client.delete(metadata.keys.usage)
    nodes = {*map(NodeName, [session] * 4, "abcd")}
    assert metadata.ledger.node_names() == {*nodes, NodeName("session_0", "z")}


# --- usage ---


@pytest.mark.parametrize("drift", ["999 999 999 5", "1 1 1 5", None])
def test_a_recount_corrects_drift(metadata: Metadata, drift: str | None) -> None:
    with room(metadata):
        metadata.store(*(entry(i) for i in range(600)))
        metadata.client.delete(metadata.keys.usage)
        if drift:
            metadata.client.hset(metadata.keys.usage, str(OWNER), drift)
    assert metadata.ledger.recount(OWNER)
    assert metadata.usage() == (600, 6000, 12_000)


def test_a_recount_of_a_node_that_has_nothing_leaves_nothing(metadata: Metadata) -> None:
    assert metadata.ledger.recount(OWNER)
    assert metadata.client.keys("*") == []
    metadata.client.config_set("maxmemory", 0)
    metadata.client.hset(metadata.keys.usage, str(OWNER), "3 3 3 5")
    assert metadata.ledger.recount(OWNER)
    assert metadata.client.keys("*") == []


def test_a_recount_removes_a_usage_of_nothing(metadata: Metadata) -> None:
    """As a recount leaves it that is killed, or gives up, while it counts anew."""
    metadata.client.config_set("maxmemory", 0)
    metadata.client.hset(metadata.keys.usage, str(OWNER), "0 0 0 5")
    assert metadata.ledger.node_names() == {OWNER}
    assert metadata.ledger.recount(OWNER)
    assert metadata.client.keys("*") == []
    assert metadata.ledger.node_names() == set()


TAMPERED = [None, b"", b"\xff", b"1 2 3", b"9 9 9 9 9 9", b"0 0 0 0 0 1"]


@pytest.mark.parametrize("totals", TAMPERED)
def test_totals_that_are_missing_or_tampered_with_are_corrected(
    metadata: Metadata, totals: bytes | None
) -> None:
    with room(metadata):
        metadata.store(entry(1), entry(2))
        metadata.reserve("1-x", Grant(0, 0), 100, 100, None, None, OTHER)
        metadata.client.delete(metadata.keys.totals)
        if totals is not None:
            metadata.client.set(metadata.keys.totals, totals)
    assert metadata.ledger.recount_totals()
    assert metadata.ledger.totals()[:5] == (2, 20, 40, 100, 0)
    metadata.forget(entry(1).name)
    metadata.ledger.release(OTHER, ["1-x"])
    assert metadata.ledger.totals()[:5] == (1, 10, 20, 0, 0)
    metadata.forget(entry(2).name)
    assert metadata.client.keys("*") == []


@pytest.mark.parametrize("totals", [None, b"", b"\xff", b"1 2 3"])
def test_whatever_comes_first_adds_missing_totals_up(
    metadata: Metadata, totals: bytes | None
) -> None:
    def change_nothing() -> None:
        metadata.ledger.release(OTHER, ["nobody"])

    firsts = [
        change_nothing,
        lambda: metadata.reserve("2-y", Grant(0, 0), 1, 1, None, None),
        lambda: metadata.settle_and_keep(Kept("2-y", 0, 1, 1000, None)),
        lambda: metadata.forget(entry(1).name),
        lambda: metadata.store(entry(3)),
        lambda: metadata.ledger.recount(OWNER),
    ]
    with room(metadata):
        metadata.store(entry(1), entry(2))
        metadata.reserve("1-x", Grant(0, 0), 100, 100, None, None, OTHER)
        for first in firsts:
            metadata.client.delete(metadata.keys.totals)
            if totals is not None:
                metadata.client.set(metadata.keys.totals, totals)
            first()
            metadata.expect_totals()
            assert metadata.ledger.totals().objects == len(metadata.stored())


@pytest.fixture
def wrong_totals(metadata: Metadata) -> Iterator[Metadata]:
    """Of one object."""
    with room(metadata):
        metadata.store(entry(1))
        metadata.client.set(metadata.keys.totals, "9 9 9 9 9 9")
        yield metadata
    metadata.expect_totals()


def change_while_counted(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, times: int | None = None
) -> None:
    """Store one object more after each of the next `times` that the totals are read."""
    totals, numbers = metadata.ledger.totals, itertools.count(2)

    def and_they_change() -> Totals:
        found = totals()
        number = next(numbers)
        if times is None or number < 2 + times:
            metadata.store(entry(number))
        return found

    monkeypatch.setattr(metadata.ledger, "totals", and_they_change)


def test_totals_that_change_while_they_are_counted_are_counted_again(
    wrong_totals: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_while_counted(wrong_totals, monkeypatch, times=2)
    assert wrong_totals.ledger.recount_totals()
    monkeypatch.undo()
    wrong_totals.expect_totals()
    assert wrong_totals.usage() == (3, 30, 60)


def test_totals_that_change_all_the_time_are_left_as_they_are(
    wrong_totals: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_while_counted(wrong_totals, monkeypatch)
    assert not wrong_totals.ledger.recount_totals()
    monkeypatch.undo()
    assert wrong_totals.ledger.recount_totals()


def test_usage_is_never_negative(metadata: Metadata) -> None:
    with room(metadata):
        metadata.store(*(entry(i) for i in range(3)))
        metadata.client.hset(metadata.keys.usage, str(OWNER), "3 5 5 9")
    metadata.forget(entry(0).name)
    assert metadata.usage() == (2, 0, 0)
    metadata.forget(entry(1).name)
    metadata.forget(entry(2).name)
    assert metadata.usage() == (0, 0, 0)


def _nothing(metadata: Metadata) -> None:
    pass


def _forget_the_first(metadata: Metadata) -> None:
    metadata.forget(entry(0).name)


def _store_a_second(metadata: Metadata) -> None:
    metadata.store(entry(1))


def _forget_the_second(metadata: Metadata) -> None:
    metadata.forget(entry(1).name)


@pytest.mark.parametrize(("is_known", "attempt"), [(True, 0), (False, 0), (False, 1)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (_forget_the_first, _store_a_second),
        (_store_a_second, _forget_the_second),
        (_nothing, _store_a_second),
        (_nothing, _forget_the_first),
    ],
    ids=["exchanged", "came and went", "came", "went"],
)
def test_a_recount_sees_what_changes_before_and_after_it_counts(
    metadata: Metadata,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[Metadata], None],
    after: Callable[[Metadata], None],
    is_known: bool,
    attempt: int,
) -> None:
    read, attempts = metadata.ledger.stored, itertools.count()

    def while_it_changes(owner: NodeName | None = None) -> Iterator[list[Entry]]:
        changes = next(attempts) == attempt
        before(metadata) if changes else None
        pages = list(read(owner))
        after(metadata) if changes else None
        yield from pages

    with room(metadata):
        metadata.store(entry(0))
        if not is_known:
            metadata.client.delete(metadata.keys.usage)
        monkeypatch.setattr(metadata.ledger, "stored", while_it_changes)
        assert metadata.ledger.recount(OWNER)
        monkeypatch.undo()
    count = len(metadata.stored())
    assert metadata.usage() == (count, 10 * count, 20 * count)


def test_a_recount_of_what_changes_all_the_time_is_given_up(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    with room(metadata):
        metadata.store(entry(0), entry(1))
        metadata.client.hset(metadata.keys.usage, str(OWNER), "7 7 7 7")
        read = metadata.ledger.stored
        numbers = iter(range(2, 100))

        def growing(owner: NodeName | None = None) -> Iterator[list[Entry]]:
            yield from read(owner)
            metadata.store(entry(next(numbers)))

        monkeypatch.setattr(metadata.ledger, "stored", growing)
        assert not metadata.ledger.recount(OWNER)
        monkeypatch.undo()
        assert metadata.ledger.recount(OWNER)
    assert metadata.usage()[0] == len(metadata.stored())


def test_registering_settling_forgetting_and_recounting_in_any_order_keeps_the_metadata_right(
    running: tuple[str, valkey.Valkey],
) -> None:
    url, client = running
    metadata = Metadata(url, client)
    numbers = st.lists(st.integers(0, 7), max_size=5, unique=True)

    class Bookkeeping(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            client.flushall()
            self.pending: set[int] = set()
            self.stored: set[int] = set()

        @rule(numbers=numbers)
        def register(self, numbers: list[int]) -> None:
            metadata.register(*(entry(i).name for i in numbers))
            self.pending |= {*numbers}

        @rule(numbers=numbers)
        def settle(self, numbers: list[int]) -> None:
            settled = {*numbers} & (self.pending | self.stored)
            assert metadata.settle(*(entry(i) for i in numbers)) == len(settled)
            self.stored |= settled
            self.pending -= settled

        @rule(numbers=numbers)
        def forget(self, numbers: list[int]) -> None:
            metadata.forget(*(entry(i).name for i in numbers))
            self.stored -= {*numbers}
            self.pending -= {*numbers}

        @rule()
        def drift_and_recount(self) -> None:
            client.hset(metadata.keys.usage, str(OWNER), "5 1 1 1")
            assert metadata.ledger.recount(OWNER)
            assert metadata.ledger.recount_totals()

        @rule(totals=st.sampled_from([None, b"", b"\xff", b"9 9 9 9 9 9", b"0 0 0 0 0 1"]))
        def tamper_with_the_totals(self, totals: bytes | None) -> None:
            client.delete(metadata.keys.totals)
            if totals is not None:
                client.set(metadata.keys.totals, totals)
            assert metadata.ledger.recount_totals()

        @rule(writer=st.sampled_from("ab"), size=st.integers(0, 300))
        def reserve(self, writer: str, size: int) -> None:
            used = metadata.ledger.totals().used
            own = metadata.grants().get(writer, Grant(0, 0))
            granted, was_used, _ = metadata.reserve(writer, own, 1, size, 400, None)
            assert was_used == used
            assert granted == (size if size <= 400 - used else max(0, 400 - used))

        @rule(writer=st.sampled_from("ab"), most=st.integers(0, 300))
        def keep(self, writer: str, most: int) -> None:
            _, kept, unwritten = metadata.settle_and_keep(Kept(writer, 0, most, 300, 400))
            assert kept <= most
            assert unwritten == sum(grant.granted for grant in metadata.grants().values())

        @rule(writers=st.lists(st.sampled_from("ab")))
        def release(self, writers: list[str]) -> None:
            metadata.ledger.release(OWNER, writers)
            assert not {*writers} & metadata.grants().keys()

        @invariant()
        def metadata_say_what_is_there(self) -> None:
            count = len(self.stored)
            assert metadata.stored() == [entry(i) for i in sorted(self.stored)]
            assert metadata.pending() == [entry(i).name for i in sorted(self.pending - self.stored)]
            assert metadata.usage() == (count, 10 * count, 20 * count)
            metadata.expect_totals()
            if not self.stored and not metadata.grants():
                assert not client.exists(metadata.keys.totals)

    run_state_machine_as_test(
        Bookkeeping, settings=settings(max_examples=15, stateful_step_count=20, deadline=None)
    )
    metadata.link.close()
    client.flushall()


# --- grants ---


def test_grants_and_what_is_stored_share_the_budget(metadata: Metadata) -> None:
    with room(metadata):
        metadata.store(entry(1, stored=600))
    ledger = metadata.ledger
    assert metadata.reserve("a", Grant(0, 0), 1, 300, 1000, None) == (300, 600, 300)
    assert metadata.reserve("b", Grant(0, 0), 1, 300, 1000, None) == (100, 900, 400)
    assert metadata.reserve("c", Grant(0, 0), 1, 300, 1000, None) == (0, 1000, 400)
    assert metadata.reserve("a", Grant(300, 300), 1, 300, 1000, None) == (0, 1000, 100)
    ledger.release(OWNER, ["a"])
    assert metadata.reserve("c", Grant(0, 0), 300, 300, 1000, None) == (300, 700, 400)
    assert metadata.grants() == {"b": Grant(100, 0), "c": Grant(300, 0)}


def test_less_than_the_least_that_is_wanted_is_not_granted(metadata: Metadata) -> None:
    assert metadata.reserve("a", Grant(0, 0), 101, 500, 100, None) == (0, 0, 0)
    assert metadata.reserve("a", Grant(0, 0), 100, 500, 100, None) == (100, 0, 100)
    assert metadata.reserve("b", Grant(0, 0), 0, 0, 0, 0) == (0, 100, 100)


def test_room_is_shared_with_what_others_may_still_write(metadata: Metadata) -> None:
    ledger = metadata.ledger
    assert metadata.reserve("a", Grant(0, 0), 1, 60, None, 100) == (60, 0, 60)
    assert metadata.reserve("b", Grant(0, 0), 1, 60, None, 100) == (40, 60, 100)
    # The 50 that it has written since are in what the server has, which left 50.
    assert metadata.reserve("a", Grant(60, 50), 1, 60, None, 50) == (0, 100, 50)
    ledger.release(OWNER, ["b"])
    assert metadata.reserve("a", Grant(60, 50), 1, 60, None, 50) == (40, 60, 50)


def test_what_was_written_before_there_were_limits_needs_no_room(metadata: Metadata) -> None:
    granted = metadata.reserve("a", Grant(0, 1000), 1005, 1060, None, 10)
    assert granted == (1010, 0, 10)
    assert metadata.grants() == {"a": Grant(1010, 1000)}
    assert metadata.reserve("b", Grant(0, 0), 1, 60, None, 10) == (0, 1010, 10)


def test_amounts_above_any_length_of_a_value_are_told(metadata: Metadata) -> None:
    terabyte = 1 << 40
    metadata.client.config_set("maxmemory", 0)
    metadata.client.hset(metadata.keys.usage, str(OWNER), f"9 9 {3 * terabyte} 9")
    granted = metadata.reserve("a", Grant(0, 0), terabyte, 2 * terabyte, 5 * terabyte, None)
    assert granted == (2 * terabyte, 3 * terabyte, 2 * terabyte)
    assert metadata.grants() == {"a": Grant(2 * terabyte, 0)}
    refused = metadata.reserve("b", Grant(0, 0), 1, 1, 5 * terabyte, None)
    assert refused == (0, 5 * terabyte, 2 * terabyte)


def test_releasing_all_grants_of_a_node_leaves_those_of_others(metadata: Metadata) -> None:
    for owner, writer in [(OWNER, "1-x"), (OWNER, "2-y"), (OTHER, "1-x"), (ALIKE, "1-x")]:
        metadata.reserve(writer, Grant(0, 0), MIB, MIB, None, None, owner)
    metadata.ledger.release_all(OWNER)
    assert metadata.ledger.grants() == {owner: {"1-x": Grant(MIB, 0)} for owner in (OTHER, ALIKE)}
    metadata.expect_totals()


def test_a_writer_keeps_a_grant_when_it_settles_what_it_has_written(metadata: Metadata) -> None:
    ledger = metadata.ledger
    metadata.reserve("a", Grant(0, 0), 500, 500, 1000, None)
    with room(metadata):
        metadata.register(entry(1).name)
    for _ in range(2):
        assert metadata.settle_and_keep(Kept("a", 0, 100, 150, 1000), entry(1)) == (1, 100, 100)
        assert metadata.grants() == {"a": Grant(100, 0)}
        metadata.expect_totals()
    # All writers together keep no more than the limit, and nobody more than the budget permits.
    assert metadata.settle_and_keep(Kept("b", 0, 100, 150, 1000)) == (0, 50, 150)
    assert metadata.settle_and_keep(Kept("c", 0, 100, 150, 1000)) == (0, 0, 150)
    assert metadata.settle_and_keep(Kept("a", 0, 100, 150, 100)) == (0, 30, 80)
    assert metadata.settle_and_keep(Kept("a", 0, 100, 150, 0)) == (0, 0, 50)
    assert metadata.settle_and_keep(Kept("b", 0, 100, 150, None)) == (0, 100, 100)
    assert metadata.grants() == {"b": Grant(100, 0)}
    ledger.release(OWNER, ["b"])
    metadata.expect_totals()
    assert ledger.totals()[:5] == (1, 10, 20, 0, 0)


def test_a_grant_stands_for_what_is_written_and_neither_settled_nor_removed(
    metadata: Metadata,
) -> None:
    metadata.reserve("a", Grant(0, 0), 500, 500, 1000, None)
    metadata.reserve("b", Grant(0, 0), 300, 300, 1000, None)
    with room(metadata):
        metadata.register(entry(1).name)
    # The second object is not pending, so its values are left, beside 70 bytes of earlier ones.
    kept = Kept("a", 70, 100, 150, 1000)
    assert metadata.settle_and_keep(kept, entry(1), entry(2)) == (1, 90, 300)
    assert metadata.grants() == {"a": Grant(90, 90), "b": Grant(300, 0)}
    metadata.ledger.release(OWNER, ["b"])
    assert metadata.settle_and_keep(kept) == (0, 170, 100)
    assert metadata.settle_and_keep(kept._replace(budget=20 + 70 + 30)) == (0, 100, 30)
    assert metadata.grants() == {"a": Grant(100, 70)}
    metadata.expect_totals()


def test_an_object_of_which_a_value_is_missing_is_not_settled_where_values_are_looked_for(
    metadata: Metadata,
) -> None:
    whole, headless, chunkless = entry(1), entry(2), entry(3)
    with room(metadata):
        metadata.register(*(each.name for each in (whole, headless, chunkless)))
        for each in (whole, chunkless):
            metadata.client.set(metadata.keys.header(each.name), "header")
        for each in (whole, headless):
            metadata.client.set(metadata.keys.chunks(each.name)[0], "chunk")
    requests = metadata.ledger.settlements(OWNER, [whole, headless, chunkless], verify=True)
    assert sum(reply[0] for reply in metadata.link.execute(*requests)) == 1
    assert metadata.stored() == [whole]
    assert metadata.pending() == [headless.name, chunkless.name]
    assert metadata.usage() == (1, 10, 20)


# --- leases and places ---


def test_a_lease_is_dated_by_the_server_and_renewed_only_where_there_is_one(
    metadata: Metadata,
) -> None:
    ledger = metadata.ledger
    assert not ledger.renew(OWNER, GCS, new=False)
    assert metadata.client.keys("*") == []
    before = ledger.time()
    assert ledger.renew(OWNER, "[::1]:6379", new=True)
    (lease,) = ledger.leases()
    assert (lease.node_name, lease.gcs_address) == (OWNER, "[::1]:6379")
    assert before <= lease.renewed <= ledger.time()
    metadata.client.config_set("maxmemory", 0)
    metadata.client.zadd(metadata.keys.leases, {f"{OWNER}:[::1]:6379": 1})
    assert ledger.renew(OWNER, "[::1]:6379", new=False)
    (lease,) = ledger.leases()
    assert lease.renewed >= before


def test_an_address_more_changes_no_renewal_and_makes_no_lease(metadata: Metadata) -> None:
    ledger, leases = metadata.ledger, metadata.keys.leases
    for node_name, address in ((OWNER, GCS), (OWNER, "[::1]:6379"), (NEXT, GCS)):
        ledger.renew(node_name, address, new=True)
    before = dict(metadata.client.zrange(leases, 0, -1, withscores=True))
    known = ledger.leases()
    ledger.end_lease(NEXT, GCS)  # meanwhile
    for _ in range(2):
        ledger.add_address(known, "10.0.0.9:6379")
    after = dict(metadata.client.zrange(leases, 0, -1, withscores=True))
    del before[f"{NEXT}:{GCS}".encode()]
    latest = max(before.values())
    assert after == before | {f"{OWNER}:10.0.0.9:6379".encode(): latest}


def test_leases_of_the_same_time_are_all_found(metadata: Metadata) -> None:
    """More of them than are asked for at once, beside older and younger ones."""
    metadata.client.config_set("maxmemory", 0)
    times = {f"session_1:{number:04x}:{GCS}": min(max(number, 200), 1900) for number in range(2100)}
    metadata.client.zadd(metadata.keys.leases, times)
    found = [lease.node_name.node for lease in metadata.ledger.leases()]
    assert sorted(found) == [f"{number:04x}" for number in range(2100)]


def test_what_is_no_lease_of_ours_is_passed_over(metadata: Metadata) -> None:
    metadata.ledger.renew(OWNER, GCS, new=True)
    metadata.client.config_set("maxmemory", 0)
    forged = [b"\xff", b"session", b"a:b", b"../../victim:n:", b"s:..:x", b"s:n:a b", b"s:n:\n"]
    metadata.client.zadd(metadata.keys.leases, dict.fromkeys(forged, 1))
    assert [lease.node_name for lease in metadata.ledger.leases()] == [OWNER]


def test_an_account_is_closed_with_every_lease_and_grant_of_it_and_nothing_of_others(
    metadata: Metadata,
) -> None:
    ledger = metadata.ledger
    for owner in (OWNER, OTHER, ALIKE, NEXT):
        ledger.renew(owner, GCS, new=True)
        metadata.reserve("1-x", Grant(0, 0), 1, 1, None, None, owner)
    ledger.renew(OWNER, "127.0.0.1:6380", new=True)
    ledger.close_account(OWNER)
    assert {lease.node_name for lease in ledger.leases()} == {OTHER, ALIKE, NEXT}
    assert {*ledger.grants()} == {OTHER, ALIKE, NEXT}
    metadata.expect_totals()


def test_a_place_is_not_forgotten_while_a_node_of_its_session_has_a_lease(
    metadata: Metadata,
) -> None:
    ledger = metadata.ledger
    for session in ("session_1", "session_10"):
        assert ledger.agree_on_overflow(session, f"of {session}") == f"of {session}"
    ledger.renew(OWNER, GCS, new=True)
    assert not ledger.forget_overflow("session_1")
    assert ledger.forget_overflow("session_10")
    assert ledger.overflows() == {"session_1": "of session_1"}
    ledger.close_account(OWNER)
    assert ledger.forget_overflow("session_1")
    assert ledger.overflows() == {}


# --- what this package cannot have written ---

MALFORMED_NAMES = [
    b"",
    b"\xff",
    b"session",
    b"session_1:aa",
    b"session_1:aa:\xff",
    f"{OWNER}:0000.{0:027x}.1".encode(),  # of the index: without sizes
    f"..:aa:0000.{0:027x}.1.10.20".encode(),  # a path that leads elsewhere
    f"../../victim:aa:0000.{0:027x}.1".encode(),
    f"session_1:..:0000.{0:027x}.1.10.20".encode(),
    f"session_1:aa:0001.{0:027x}.{10**12}.10.20".encode(),  # more chunks than there can be
    f"session_1:aa:\x1b[2J.{0:027x}.1.10.20".encode(),  # clears the terminal that it is shown on
]
MALFORMED_NUMBERS = [b"", b"\xff", b"x", b"1 x", b"a b c d", b"1 2 3 -4", b"nan nan nan nan"]


@pytest.fixture
def littered(metadata: Metadata) -> Metadata:
    """A server with all kinds of what is malformed, and nothing else."""
    client, keys = metadata.client, metadata.keys
    client.config_set("maxmemory", 0)
    client.zadd(keys.index, dict.fromkeys([*MALFORMED_NAMES, b"session_1:aa:zz"], 0))
    client.zadd(keys.pending, dict.fromkeys([*MALFORMED_NAMES[:5], b"~"], 0))
    for key in (keys.usage, keys.writers):
        for number, value in enumerate(MALFORMED_NUMBERS):
            client.hset(key, f"session_{number}:aa", value)
        for field in MALFORMED_NAMES:
            client.hset(key, field, "x")
    client.hset(keys.usage, b"..:..", "1 1 1 1")
    client.hset(keys.writers, b"..:..", "1-x=5/1")
    client.hset(keys.overflows, b"../..", "token")
    client.hset(keys.overflows, b"\xff", "token")
    client.hset(keys.overflows, "session_1", b"../\xff")
    client.zadd(keys.leases, {b"\xff": 1, "session_1:aa:": float("inf")})
    return metadata


def test_what_is_malformed_belongs_to_nobody(littered: Metadata) -> None:
    ledger = littered.ledger
    assert ledger.node_names() == set()
    assert ledger.overflows() == {}
    assert ledger.usages() == {}
    assert ledger.leases() == []
    assert ledger.grants() == {}
    for owner in (OWNER, NodeName("..", "..")):
        assert [entry for page in ledger.stored(owner) for entry in page] == []
        assert [name for page in ledger.pending(owner) for name in page] == []


def test_objects_are_stored_and_forgotten_beside_what_is_malformed(littered: Metadata) -> None:
    ledger = littered.ledger
    first, second = entry(1), entry(2)
    littered.client.zadd(littered.keys.index, {f"{first.name}.x": 0, f"{first.name}.1": 0})
    littered.client.hset(littered.keys.usage, str(OWNER), "some thing")
    littered.store(first, second)
    assert littered.stored(OWNER) == [first, second]
    assert littered.usage() == (2, 20, 40)
    littered.client.hset(littered.keys.usage, str(OWNER), b"\xff")
    assert ledger.recount(OWNER)
    assert littered.usage() == (2, 20, 40)
    assert ledger.node_names() == {OWNER}
    littered.forget(first.name)
    assert littered.stored(OWNER) == [second]
    assert littered.usage() == (1, 10, 20)


def test_bytes_are_granted_beside_what_is_malformed(littered: Metadata) -> None:
    ledger = littered.ledger
    littered.client.hdel(littered.keys.usage, "..:..")
    littered.client.hdel(littered.keys.writers, "..:..")
    assert littered.reserve("w", Grant(0, 0), 5, 50, 10_000, 1000, OTHER) == (50, 0, 50)
    assert littered.reserve("w", Grant(0, 0), 5, 50, 10_000, 1000, OWNER) == (50, 50, 100)
    littered.expect_totals()
    littered.client.hset(littered.keys.writers, str(OWNER), "some thing")
    ledger.close_account(OWNER)
    assert not littered.client.hexists(littered.keys.writers, str(OWNER))
    assert ledger.grants() == {OTHER: {"w": Grant(50, 0)}}


def test_a_malformed_token_of_an_overflow_is_replaced(littered: Metadata) -> None:
    assert littered.ledger.agree_on_overflow("session_1", "token") == "token"
    assert littered.ledger.overflows() == {"session_1": "token"}


def test_what_is_malformed_is_reported_once_for_each_key(
    littered: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = Keyspace(f"of_this_test_{secrets.token_hex(4)}:")
    ledger = Ledger(littered.link, elsewhere)
    for field in ("one", "other"):
        littered.client.hset(elsewhere.usage, field, "x")
    for _ in range(2):
        ledger.usages()
        ledger.node_names()
    (message,) = [text for text in caplog.messages if elsewhere.usage in text]
    assert "b'one' b'x'" in message


@contextlib.contextmanager
def room(metadata: Metadata) -> Iterator[None]:
    """The server has room meanwhile: what ZADD enters is not entered on a full one."""
    (limit,) = metadata.client.config_get("maxmemory").values()
    metadata.client.config_set("maxmemory", 0)
    yield
    metadata.client.config_set("maxmemory", limit)
