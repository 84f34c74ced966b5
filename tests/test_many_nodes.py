"""What an operation costs does not depend on how many nodes the namespace has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from support.clock import Clock
from support.owners import Oracle
from support.samples import get, noise, source
from support.servers import Server
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Entry, NodeName, ObjectName
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.cleanup import CleanUp
from ray_valkey_spill.store.reclaim import Pace
from ray_valkey_spill.tiers.ledger import Grant, Ledger, link_to
from ray_valkey_spill.units import MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

SESSION, NODE = "session_1", "ab" * 28
GCS = "127.0.0.1:6379"
# What a round sends: a renewal, what is pending, the totals; the server's memory; its own grants.
_ROUND = {"eval": 3, "info": 1, "hget": 1}


class Fleet:
    """A node whose operations are counted, and others of its namespace that only have metadata."""

    def __init__(self, server: Server) -> None:
        self.client = server.client
        self.config = Config.load({"url": server.url, "max_bytes": 1 << 40}, {})
        self.store = Store(self.config, SESSION, NODE)
        self.link = link_to(self.config)
        self.ledger = Ledger(self.link, self.store.keys)

    def add_others(self, count: int) -> None:
        keys = self.store.keys
        with self.client.pipeline(transaction=False) as pipeline:
            for number in range(count):
                owner = NodeName(f"session_{number % 7}", f"{number:056x}")
                name = ObjectName(*owner, "c" * 56, f"{number:027x}", 1)
                pipeline.zadd(keys.index, {str(Entry(name, 900_000, 900_500)): 0})
                pipeline.hset(keys.usage, str(owner), f"1 900000 900500 {number}")
                pipeline.hset(keys.writers, str(owner), " ".join(f"{i}-ab=10/0" for i in range(8)))
                pipeline.zadd(keys.leases, {f"{owner}:{GCS}": number})
            pipeline.delete(keys.totals)
            pipeline.execute()
        assert self.ledger.recount_totals()

    def calls(self, operation: Callable[[], object]) -> dict[str, int]:
        """How many times the server carries out each command, also in scripts."""
        self.client.config_resetstat()
        operation()
        stats = self.client.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): stats[name]["calls"] for name in stats}
        return {name: count for name, count in calls.items() if not name.startswith("config")}

    def close(self) -> None:
        self.store.destroy(lambda pid: False)
        self.store.close()
        self.link.close()
        for key in self.client.keys(f"{self.store.keys.root}*"):
            self.client.delete(key)


@pytest.fixture
def fleet(server: Server) -> Iterator[Fleet]:
    made = Fleet(server)
    yield made
    made.close()


def operations(fleet: Fleet) -> dict[str, Callable[[], object]]:
    store, urls = fleet.store, list[str]()
    node, nothing = store.node, Grant(0, 0)

    def spill() -> None:
        more, failure = store.put([source(noise(900_000))])
        assert failure is None
        urls.extend(more)

    def reserve() -> None:
        fleet.link.execute(fleet.ledger.reservation(node, "1-x", nothing, 5, 5, MIB, None))

    return {
        "spill": spill,
        "restore": lambda: get(store, urls[-1]),
        "delete": lambda: store.delete([urls.pop()]),
        "reservation": reserve,
        "release": lambda: fleet.ledger.release(node, ["1-x"]),
        "renewal": lambda: store.renew_lease(GCS, lambda: False),
        "room": store.room,
        "recovery": lambda: store.recover(lambda pid: True),
        "give back": store.give_back,
        "totals": fleet.ledger.totals,
    }


def test_operations_cost_the_same_beside_two_thousand_nodes(fleet: Fleet) -> None:
    fleet.add_others(1)
    every = operations(fleet)
    for operation in every.values():
        operation()  # connections, and what only the first one does
    alone = {name: fleet.calls(operation) for name, operation in every.items()}
    fleet.add_others(2000)
    among_many = {name: fleet.calls(operation) for name, operation in every.items()}
    assert among_many == alone
    # Nor does any of these commands read or write more than what is the node's own.
    reading_all = {"hgetall", "hvals", "hkeys", "hscan", "keys", "scan", "zrange"}
    assert not reading_all & {name for calls in among_many.values() for name in calls}


def test_a_round_of_an_idle_node_is_a_handful_of_commands(fleet: Fleet) -> None:
    """A node's keeper does one every ten seconds or so."""
    store = fleet.store

    def do_a_round() -> None:
        store.renew_lease(GCS, lambda: False)
        store.room()
        store.recover(lambda pid: True)
        store.background.give_back()

    fleet.add_others(1)
    do_a_round()
    alone = fleet.calls(do_a_round)
    sent = {name: alone.get(name, 0) for name in _ROUND}
    assert sent == _ROUND
    fleet.add_others(200)
    assert fleet.calls(do_a_round) == alone


def test_an_idle_node_reclaims_at_the_same_cost_beside_two_hundred_others(fleet: Fleet) -> None:
    """A minute of it, with looks at the leases: other nodes come before it to look after the dead.

    What the one node of a session that does look after them reads grows with their number.
    """
    clock, first = Clock(), [f"{number:056x}" for number in range(3)]
    owners = Oracle(*first, NODE)
    urls, _ = fleet.store.put([source(noise(1000))])
    reclaimer = fleet.store.background.reclaimer(owners, Pace(age=0.0), clock.monotonic)

    def do_a_minute() -> None:
        for node in (*first, NODE):
            lease = {f"{NodeName(SESSION, node)}:{GCS}": 1000 * time.time()}
            fleet.client.zadd(fleet.store.keys.leases, lease)
        for _ in range(6):
            reclaimer.step()
            clock.sleep(10.0)

    fleet.add_others(1)
    do_a_minute()
    alone = fleet.calls(do_a_minute)
    assert alone["zrange"] >= 1
    assert owners.asked
    fleet.add_others(200)
    assert fleet.calls(do_a_minute) == alone
    fleet.store.delete(urls)


# --- metadata of version 0.1 ---

# As its scripts wrote them.
_SETTLE_0_1 = """
local settled, objects, size, stored = 0, 0, 0, 0
for i = 2, #ARGV, 2 do
    if redis.call('ZREM', KEYS[1], ARGV[i]) == 1 then
        redis.call('ZADD', KEYS[2], 0, ARGV[i] .. ARGV[i + 1])
        local z, s = ARGV[i + 1]:match('^%.(%d+)%.(%d+)$')
        objects, size, stored = objects + 1, size + z, stored + s
        settled = settled + 1
    end
end
local was = redis.call('HGET', KEYS[3], ARGV[1]) or ''
local o, z, s, c = was:match('^(%d+) (%d+) (%d+) (%d+)$')
if not o then
    local now = redis.call('TIME')
    o, z, s, c = 0, 0, 0, now[1] * 1000000 + now[2]
end
redis.call('HSET', KEYS[3], ARGV[1], string.format('%.0f %.0f %.0f %.0f',
    o + objects, math.max(0, z + size), math.max(0, s + stored), c + 1))
return settled
"""


class Old:
    """What nodes of version 0.1 have on a server."""

    def __init__(self, fleet: Fleet) -> None:
        self.keys = fleet.store.keys
        self._client = fleet.client

    def node(self, owner: NodeName, objects: int, pid: int) -> None:
        """One with objects, with a half-written one, and with a writer that has a grant."""
        names = [
            ObjectName(*owner, f"{i:056x}", f"{1:011x}{pid:08x}{i:08x}", 1)
            for i in range(objects + 1)
        ]
        keys = self.keys
        for name in names:
            self._client.zadd(keys.pending, {str(name): 0})
            self._client.set(keys.header(name), "header")
            self._client.set(keys.chunks(name)[0], "chunk")
        fields = [part for name in names[:-1] for part in (str(name), ".1000.1500")]
        self._client.eval(_SETTLE_0_1, 3, keys.pending, keys.index, keys.usage, str(owner), *fields)
        self._client.hset(keys.grants, f"{owner}:{pid}-abcd1234", "5000 1500")
        self._client.execute_command("ZADD", keys.leases, 1, f"{owner}:")


@pytest.fixture
def old(fleet: Fleet) -> Old:
    return Old(fleet)


def test_what_version_0_1_has_stored_counts_from_the_first_spill_on(fleet: Fleet, old: Old) -> None:
    old.node(NodeName(SESSION, "old"), 3, pid=4711)
    assert fleet.ledger.totals()[:3] == (3, 3000, 4500)
    urls, failure = fleet.store.put([source(noise(1000))])
    assert failure is None
    (ours,) = [u for owner, u in fleet.ledger.usages().items() if owner == fleet.store.node]
    assert fleet.ledger.totals()[:3] == (4, 4000, 4500 + ours.stored)
    assert fleet.ledger.usages()[NodeName(SESSION, "old")][:3] == (3, 3000, 4500)
    fleet.store.delete(urls)
    assert fleet.ledger.totals()[:3] == (3, 3000, 4500)


def test_what_version_0_1_stores_beside_a_later_one_is_counted_by_the_next_recount(
    fleet: Fleet, old: Old
) -> None:
    fleet.store.put([source(noise(1000))])
    before = fleet.ledger.totals()
    old.node(NodeName(SESSION, "old"), 2, pid=4711)
    with contextlib.closing(CleanUp(fleet.config, lambda address: None)) as look:
        look.recount()
    assert fleet.ledger.totals()[:3] == (before[0] + 2, before[1] + 2000, before[2] + 3000)


def test_what_killed_writers_of_version_0_1_have_left_is_recovered_by_their_node(
    fleet: Fleet, old: Old
) -> None:
    old.node(fleet.store.node, 2, pid=4711)
    assert fleet.store.recover(lambda pid: pid != 4711) == 1
    assert list(fleet.ledger.pending(fleet.store.node)) == []
    assert fleet.ledger.totals()[:3] == (2, 2000, 3000)
    fleet.store.destroy(lambda pid: False)
    assert fleet.client.keys(f"{old.keys.root}*") == []


def test_dead_nodes_of_version_0_1_are_cleaned_up_with_their_grants(
    fleet: Fleet, old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, living = NodeName("session_dead", "n"), NodeName("session_living", "n")
    old.node(dead, 3, pid=4711)
    old.node(living, 3, pid=4712)
    clock = Clock()
    monkeypatch.setattr(cleanup, "time", clock)
    clock.every(5, lambda: fleet.client.zincrby(old.keys.leases, 5000, f"{living}:"))
    with contextlib.closing(CleanUp(fleet.config, lambda address: None)) as look:
        remains = look.find()
        assert [each.node_name for each in remains] == [dead]
        assert (remains[0].usage.objects, remains[0].pending) == (3, 1)
        look.remove(remains)
        look.recount()
    assert {*fleet.ledger.node_names()} == {living}
    assert fleet.client.hkeys(old.keys.grants) == [f"{living}:4712-abcd1234".encode()]
    assert fleet.ledger.totals()[:5] == (3, 3000, 4500, 0, 0)
    assert not [key for key in fleet.client.keys("*") if b"session_dead" in key]
