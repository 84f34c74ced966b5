"""The books on the server: their scripts may be sent twice, and on a full server."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator
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
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName, Owner
from ray_valkey_spill.protocol.resp import Request
from ray_valkey_spill.tiers.ledger import Grant, Ledger, Usage, link_to
from ray_valkey_spill.units import MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

OWNER, OTHER = Owner("session_1", "aa"), Owner("session_1", "bb")
# Beside those: the one's name begins as theirs, the other comes right after them.
ALIKE, NEXT = Owner("session_1", "aab"), Owner("session_10", "aa")
GCS = "127.0.0.1:6379"


class Books:
    """A ledger, what it is on, and how often each of its scripts is sent."""

    def __init__(self, url: str, client: valkey.Valkey) -> None:
        config = Config.load({"url": url, "retry_timeout": 5}, {})
        self.keys = Keyspace.of(config)
        self.client = client
        self.link = link_to(config)
        self.ledger = Ledger(self.link, self.keys)

    def send(self, requests: Iterable[Request]) -> int:
        """Send `requests`, and return the sum of the replies that are numbers."""
        replies = self.link.execute(*requests)
        return sum(reply for reply in replies if isinstance(reply, int))

    def register(self, *names: ObjectName) -> None:
        self.send(self.ledger.registrations(names))

    def settle(self, *entries: Entry, owner: Owner = OWNER) -> int:
        return self.send(self.ledger.settlements(owner, entries))

    def forget(self, *names: ObjectName) -> None:
        self.send(self.ledger.forget(names))

    def store(self, *entries: Entry, owner: Owner = OWNER) -> None:
        self.register(*(entry.name for entry in entries))
        assert self.settle(*entries, owner=owner) == len(entries)

    def stored(self, owner: Owner | None = None) -> list[Entry]:
        return [entry for page in self.ledger.stored(owner) for entry in page]

    def pending(self, owner: Owner = OWNER) -> list[ObjectName]:
        return [name for page in self.ledger.pending(owner) for name in page]

    def usage(self, owner: Owner = OWNER) -> tuple[int, ...]:
        return self.ledger.usages().get(owner, Usage())[:3]


def entry(number: int, owner: Owner = OWNER, size: int = 10, stored: int = 20) -> Entry:
    return Entry(ObjectName(*owner, f"{number:08x}", f"{number:027x}", 1), size, stored)


@pytest.fixture(scope="module", params=PRODUCTS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with server_of(request.param, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(params=[0, 1], ids=["with room", "full"])
def books(running: tuple[str, valkey.Valkey], request: pytest.FixtureRequest) -> Iterator[Books]:
    """On a server with room, and on one that is full."""
    url, client = running
    client.flushall()
    client.config_set("maxmemory", request.param)
    made = Books(url, client)
    yield made
    made.link.close()
    client.config_set("maxmemory", 0)
    client.flushall()


# --- what is stored and what is being written ---


def test_what_is_registered_is_pending_and_what_is_settled_is_stored(books: Books) -> None:
    books.client.config_set("maxmemory", 0)  # an object is registered with ZADD
    first, second = entry(1, size=3, stored=7), entry(2, size=30, stored=70)
    books.register(first.name, second.name)
    assert books.pending() == [first.name, second.name]
    assert books.stored() == []
    assert books.settle(first, second) == 2
    assert books.pending() == []
    assert books.stored() == [first, second]
    assert books.usage() == (2, 33, 77)
    books.forget(first.name)
    assert books.stored() == [second]
    assert books.usage() == (1, 30, 70)
    books.forget(second.name)
    assert books.client.keys("*") == []


def test_each_script_does_the_same_when_it_comes_twice(books: Books) -> None:
    stored = [entry(i) for i in range(250)]  # more than one script takes
    with room(books):
        books.register(*(each.name for each in stored))
    for _ in range(2):
        assert books.settle(*stored) == 250
        assert books.usage() == (250, 2500, 5000)
    for _ in range(2):
        books.forget(*(each.name for each in stored[:130]))
        assert books.usage() == (120, 1200, 2400)
    for _ in range(2):
        assert books.ledger.reserve("w", Grant(0, 0), 5, 50, 10_000, None) == (50, 2400, 50)
        assert books.ledger.reserve("w", Grant(50, 20), 5, 50, 10_000, None) == (50, 2450, 80)
        assert books.ledger.grants() == {"w": Grant(100, 20)}
    for _ in range(2):
        books.ledger.release(["w"])
        assert books.ledger.grants() == {}
    for _ in range(2):
        assert books.ledger.renew(OWNER, GCS, new=True)
        assert [lease.owner for lease in books.ledger.leases()] == [OWNER]
    for _ in range(2):
        assert books.ledger.agree_on_overflow("session_1", "token") == "token"
        assert books.ledger.agree_on_overflow("session_1", "another") == "token"
    for _ in range(2):
        books.ledger.close_account(OWNER)
        assert books.ledger.leases() == []
    for _ in range(2):
        assert books.ledger.forget_overflow("session_1")
        assert books.ledger.overflows() == {}


def test_a_settlement_that_comes_late_after_a_deletion_stores_nothing(books: Books) -> None:
    kept, deleted = entry(1), entry(2)
    with room(books):
        books.register(kept.name, deleted.name)
    assert books.settle(kept, deleted) == 2
    books.forget(deleted.name)
    assert books.settle(kept, deleted) == 1
    assert books.stored() == [kept]
    assert books.usage() == (1, 10, 20)


def test_what_was_destroyed_or_never_registered_is_not_settled(books: Books) -> None:
    registered, never = entry(1), entry(2)
    with room(books):
        books.register(registered.name)
    assert books.settle(registered, never) == 1
    assert books.stored() == [registered]


def test_a_registration_that_comes_late_does_not_make_a_stored_object_half_written(
    books: Books,
) -> None:
    with room(books):
        books.store(entry(1))
        books.register(entry(1).name)
        assert books.pending() == []
        books.forget(entry(1).name)
    assert books.client.keys("*") == []


def test_what_is_forgotten_of_several_nodes_is_taken_from_each(books: Books) -> None:
    with room(books):
        for owner in (OWNER, OTHER):
            books.store(entry(1, owner), entry(2, owner), owner=owner)
    books.forget(*(entry(i, owner).name for owner in (OWNER, OTHER) for i in (1, 7)))
    assert books.ledger.usages().keys() == {OWNER, OTHER}
    assert books.usage(OWNER) == books.usage(OTHER) == (1, 10, 20)


def test_books_are_read_by_the_page_and_by_the_node(books: Books) -> None:
    count = 1203
    stored = {o: [entry(i, o) for i in range(count)] for o in (OWNER, ALIKE, NEXT)}
    half = [entry(i).name for i in range(count, 2 * count)]
    with room(books):
        for owner, entries in stored.items():
            books.store(*entries, owner=owner)
        # Whole pages of what is stored already hide nothing of what is pending.
        books.register(*(each.name for each in stored[OWNER]), *half)
    for owner, entries in stored.items():
        assert books.stored(owner) == entries
    assert len(books.stored()) == 3 * count
    assert max(map(len, books.ledger.stored())) < count
    assert books.pending() == half
    assert books.pending(ALIKE) == books.pending(NEXT) == []


def test_everybody_in_any_book_is_an_owner(books: Books) -> None:
    session = "session_1"
    with room(books):
        books.store(*(entry(i, Owner(session, "a")) for i in range(3)), owner=Owner(session, "a"))
        books.register(*(entry(i, Owner(session, "b")).name for i in range(3)))
        books.store(entry(0, Owner("session_0", "z")), owner=Owner("session_0", "z"))
    books.ledger.renew(Owner(session, "c"), GCS, new=True)
    books.ledger.reserve(f"{session}:d:1-x", Grant(0, 0), 1, 1, None, None)
    books.client.delete(books.keys.usage)
    nodes = {*map(Owner, [session] * 4, "abcd")}
    assert books.ledger.owners() == {*nodes, Owner("session_0", "z")}


# --- usage ---


@pytest.mark.parametrize("drift", ["999 999 999 5", "1 1 1 5", None])
def test_a_recount_corrects_drift(books: Books, drift: str | None) -> None:
    with room(books):
        books.store(*(entry(i) for i in range(600)))
        books.client.delete(books.keys.usage)
        if drift:
            books.client.hset(books.keys.usage, str(OWNER), drift)
    assert books.ledger.recount(OWNER)
    assert books.usage() == (600, 6000, 12_000)


def test_a_recount_of_a_node_that_has_nothing_leaves_nothing(books: Books) -> None:
    assert books.ledger.recount(OWNER)
    assert books.client.keys("*") == []
    books.client.config_set("maxmemory", 0)
    books.client.hset(books.keys.usage, str(OWNER), "3 3 3 5")
    assert books.ledger.recount(OWNER)
    assert books.client.keys("*") == []


def test_a_recount_removes_a_usage_of_nothing(books: Books) -> None:
    """As a recount leaves it that is killed, or gives up, while it counts anew."""
    books.client.config_set("maxmemory", 0)
    books.client.hset(books.keys.usage, str(OWNER), "0 0 0 5")
    assert books.ledger.owners() == {OWNER}
    assert books.ledger.recount(OWNER)
    assert books.client.keys("*") == []
    assert books.ledger.owners() == set()


def test_usage_is_never_negative(books: Books) -> None:
    with room(books):
        books.store(*(entry(i) for i in range(3)))
        books.client.hset(books.keys.usage, str(OWNER), "3 5 5 9")
    books.forget(entry(0).name)
    assert books.usage() == (2, 0, 0)
    books.forget(entry(1).name)
    books.forget(entry(2).name)
    assert books.usage() == (0, 0, 0)


def _nothing(books: Books) -> None:
    pass


def _forget_the_first(books: Books) -> None:
    books.forget(entry(0).name)


def _store_a_second(books: Books) -> None:
    books.store(entry(1))


def _forget_the_second(books: Books) -> None:
    books.forget(entry(1).name)


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
    books: Books,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[Books], None],
    after: Callable[[Books], None],
    is_known: bool,
    attempt: int,
) -> None:
    read, attempts = books.ledger.stored, itertools.count()

    def while_it_changes(owner: Owner | None = None) -> Iterator[list[Entry]]:
        changes = next(attempts) == attempt
        before(books) if changes else None
        pages = list(read(owner))
        after(books) if changes else None
        yield from pages

    with room(books):
        books.store(entry(0))
        if not is_known:
            books.client.delete(books.keys.usage)
        monkeypatch.setattr(books.ledger, "stored", while_it_changes)
        assert books.ledger.recount(OWNER)
        monkeypatch.undo()
    count = len(books.stored())
    assert books.usage() == (count, 10 * count, 20 * count)


def test_a_recount_of_what_changes_all_the_time_is_given_up(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    with room(books):
        books.store(entry(0), entry(1))
        books.client.hset(books.keys.usage, str(OWNER), "7 7 7 7")
        read = books.ledger.stored
        numbers = iter(range(2, 100))

        def growing(owner: Owner | None = None) -> Iterator[list[Entry]]:
            yield from read(owner)
            books.store(entry(next(numbers)))

        monkeypatch.setattr(books.ledger, "stored", growing)
        assert not books.ledger.recount(OWNER)
        monkeypatch.undo()
        assert books.ledger.recount(OWNER)
    assert books.usage()[0] == len(books.stored())


def test_registering_settling_forgetting_and_recounting_in_any_order_keeps_books_right(
    running: tuple[str, valkey.Valkey],
) -> None:
    url, client = running
    books = Books(url, client)
    numbers = st.lists(st.integers(0, 7), max_size=5, unique=True)

    class Bookkeeping(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            client.flushall()
            self.pending: set[int] = set()
            self.stored: set[int] = set()

        @rule(numbers=numbers)
        def register(self, numbers: list[int]) -> None:
            books.register(*(entry(i).name for i in numbers))
            self.pending |= {*numbers}

        @rule(numbers=numbers)
        def settle(self, numbers: list[int]) -> None:
            settled = {*numbers} & (self.pending | self.stored)
            assert books.settle(*(entry(i) for i in numbers)) == len(settled)
            self.stored |= settled
            self.pending -= settled

        @rule(numbers=numbers)
        def forget(self, numbers: list[int]) -> None:
            books.forget(*(entry(i).name for i in numbers))
            self.stored -= {*numbers}
            self.pending -= {*numbers}

        @rule()
        def drift_and_recount(self) -> None:
            client.hset(books.keys.usage, str(OWNER), "5 1 1 1")
            assert books.ledger.recount(OWNER)

        @invariant()
        def books_tell_what_is_there(self) -> None:
            count = len(self.stored)
            assert books.stored() == [entry(i) for i in sorted(self.stored)]
            assert books.pending() == [entry(i).name for i in sorted(self.pending - self.stored)]
            assert books.usage() == (count, 10 * count, 20 * count)

    run_state_machine_as_test(
        Bookkeeping, settings=settings(max_examples=15, stateful_step_count=20, deadline=None)
    )
    books.link.close()
    client.flushall()


# --- grants ---


def test_grants_and_what_is_stored_share_the_budget(books: Books) -> None:
    with room(books):
        books.store(entry(1, stored=600))
    ledger = books.ledger
    assert ledger.reserve("a", Grant(0, 0), 1, 300, 1000, None) == (300, 600, 300)
    assert ledger.reserve("b", Grant(0, 0), 1, 300, 1000, None) == (100, 900, 400)
    assert ledger.reserve("c", Grant(0, 0), 1, 300, 1000, None) == (0, 1000, 400)
    assert ledger.reserve("a", Grant(300, 300), 1, 300, 1000, None) == (0, 1000, 100)
    ledger.release(["a"])
    assert ledger.reserve("c", Grant(0, 0), 300, 300, 1000, None) == (300, 700, 400)
    assert ledger.grants() == {"b": Grant(100, 0), "c": Grant(300, 0)}


def test_less_than_the_least_that_is_wanted_is_not_granted(books: Books) -> None:
    assert books.ledger.reserve("a", Grant(0, 0), 101, 500, 100, None) == (0, 0, 0)
    assert books.ledger.reserve("a", Grant(0, 0), 100, 500, 100, None) == (100, 0, 100)
    assert books.ledger.reserve("b", Grant(0, 0), 0, 0, 0, 0) == (0, 100, 100)


def test_room_is_shared_with_what_others_may_still_write(books: Books) -> None:
    ledger = books.ledger
    assert ledger.reserve("a", Grant(0, 0), 1, 60, None, 100) == (60, 0, 60)
    assert ledger.reserve("b", Grant(0, 0), 1, 60, None, 100) == (40, 60, 100)
    # The 50 that it has written since are in what the server has, which left 50.
    assert ledger.reserve("a", Grant(60, 50), 1, 60, None, 50) == (0, 100, 50)
    ledger.release(["b"])
    assert ledger.reserve("a", Grant(60, 50), 1, 60, None, 50) == (40, 60, 50)


def test_what_was_written_before_there_were_limits_needs_no_room(books: Books) -> None:
    granted = books.ledger.reserve("a", Grant(0, 1000), 1005, 1060, None, 10)
    assert granted == (1010, 0, 10)
    assert books.ledger.grants() == {"a": Grant(1010, 1000)}
    assert books.ledger.reserve("b", Grant(0, 0), 1, 60, None, 10) == (0, 1010, 10)


def test_amounts_above_any_length_of_a_value_are_told(books: Books) -> None:
    terabyte = 1 << 40
    books.client.config_set("maxmemory", 0)
    books.client.hset(books.keys.usage, str(OWNER), f"9 9 {3 * terabyte} 9")
    granted = books.ledger.reserve("a", Grant(0, 0), terabyte, 2 * terabyte, 5 * terabyte, None)
    assert granted == (2 * terabyte, 3 * terabyte, 2 * terabyte)
    assert books.ledger.grants() == {"a": Grant(2 * terabyte, 0)}
    refused = books.ledger.reserve("b", Grant(0, 0), 1, 1, 5 * terabyte, None)
    assert refused == (0, 5 * terabyte, 2 * terabyte)


def test_releasing_all_grants_of_a_node_leaves_those_of_others(books: Books) -> None:
    writers = [f"{OWNER}:1-x", f"{OWNER}:2-y", f"{OTHER}:1-x", f"{ALIKE}:1-x"]
    for writer in writers:
        books.ledger.reserve(writer, Grant(0, 0), MIB, MIB, None, None)
    books.ledger.release_all(OWNER)
    assert [*books.ledger.grants()] == writers[2:]


# --- leases and places ---


def test_a_lease_is_dated_by_the_server_and_renewed_only_where_there_is_one(books: Books) -> None:
    ledger = books.ledger
    assert not ledger.renew(OWNER, GCS, new=False)
    assert books.client.keys("*") == []
    before = ledger.time()
    assert ledger.renew(OWNER, "[::1]:6379", new=True)
    (lease,) = ledger.leases()
    assert (lease.owner, lease.gcs_address) == (OWNER, "[::1]:6379")
    assert before <= lease.renewed <= ledger.time()
    books.client.config_set("maxmemory", 0)
    books.client.zadd(books.keys.leases, {f"{OWNER}:[::1]:6379": 1})
    assert ledger.renew(OWNER, "[::1]:6379", new=False)
    (lease,) = ledger.leases()
    assert lease.renewed >= before


def test_what_is_no_lease_of_ours_is_passed_over(books: Books) -> None:
    books.ledger.renew(OWNER, GCS, new=True)
    books.client.config_set("maxmemory", 0)
    forged = [b"\xff", b"session", b"a:b", b"../../victim:n:", b"s:..:x", b"s:n:a b", b"s:n:\n"]
    books.client.zadd(books.keys.leases, dict.fromkeys(forged, 1))
    assert [lease.owner for lease in books.ledger.leases()] == [OWNER]


def test_an_account_is_closed_with_every_lease_and_grant_of_it_and_nothing_of_others(
    books: Books,
) -> None:
    ledger = books.ledger
    for owner in (OWNER, OTHER, ALIKE, NEXT):
        ledger.renew(owner, GCS, new=True)
        ledger.reserve(f"{owner}:1-x", Grant(0, 0), 1, 1, None, None)
    ledger.renew(OWNER, "127.0.0.1:6380", new=True)
    ledger.close_account(OWNER)
    assert {lease.owner for lease in ledger.leases()} == {OTHER, ALIKE, NEXT}
    assert [*ledger.grants()] == [f"{owner}:1-x" for owner in (OTHER, ALIKE, NEXT)]


def test_a_place_is_not_forgotten_while_a_node_of_its_session_has_a_lease(books: Books) -> None:
    ledger = books.ledger
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
]
MALFORMED_NUMBERS = [b"", b"\xff", b"x", b"1 x", b"a b c d", b"1 2 3 -4", b"nan nan nan nan"]


@pytest.fixture
def littered(books: Books) -> Books:
    """A server with all kinds of what is malformed, and nothing else."""
    client, keys = books.client, books.keys
    client.config_set("maxmemory", 0)
    client.zadd(keys.index, dict.fromkeys([*MALFORMED_NAMES, b"session_1:aa:zz"], 0))
    client.zadd(keys.pending, dict.fromkeys([*MALFORMED_NAMES[:5], b"~"], 0))
    for book in (keys.usage, keys.grants):
        end = ":writer" if book == keys.grants else ""
        for number, value in enumerate(MALFORMED_NUMBERS):
            client.hset(book, f"session_{number}:aa{end}", value)
        for field in MALFORMED_NAMES:
            client.hset(book, field, "x")
    client.hset(keys.usage, b"..:..", "1 1 1 1")
    client.hset(keys.grants, b"..:..:writer", "0 0")
    client.hset(keys.overflows, b"../..", "token")
    client.hset(keys.overflows, b"\xff", "token")
    client.hset(keys.overflows, "session_1", b"../\xff")
    client.zadd(keys.leases, {b"\xff": 1, "session_1:aa:": float("inf")})
    return books


def test_what_is_malformed_belongs_to_nobody(littered: Books) -> None:
    ledger = littered.ledger
    assert ledger.owners() == set()
    assert ledger.overflows() == {}
    assert ledger.usages() == {}
    assert ledger.leases() == []
    assert [*ledger.grants()] == ["..:..:writer"]
    for owner in (OWNER, Owner("..", "..")):
        assert [entry for page in ledger.stored(owner) for entry in page] == []
        assert [name for page in ledger.pending(owner) for name in page] == []


def test_objects_are_stored_and_forgotten_beside_what_is_malformed(littered: Books) -> None:
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
    assert ledger.owners() == {OWNER}
    littered.forget(first.name)
    assert littered.stored(OWNER) == [second]
    assert littered.usage() == (1, 10, 20)


def test_bytes_are_granted_beside_what_is_malformed(littered: Books) -> None:
    ledger = littered.ledger
    littered.client.hdel(littered.keys.usage, "..:..")
    assert ledger.reserve("w", Grant(0, 0), 5, 50, 10_000, 1000) == (50, 0, 50)
    ledger.close_account(Owner("session_1", "aa"))
    assert not littered.client.hexists(littered.keys.grants, "session_1:aa:writer")
    assert ledger.grants()["w"] == Grant(50, 0)


def test_a_malformed_token_of_an_overflow_is_replaced(littered: Books) -> None:
    assert littered.ledger.agree_on_overflow("session_1", "token") == "token"
    assert littered.ledger.overflows() == {"session_1": "token"}


def test_what_is_malformed_is_reported_once_for_each_key(
    littered: Books, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = Keyspace(f"of_this_test_{secrets.token_hex(4)}:")
    ledger = Ledger(littered.link, elsewhere)
    for field in ("one", "other"):
        littered.client.hset(elsewhere.usage, field, "x")
    for _ in range(2):
        ledger.usages()
        ledger.owners()
    (message,) = [text for text in caplog.messages if elsewhere.usage in text]
    assert "b'one' b'x'" in message


@contextlib.contextmanager
def room(books: Books) -> Iterator[None]:
    """The server has room meanwhile: what ZADD enters is not entered on a full one."""
    (limit,) = books.client.config_get("maxmemory").values()
    books.client.config_set("maxmemory", 0)
    yield
    books.client.config_set("maxmemory", limit)
