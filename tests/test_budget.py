"""The budget: what is stored never exceeds it, as the server tells it, and all of it is usable."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from support.rigs import Rig
from support.samples import get, noise, source
from support.servers import PRODUCTS, Server, server_of, valkey_server, wait_until
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ServerFullError, ServerUnavailableError
from ray_valkey_spill.format.names import Keyspace, NodeName, ObjectName
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import Request
from ray_valkey_spill.store.cleanup import CleanUp
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import ObjectStore
from ray_valkey_spill.tiers.budget import Budget
from ray_valkey_spill.tiers.ledger import Grant, Ledger, Usage, link_to
from ray_valkey_spill.tiers.room import cost, margin, member_cost
from ray_valkey_spill.units import MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

SESSION, NODE = "session_1", "ab" * 28
HERE = NodeName(SESSION, NODE)
CHUNK = 10_000
GIB = 1 << 30

# At one moment: data keys of a namespace and the lengths of their values; usages, grants, totals.
_LOOK = """
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*:*:*')) do
    table.insert(found, key)
    table.insert(found, redis.call('STRLEN', key))
end
return {found, redis.call('HVALS', KEYS[1]), redis.call('HVALS', KEYS[2]),
        redis.call('GET', KEYS[3]) or '0 0 0 0 0 0'}
"""


class Look(NamedTuple):
    """What is on the server at one moment, in bytes.

    Attributes:
        taken: what the keys take, and what the index takes of what is whole.
        stored: the sum of what the metadata say that nodes have stored.
        granted: the sum of what writers are granted.
        totals: both, by the totals.
    """

    taken: int
    stored: int
    granted: int
    totals: tuple[int, int]


class Tenant:
    """Stores of a namespace with a budget, and what is really there."""

    def __init__(self, server: Server, **params: Any) -> None:
        self.params = {"url": server.url, "chunk_size": CHUNK, **params}
        self.config = Config.load(self.params, {})
        self.client = server.client
        self.keys = Keyspace.of(self.config)
        self._stores: list[Store] = []
        self._link = link_to(self.config)
        self.ledger = Ledger(self._link, self.keys)

    def store(self, node: str = NODE, **params: Any) -> Store:
        config = Config.load({**self.params, **params}, {})
        self._stores.append(Store(config, SESSION, node))
        return self._stores[-1]

    @contextlib.contextmanager
    def batch(self, writer: str = "1-x", max_bytes: int | None = None) -> Iterator[Budget]:
        """The budget of a writer that has put nothing yet and begins to; it keeps nothing."""
        budget = self.budget(writer, max_bytes)
        with begun(budget):
            yield budget
        budget.give_back(self.ledger, idle=0.0)

    def budget(self, writer: str, max_bytes: int | None) -> Budget:
        return Budget(self._link, self.ledger, HERE, writer, max_bytes, "or do without")

    def grant(self, node: NodeName, writer: str, size: int) -> None:
        request = self.ledger.reservation(node, writer, Grant(0, 0), size, size, None, None)
        self._link.execute(request)

    def granted(self) -> int:
        """Bytes that all writers are granted."""
        return self.ledger.totals().granted

    def looked(self, budget: Budget) -> bool:
        """Whether a writer's look at the room was due, which it has taken then."""
        asked = list(self._link.run(budget.looks()))
        return bool([budget.hear(request) for request in asked])

    def look(self) -> Look:
        keys = self.keys
        found, usages, writers, totals = self.client.eval(
            _LOOK, 3, keys.usage, keys.writers, keys.totals, keys.root
        )
        lengths = {key.decode(): size for key, size in zip(found[::2], found[1::2])}
        headers = [key for key in lengths if key.count(":") == keys.root.count(":") + 2]
        members = sum(member_cost(len(key.removeprefix(keys.root))) for key in headers)
        grants = [grant for value in writers for grant in value.split()]
        _, _, stored, granted, _, _ = map(int, totals.split())
        return Look(
            taken=members + sum(cost(len(key), size) for key, size in lengths.items()),
            stored=sum(int(value.split()[2]) for value in usages),
            granted=sum(int(re.split(b"[=/]", grant)[1]) for grant in grants),
            totals=(stored, granted),
        )

    def taken(self) -> int:
        """As in `Look`."""
        return self.look().taken

    def counted(self) -> int:
        return sum(usage.stored for usage in self.ledger.usages().values())

    def data_keys(self) -> list[bytes]:
        return sorted(self.client.keys(f"{self.keys.root}*:*:*"))

    def close(self) -> None:
        for store in self._stores:
            store.destroy(lambda pid: False)
            store.close()
        self._link.close()


@contextlib.contextmanager
def begun(budget: Budget, size: int = 0) -> Iterator[None]:
    """A batch."""
    budget.begin(size)
    try:
        yield
    finally:
        budget.end()


@pytest.fixture
def tenants(server: Server) -> Iterator[list[Tenant]]:
    made: list[Tenant] = []
    yield made
    server.client.config_set("maxmemory", 0)
    for tenant in made:
        tenant.close()


@pytest.fixture
def tenant(server: Server, tenants: list[Tenant]) -> Any:
    def make(**params: Any) -> Tenant:
        tenants.append(Tenant(server, **params))
        return tenants[-1]

    return make


def fill(store: Store, size: int) -> tuple[list[str], ServerFullError]:
    """Put objects of `size` bytes until one is refused."""
    urls: list[str] = []
    while True:
        more, failure = store.put([source(noise(size, len(urls)))])
        urls += more
        if failure is not None:
            assert isinstance(failure, ServerFullError), failure
            return urls, failure


# --- what a key costs ---


@pytest.fixture(scope="module", params=PRODUCTS)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client of a server that nobody else uses."""
    with server_of(request.param, tmp_path_factory.mktemp("server")) as (_, client):
        yield client


def used(client: valkey.Valkey) -> int:
    """The server's memory, without what connections have for large commands."""
    client.connection_pool.disconnect()
    wait_until(lambda: client.info("clients")["connected_clients"] == 1)
    return int(client.info("memory")["used_memory"])


@pytest.mark.parametrize(
    "size",
    [1, 44, 45, 100, 500, 1000, 4000, 10_000, 100_000, 2**17, 2**19 - 128, 2**19, 10**6, 2**23],
)
def test_a_key_is_counted_as_what_it_takes_or_up_to_a_quarter_more(
    fresh: valkey.Valkey, size: int
) -> None:
    """The quarter is jemalloc's, which not every server has."""
    count = max(6, min(3000, 16 * MIB // size))
    keys = [f"ray:spill:default:{SESSION}:{NODE}:{'c' * 56}.{i:027x}.1:0" for i in range(count)]
    fresh.execute_command("FLUSHALL", "SYNC")
    before = used(fresh)
    value = noise(size)
    for start in range(0, count, 500):
        with fresh.pipeline(transaction=False) as pipeline:
            for key in keys[start : start + 500]:
                pipeline.set(key, value)
            pipeline.execute()
    took = (used(fresh) - before) / count
    assert 0.99 * took <= cost(len(keys[0]), size) <= 1.26 * took


def test_an_entry_is_counted_as_what_it_takes_or_somewhat_more(fresh: valkey.Valkey) -> None:
    names = [f"{SESSION}:{NODE}:{'c' * 56}.{i:027x}.{i}.{i}.{i}" for i in range(5000)]
    fresh.execute_command("FLUSHALL", "SYNC")
    before = used(fresh)
    for start in range(0, len(names), 500):
        fresh.zadd("index", dict.fromkeys(names[start : start + 500], 0))
    took = (used(fresh) - before) / len(names)
    assert took <= sum(member_cost(len(name)) for name in names) / len(names) <= 1.4 * took


@pytest.mark.parametrize(
    ("maxmemory", "left"),
    [
        (1, 0),
        (4 * MIB, MIB),
        (64 * MIB, 16 * MIB),
        (256 * MIB, 16 * MIB),
        (GIB, GIB // 20),
        (100 * GIB, 5 * GIB),
    ],
)
def test_a_twentieth_of_the_server_is_left_to_others_but_not_too_little(
    maxmemory: int, left: int
) -> None:
    assert margin(maxmemory) == left


# --- max_bytes ---


@pytest.mark.parametrize("size", [3000, 85_000])
def test_what_is_stored_is_counted_exactly_and_stays_within_max_bytes(
    tenant: Any, size: int
) -> None:
    ours = tenant(max_bytes=MIB)
    store = ours.store()
    urls, failure = fill(store, size)
    assert ours.counted() == ours.taken() <= MIB
    # Another one would not have fitted.
    assert ours.taken() * (len(urls) + 1) / len(urls) > MIB
    assert "max_bytes" in str(failure)
    assert "1.0 MiB" in str(failure)
    assert "overflow_uri" in str(failure)


def test_what_is_refused_leaves_nothing_and_what_was_deleted_makes_room(tenant: Any) -> None:
    ours = tenant(max_bytes=MIB)
    store = ours.store()
    urls, _ = fill(store, 85_000)
    there = ours.data_keys()
    for size in (85_000, 300_000, 2 * MIB):
        assert store.put([source(noise(size))])[0] == []
        assert ours.data_keys() == there
        assert ours.granted() <= MIB / 20
        assert list(ours.ledger.pending(HERE)) == []
    for _ in range(3):
        store.delete(urls)
        assert ours.counted() == 0
        again, _ = fill(store, 85_000)
        assert len(again) == len(urls)
        urls = again


def test_of_several_objects_the_first_that_fit_are_stored(tenant: Any) -> None:
    ours = tenant(max_bytes=MIB)
    urls, failure = ours.store().put([source(noise(150_000, i), i) for i in range(20)])
    assert isinstance(failure, ServerFullError)
    assert len(urls) == 6
    assert ours.counted() == ours.taken() <= MIB


@pytest.mark.parametrize("max_bytes", [0, 1, 300, CHUNK // 2, 5 * CHUNK])
@pytest.mark.parametrize("size", [0, 9000, 85_000])
def test_what_is_larger_than_all_of_the_budget_is_refused(
    tenant: Any, max_bytes: int, size: int
) -> None:
    if size + 1000 < max_bytes:
        size += max_bytes
    ours = tenant(max_bytes=max_bytes)
    urls, failure = ours.store().put([source(noise(size))])
    if not urls:
        assert isinstance(failure, ServerFullError)
        assert ours.data_keys() == []
    assert ours.counted() == ours.taken() <= max_bytes


def test_compressible_data_count_as_what_is_left_of_them(tenant: Any) -> None:
    ours = tenant(max_bytes=MIB)
    urls, failure = ours.store().put([source(bytes(20 * MIB))])
    assert len(urls) == 1 and failure is None
    assert ours.counted() == ours.taken() <= MIB


@pytest.mark.parametrize("compression", ["auto", "lz4"])
def test_data_that_look_more_compressible_than_they_are_stay_within_the_budget(
    tenant: Any, compression: str
) -> None:
    ours = tenant(max_bytes=MIB, compression=compression)
    data = bytearray(noise(4 * MIB))
    for start in np.linspace(0, len(data) - 100_000, 8).astype(int):
        data[start : start + 100_000] = bytes(100_000)
    _, failure = ours.store().put([source(bytes(data))])
    assert isinstance(failure, ServerFullError)
    assert ours.data_keys() == []
    assert ours.counted() == 0


def test_2000_small_objects_are_put_with_few_questions(tenant: Any, server: Server) -> None:
    ours = tenant(max_bytes=8 * MIB)
    server.client.config_resetstat()
    urls, failure = ours.store().put([source(noise(30, i), i) for i in range(2000)])
    assert len(urls) == 2000 and failure is None
    assert ours.counted() == ours.taken()
    # A settlement for each hundred, a registration for each 500, and what is granted.
    assert server.client.info("commandstats")["cmdstat_eval"]["calls"] < 20 + 4 + 10


def test_namespaces_of_one_server_have_budgets_of_their_own(tenant: Any) -> None:
    one, other = tenant(max_bytes=MIB), tenant(max_bytes=2 * MIB, namespace="other-1")
    (first, _), (second, _) = fill(one.store(), 85_000), fill(other.store(), 85_000)
    assert one.counted() == one.taken() <= MIB < other.counted() == other.taken() <= 2 * MIB
    assert len(second) >= 2 * len(first)


def test_nodes_of_a_namespace_share_its_budget(tenant: Any) -> None:
    ours = tenant(max_bytes=MIB)
    first, second = ours.store("aa"), ours.store("bb")
    urls, _ = fill(first, 85_000)
    assert fill(second, 85_000)[0] == []
    first.delete(urls[:3])
    assert len(fill(second, 85_000)[0]) == 3


def test_after_the_server_lost_its_metadata_all_of_the_budget_is_there_again(
    tenant: Any, server: Server
) -> None:
    ours = tenant(max_bytes=MIB)
    store = ours.store()
    before, _ = fill(store, 85_000)
    server.settle_foreign()
    after, _ = fill(store, 85_000)
    assert len(after) == len(before)
    assert store.delete(before) == []
    assert ours.counted() == ours.taken() <= MIB


def test_metadata_lost_in_the_middle_of_a_put_are_begun_anew(
    tenant: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tenant(max_bytes=20 * MIB)
    store = ours.store()
    take = Budget.take
    losses: list[int] = []

    def lost_once_it_is_registered(self: Budget, size: int) -> None:
        if not losses and server.client.exists(ours.keys.pending):
            server.settle_foreign()
            losses.append(size)
        take(self, size)

    monkeypatch.setattr(Budget, "take", lost_once_it_is_registered)
    urls, failure = store.put([source(noise(10 * MIB))])
    assert urls == [] and failure is not None and losses
    monkeypatch.undo()
    assert ours.taken() == ours.counted() == 0
    fill(store, MIB)
    assert ours.counted() == ours.taken() <= 20 * MIB


@pytest.mark.parametrize("drift", [f"1 1 {GIB} 1", "1 1 1 1"])
def test_drift_is_corrected_by_a_recount(tenant: Any, drift: str) -> None:
    ours = tenant(max_bytes=MIB)
    store = ours.store()
    urls, _ = fill(store, 85_000)
    ours.client.hset(ours.keys.usage, str(HERE), drift)
    ours.client.delete(ours.keys.totals)
    look = CleanUp(ours.config, lambda address: None)
    with contextlib.closing(look):
        look.recount()
    assert ours.counted() == ours.taken() == ours.ledger.totals().stored
    assert ours.ledger.usages()[HERE].objects == len(urls)


@pytest.mark.parametrize("pid", ["", "x", "²", "9" * 5000])
def test_a_grant_of_no_process_is_released(tenant: Any, pid: str) -> None:
    ours = tenant(max_bytes=MIB)
    forged = ours.budget(f"{pid}-x", MIB)
    with begun(forged):
        forged.take(900_000)
    assert ours.ledger.grants_of(HERE) != {}
    ours.store().recover(lambda pid: True)
    assert ours.ledger.grants_of(HERE) == {}


def test_what_a_killed_writer_may_have_written_counts_until_it_is_removed(tenant: Any) -> None:
    ours = tenant(max_bytes=MIB)
    killed = ours.budget("4711-x", MIB)
    with begun(killed):
        killed.take(900_000)
    store = ours.store()
    store.recover(lambda pid: True)
    assert store.put([source(noise(200_000))])[0] == []
    store.recover(lambda pid: pid != 4711)
    assert "4711-x" not in ours.ledger.grants_of(HERE)
    assert len(store.put([source(noise(200_000))])[0]) == 1


def test_what_a_writer_of_this_process_is_granted_is_released_once_its_store_is_gone(
    tenant: Any,
) -> None:
    ours = tenant(max_bytes=10 * MIB)
    config = Config.load(ours.params, {})
    passing = ObjectStore(config, SESSION, NODE)
    urls, _ = passing.put([source(noise(85_000))])
    store = ours.store()
    store.recover(lambda pid: True)
    assert ours.granted() > 0
    passing.close()
    del passing
    gc.collect()
    store.recover(lambda pid: True)
    assert ours.granted() == 0
    store.delete(urls)


def test_what_is_stranded_counts_until_it_is_recovered(tenant: Any) -> None:
    ours = tenant()
    ours.grant(HERE, "w", 5)  # somebody else's stays
    budget = ours.budget("1-x", MIB)
    with begun(budget):
        budget.take(500_000)
        budget.strand()
    with begun(budget):
        with pytest.raises(ServerFullError):
            budget.take(600_000)
        budget.take(400_000)
    budget.give_back(ours.ledger, idle=0.0)
    assert ours.ledger.grants_of(HERE)["1-x"].granted >= 500_000
    budget.recovered(500_000)
    with begun(budget):
        budget.take(600_000)
    budget.give_back(ours.ledger, idle=0.0)
    assert ours.ledger.grants() == {HERE: {"w": Grant(5, 0)}}
    ours.ledger.release(HERE, ["w"])


@pytest.fixture
def away(tmp_path: Path) -> Iterator[tuple[Rig, Tenant]]:
    """A server that may go away, and a tenant of it."""
    with contextlib.closing(Rig(tmp_path / "data")) as rig:
        server = Server(rig.proxy.url, rig.proxy.port, rig.client, None)
        ours = Tenant(server, max_bytes=10 * MIB, retry_timeout=0.5, chunk_size=100_000)
        with contextlib.closing(ours):
            yield rig, ours


def put_half(rig: Rig, store: ObjectStore) -> None:
    """Put 8 MiB while the server goes away, which leaves a part of it."""
    rig.proxy.to_server.refuse_after = 6 * MIB
    urls, failure = store.put([source(noise(8 * MIB))])
    assert urls == []
    assert isinstance(failure, ServerUnavailableError)
    rig.proxy.refusing = False


def test_what_a_broken_put_left_counts_until_it_is_removed(away: tuple[Rig, Tenant]) -> None:
    rig, ours = away
    store = ours.store()
    put_half(rig, store)
    left = ours.taken()
    assert left > 0
    urls, failure = store.put([source(noise(8 * MIB))])
    assert urls == []
    assert isinstance(failure, ServerFullError)
    assert ours.taken() == left
    assert store.recover(lambda pid: True) == 1
    store.give_back()
    assert ours.granted() == 0
    assert len(store.put([source(noise(8 * MIB))])[0]) == 1


def test_what_is_stranded_while_others_are_recovered_stands_with_its_data(
    away: tuple[Rig, Tenant],
) -> None:
    rig, ours = away
    store = ours.store()
    dead = ObjectName(SESSION, NODE, "cd" * 28, f"{1:011x}{4711:08x}{1:08x}", 1)
    ours.client.zadd(ours.keys.pending, {str(dead): 0})

    def put_meanwhile(pid: int) -> bool:
        """What a put of this process does while what is pending is read, once."""
        if not ours.taken():
            put_half(rig, store)
        return pid != 4711

    store.recover(put_meanwhile)
    assert 0 < ours.taken() <= ours.granted()
    assert store.recover(lambda pid: pid != 4711) == 1
    store.give_back()
    assert ours.taken() == ours.granted() == 0


# --- what is kept from spill to spill ---


@pytest.mark.parametrize("max_bytes", [2 * MIB, 400 * MIB])
def test_all_writers_together_keep_at_most_a_twentieth_of_max_bytes(
    tenant: Any, max_bytes: int
) -> None:
    ours = tenant(max_bytes=max_bytes)
    for number in range(40):
        urls, failure = ours.store(f"{number:02x}").put([source(noise(500))])
        assert len(urls) == 1 and failure is None
        assert ours.granted() <= max_bytes // 20
    assert ours.granted() > max_bytes // 40


def test_all_writers_together_keep_at_most_half_of_the_margin(tenant: Any, server: Server) -> None:
    limit = 256 * MIB
    server.client.config_set("maxmemory", limit)
    ours = tenant()
    for number in range(40):
        ours.store(f"{number:02x}").put([source(noise(500))])
        assert ours.granted() <= margin(limit) // 2
    assert ours.granted() > margin(limit) // 4


def test_a_writer_that_keeps_a_grant_asks_for_nothing(tenant: Any, server: Server) -> None:
    ours = tenant(max_bytes=400 * MIB)
    store = ours.store()
    store.put([source(noise(85_000))])
    assert ours.granted() > 85_000
    server.client.config_resetstat()
    for number in range(1, 51):
        assert store.put([source(noise(85_000), number)])[1] is None
    stats = server.client.info("commandstats")
    # The registrations and the settlements.
    assert stats["cmdstat_eval"]["calls"] == 100
    assert "cmdstat_info" not in stats


def test_what_an_idle_writer_keeps_is_given_back(tenant: Any) -> None:
    ours = tenant(max_bytes=400 * MIB)
    stores = [ours.store("aa"), ours.store("bb")]
    for store in stores:
        store.put([source(noise(500))])
    stores[0].background.give_back()  # which is not idle yet
    assert {*ours.ledger.grants()} == {store.node for store in stores}
    stores[0].background.give_back(idle=0.0)
    assert {*ours.ledger.grants()} == {stores[1].node}
    assert len(stores[0].put([source(noise(500))])[0]) == 1


def test_what_a_node_keeps_goes_with_it(tenant: Any) -> None:
    ours = tenant(max_bytes=400 * MIB)
    store, other = ours.store("aa"), ours.store("bb")
    for each in (store, other):
        each.put([source(noise(500))])
    store.destroy(lambda pid: True)
    assert {*ours.ledger.grants()} == {other.node}


def test_a_neighbour_that_fills_the_server_up_between_two_spills_loses_nothing(
    tenant: Any, server: Server
) -> None:
    """The grant that is kept is written; then no more is granted."""
    limit = 256 * MIB
    ours = tenant(chunk_size=100_000)
    server.client.config_set("maxmemory-policy", "volatile-lru")
    server.client.config_set("maxmemory", limit)
    server.client.config_resetstat()
    stores = [ours.store(f"{number:02x}") for number in range(8)]
    for store in stores:
        store.put([source(noise(85_000))])
    assert ours.granted() > 0
    free = limit - server.client.info("memory")["used_memory"] - MIB - margin(limit) // 2
    keys = [f"session:{i}" for i in range(free // 1_000_000)]
    for key in keys:
        server.client.set(key, bytes(1_000_000), ex=3600)
    for store in stores:
        _, failure = fill(store, 500_000)
        assert "nobody's keys are evicted" in str(failure)
    assert server.client.exists(*keys) == len(keys)
    assert evicted(server.client) == 0
    server.client.config_set("maxmemory", 0)
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.delete(*keys)


# --- without max_bytes ---


def test_spilling_stops_short_of_the_servers_memory_by_the_margin(
    tenant: Any, server: Server
) -> None:
    ours = tenant(chunk_size=100_000)
    limit = 64 * MIB
    server.client.config_set("maxmemory", limit)
    _, failure = fill(ours.store(), 4 * MIB)
    assert ours.taken() > limit - margin(limit) - 8 * MIB
    assert server.client.info("memory")["used_memory"] < limit - margin(limit) + MIB
    assert "64.0 MiB" in str(failure) and "maxmemory" in str(failure)
    server.client.set("emb:new", bytes(8 * MIB))
    server.client.delete("emb:new")


def test_limits_may_come_and_go_while_a_writer_writes(tenant: Any, server: Server) -> None:
    store = tenant().store()
    urls: list[str] = []

    def is_refused() -> bool:
        more, failure = store.put([source(noise(9 * CHUNK), len(urls))])
        urls.extend(more)
        return failure is not None

    assert not is_refused()
    used = server.client.info("memory")["used_memory"]
    server.client.config_set("maxmemory", used + MIB)
    wait_until(is_refused)
    server.client.config_set("maxmemory", 0)
    assert not is_refused()


EVICTING = ["volatile-lru", "volatile-lfu", "volatile-ttl", "volatile-random"]


@contextlib.contextmanager
def neighbours_of(server: Server, size: int, policy: str) -> Iterator[list[str]]:
    """Keys of others that have a TTL, `size` bytes in all, and a limit just above that.

    Between them is what connections need.
    """
    keys = [f"session:{i}" for i in range(size // 200_000)]
    for key in keys:
        server.client.set(key, bytes(200_000), ex=3600)
    server.client.config_set("maxmemory-policy", policy)
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 4 * MIB)
    server.client.config_resetstat()
    try:
        yield keys
    finally:
        server.client.config_set("maxmemory", 0)
        server.client.config_set("maxmemory-policy", "noeviction")
        server.client.delete(*keys)


def evicted(client: valkey.Valkey) -> int:
    return int(client.info("stats")["evicted_keys"])


@pytest.mark.parametrize("policy", [*EVICTING, "allkeys-lru"])
def test_by_itself_spilling_takes_nothing_that_would_have_to_be_evicted(
    tenant: Any, server: Server, policy: str
) -> None:
    ours = tenant(allow_eviction=True)
    store = ours.store()
    with neighbours_of(server, 80 * MIB, policy) as keys:
        urls, failure = store.put([source(noise(MIB), i) for i in range(3)])
        assert urls == []
        assert isinstance(failure, ServerFullError)
        for part in (server.url, "used", "nobody's keys are evicted", "max_bytes", "overflow_uri"):
            assert part in str(failure)
        limit = server.client.info("memory")["maxmemory"]
        server.client.config_set("maxmemory", limit + margin(limit) + 8 * MIB)
        _, failure = fill(store, MIB)
        assert isinstance(failure, ServerFullError)
        assert ours.taken() > 4 * MIB
        assert server.client.exists(*keys) == len(keys)
        assert evicted(server.client) == 0


@pytest.mark.parametrize("policy", EVICTING)
def test_max_bytes_is_taken_from_what_the_server_may_evict_of_others(
    tenant: Any, server: Server, policy: str
) -> None:
    ours = tenant(max_bytes=10 * MIB)
    with neighbours_of(server, 80 * MIB, policy) as keys:
        urls, failure = fill(ours.store(), MIB)
        assert len(urls) == 9
        assert "max_bytes (10.0 MiB)" in str(failure)
        assert ours.taken() <= 10 * MIB
        assert 0 < len(keys) - server.client.exists(*keys) < len(keys) // 3


@pytest.mark.parametrize("policy", ["volatile-lru", "volatile-ttl", "volatile-random"])
def test_of_max_bytes_no_more_is_taken_than_can_be_evicted(
    tenant: Any, server: Server, policy: str
) -> None:
    ours = tenant(chunk_size=500_000, compression="none")
    store = ours.store()
    caches = [f"vllm:kv:{i}" for i in range(200)]
    kept = [f"session:{i}" for i in range(100)]
    assert store.put([source(bytes(10 * MIB), i) for i in range(2)])[1] is None
    for key in caches:
        server.client.set(key, bytes(200_000), ex=3600)
    for key in kept:
        server.client.set(key, bytes(200_000))
    used = server.client.info("memory")["used_memory"]
    server.client.config_set("maxmemory", used)
    with ours.batch(max_bytes=GIB) as budget:
        with pytest.raises(ServerFullError):
            budget.take(MIB)
        server.client.config_set("maxmemory-policy", policy)
        evictable = 200 * 200_000 - margin(used)
        budget.require(int(0.8 * evictable))
        with pytest.raises(ServerFullError):
            budget.require(int(1.2 * evictable))
    server.client.config_set("maxmemory", 0)
    server.client.delete(*caches, *kept)


def test_a_put_that_is_refused_registers_and_writes_nothing(tenant: Any, server: Server) -> None:
    store = tenant().store()
    with neighbours_of(server, 40 * MIB, "volatile-lru"):
        for size in (100, 2 * CHUNK):
            assert store.put([source(noise(size), i) for i in range(500)])[0] == []
        assert server.our_keys() == []
        stats = server.client.info("commandstats")
        assert not {"cmdstat_zadd", "cmdstat_zrem"} & stats.keys()
        assert evicted(server.client) == 0


class Interrupted(Link):
    """A link over which something else happens after the first request."""

    def __init__(self, config: Config, happens: Callable[[], None]) -> None:
        super().__init__(config, Keyspace.of(config).index.encode())
        self._happens = [happens]

    def run(
        self, requests: Iterable[Request], since: int | None = None
    ) -> Generator[Request, None, None]:
        for request in requests:
            yield from super().run([request], since)
            if self._happens:
                self._happens.pop()()


def test_what_others_write_and_settle_between_grant_and_look_counts(
    tenant: Any, server: Server
) -> None:
    ours = tenant()
    server.client.config_set("maxmemory", 64 * MIB)
    keys = [f"ray:spill:default:s:n:{i}" for i in range(30)]

    def others_write() -> None:
        with ours.batch("2-x") as other:
            other.take(30 * MIB)
            for key in keys:
                server.client.set(key, bytes(MIB))

    with contextlib.closing(Interrupted(ours.config, others_write)) as link:
        ledger = Ledger(link, ours.keys)
        budget = Budget(link, ledger, HERE, "1-x", None, "or wait")
        with begun(budget):
            with pytest.raises(ServerFullError):
                budget.take(30 * MIB)
            budget.take(10 * MIB)  # which there is room for
        budget.give_back(ledger, idle=0.0)
    server.client.delete(*keys)


def test_neighbours_that_grow_meanwhile_stop_the_writing_of_a_large_object(
    tenant: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tenant(chunk_size=500_000).store()
    server.client.config_set("maxmemory-policy", "volatile-lru")
    server.client.config_set("maxmemory", 256 * MIB)
    server.client.config_resetstat()
    take = Budget.take
    taken: list[int] = []

    def others_grow_at_the_fiftieth(self: Budget, size: int) -> None:
        take(self, size)
        taken.append(size)
        if len(taken) == 50:
            server.client.set("session:1", bytes(70 * MIB), ex=3600)

    monkeypatch.setattr(Budget, "take", others_grow_at_the_fiftieth)
    urls, failure = store.put([source(noise(180 * MIB))])
    assert urls == []
    assert isinstance(failure, ServerFullError)
    assert len(taken) > 50
    assert server.client.exists("session:1")
    assert evicted(server.client) == 0
    server.client.config_set("maxmemory", 0)
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.delete("session:1")


def test_the_more_writers_the_fewer_bytes_until_each_looks_again(
    tenant: Any, server: Server
) -> None:
    """So that what all of them write, while neighbours fill the server, stays within the margin."""
    limit = 1024 * MIB
    server.client.config_set("maxmemory", limit)
    ours = tenant()
    with contextlib.ExitStack() as stack:
        budgets = [stack.enter_context(ours.batch(f"{number}-x")) for number in range(6)]
        for budget in budgets:
            budget.require(20 * MIB)
        written = 0
        for budget in budgets:
            while not ours.looked(budget):
                budget.take(MIB // 2)
                written += MIB // 2
        assert margin(limit) / 4 < written < margin(limit)
    server.client.config_set("maxmemory", 0)


def test_a_batch_that_takes_long_looks_again(tenant: Any, server: Server) -> None:
    server.client.config_set("maxmemory", 1024 * MIB)
    ours = tenant()
    with ours.batch() as budget:
        budget.take(MIB)
        assert not ours.looked(budget)
        time.sleep(1.1)
        budget.take(1)
        assert ours.looked(budget)
        assert not ours.looked(budget)
    server.client.config_set("maxmemory", 0)


def test_room_is_left_for_a_replication_backlog_that_fills_up() -> None:
    """It counts as used memory, and takes a copy of whatever is written until it is full."""
    size = {"maxmemory": "100mb", "repl_backlog_size": "40mb", "repl_diskless_sync_delay": 0}
    with (
        valkey_server(**size) as primary,
        contextlib.closing(Tenant(primary)) as ours,
    ):
        with ours.batch() as budget:
            budget.require(70 * MIB)
        with valkey_server(replicaof=f"127.0.0.1 {primary.port}"):
            wait_until(lambda: primary.client.info("replication")["repl_backlog_active"] == 1)
            with ours.batch() as budget:
                with pytest.raises(ServerFullError):
                    budget.require(50 * MIB)
                budget.require(30 * MIB)


def test_a_large_spill_waits_for_its_replicas_again_and_again() -> None:
    """A server drops a replica that lags by too many bytes."""
    quick = {"repl_diskless_sync_delay": 0}
    with (
        valkey_server(**quick) as primary,
        contextlib.closing(Tenant(primary, min_replicas=1, chunk_size=MIB)) as ours,
        valkey_server(replicaof=f"127.0.0.1 {primary.port}"),
    ):
        wait_until(lambda: primary.client.info("replication")["connected_slaves"] == 1)
        primary.client.config_resetstat()
        data = noise(100 * MIB)
        (url,), failure = ours.store().put([source(data)])
        assert failure is None
        # The last one is that of the end.
        assert primary.client.info("commandstats")["cmdstat_wait"]["calls"] == 100 // 32 + 1
        assert get(ours.store(), url) == data


# --- many writers ---


class Died(BaseException):
    """Ends a put as the death of its process does: nothing is undone."""


def test_many_writers_in_any_order_are_counted_as_what_is_on_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever writers put, delete, leave half-written and recover."""
    limit = 400_000
    monkeypatch.setattr("ray_valkey_spill.store.node.LATE_ARRIVALS", 0.05)
    nodes = st.sampled_from(["aa", "bb"])
    numbers = st.integers(0, 3)

    class Writers(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            server.settle_foreign()
            self.ours = Tenant(server, max_bytes=limit)
            # Two writers of each node; what is done in the background is the node's.
            self.writers = [self.new(node) for node in ("aa", "bb", "aa", "bb")]
            self.nodes = {node: Node(self.ours.config, SESSION, node) for node in ("aa", "bb")}
            self.urls: dict[str, str] = {}

        def new(self, node: str) -> ObjectStore:
            return ObjectStore(self.ours.config, SESSION, node)

        @rule(number=numbers, sizes=st.lists(st.sampled_from([0, 500, 9_000, 60_000]), max_size=4))
        def put(self, number: int, sizes: list[int]) -> None:
            store = self.writers[number]
            urls, failure = store.put([source(noise(s, i), i) for i, s in enumerate(sizes)])
            assert failure is None or isinstance(failure, ServerFullError)
            assert (failure is None) == (len(urls) == len(sizes))
            self.urls |= dict.fromkeys(urls, store.node.node)

        @rule(number=numbers)
        def put_what_is_refused(self, number: int) -> None:
            urls, failure = self.writers[number].put([source(noise(limit))])
            assert urls == [] and isinstance(failure, ServerFullError)

        @rule(number=numbers, values=st.integers(0, 9), lives_on=st.booleans())
        def die(self, number: int, values: int, lives_on: bool) -> None:
            """In the middle of a put; or only the put fails, if the writer lives on."""
            store, takes = self.writers[number], itertools.count()
            take = Budget.take

            def take_until_it_dies(budget: Budget, size: int) -> None:
                if next(takes) > values:
                    raise Died
                take(budget, size)

            with monkeypatch.context() as patched, contextlib.suppress(Died):
                patched.setattr(Budget, "take", take_until_it_dies)
                urls, _ = store.put([source(noise(9_000 + 60_000 * (i % 2)), i) for i in range(4)])
                self.urls |= dict.fromkeys(urls, store.node.node)
            if not lives_on:
                store.close()
                self.writers[number] = self.new(store.node.node)
                del store
                gc.collect()

        @rule(share=st.integers(1, 3))
        def delete(self, share: int) -> None:
            for url in [*self.urls][::share]:
                assert self.writers[0].delete([url]) == []
                del self.urls[url]

        @rule(node=nodes)
        def recover(self, node: str) -> None:
            self.nodes[node].recover(lambda pid: True)
            assert list(self.ours.ledger.pending(NodeName(SESSION, node))) == []

        @rule(node=nodes)
        def give_back(self, node: str) -> None:
            self.nodes[node].give_back(idle=0.0)

        @rule(node=nodes)
        def destroy(self, node: str) -> None:
            self.nodes[node].destroy(lambda pid: True)
            self.urls = {url: where for url, where in self.urls.items() if where != node}

        @rule(totals=st.sampled_from([None, b"", b"1 2", b"9 9 9 9 9 9", b"0 0 0 0 0 1"]))
        def tamper_with_the_totals(self, totals: bytes | None) -> None:
            server.client.delete(self.ours.keys.totals)
            if totals is not None:
                server.client.set(self.ours.keys.totals, totals)
            with contextlib.closing(CleanUp(self.ours.config, lambda address: None)) as look:
                look.recount()

        @invariant()
        def what_is_there_is_counted_and_within_the_budget(self) -> None:
            look, ledger = self.ours.look(), self.ours.ledger
            assert look.taken <= look.stored + look.granted <= limit
            # Where there are none, the next script adds them up.
            assert look.totals == (look.stored, look.granted) or look.totals == (0, 0)
            assert ledger.totals()[2:4] == (look.stored, look.granted)
            entries = [entry for page in ledger.stored() for entry in page]
            there = {self.writers[0].keys.parse_url(url).name for url in self.urls}
            assert {entry.name for entry in entries} == there
            usages = ledger.usages()
            for node in {entry.name.node for entry in entries} | {o.node for o in usages}:
                own = [entry for entry in entries if entry.name.node == node]
                assert usages[NodeName(SESSION, node)][:3] == (
                    len(own),
                    sum(entry.size for entry in own),
                    sum(entry.stored for entry in own),
                )

        def teardown(self) -> None:
            for node in self.nodes.values():
                node.recover(lambda pid: True)
                node.destroy(lambda pid: True)
            assert server.our_keys() == []
            for each in (*self.writers, *self.nodes.values(), self.ours):
                each.close()

    run_state_machine_as_test(
        Writers, settings=settings(max_examples=20, stateful_step_count=15, deadline=None)
    )


_WRITER = """
import json, random, sys
import numpy as np
from ray_valkey_spill.config import Config
from support.stores import Store
from ray_valkey_spill.format.packing import SourceObject

params, node, seed, scale = json.loads(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
chance = random.Random(seed)
store = Store(Config.load(params, {}), "session_1", node)
random_data = np.random.default_rng(seed).bytes(1 << 20)
urls = []
while True:
    sources = []
    for i in range(chance.randrange(1, 12)):
        size = scale * chance.choice([0, 300, 9_000, 60_000, 200_000, 400_000])
        data = random_data[:size] if chance.random() < 0.8 else bytes(size)
        sources.append(SourceObject(f"{i:056x}", b"", b"", memoryview(data)))
    more, failure = store.put(sources)
    urls += more
    if failure is not None or chance.random() < 0.2:
        chance.shuffle(urls)
        store.delete(urls[: len(urls) // 2])
        del urls[: len(urls) // 2]
    print("refused" if failure else "put", flush=True)
"""


class Writer:
    """A process that puts and deletes until it is killed, and tells what came of each put.

    Its objects have up to 400 kB, times `scale`.
    """

    def __init__(
        self, params: dict[str, Any], node: str, seed: int, log: Path, scale: int = 1
    ) -> None:
        self.node = node
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", _WRITER, json.dumps(params), node, str(seed), str(scale)]
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, env=environment)

    def has_met_the_limit(self) -> bool:
        assert self._process.poll() is None
        told = self._log.read_text().split()
        return told.count("put") > 5 and told.count("refused") > 2

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.slow
def test_many_writers_that_are_killed_at_random_never_exceed_the_budget(
    tenant: Any, tmp_path: Path
) -> None:
    limit = 3 * MIB
    ours = tenant(max_bytes=limit)
    chance = random.Random(5)
    seeds = iter(range(100))
    looks: list[Look] = []

    def start(node: str) -> Writer:
        seed = next(seeds)
        return Writer(ours.params, node, seed, tmp_path / str(seed))

    def looked_until_all_have_met_the_limit(writers: Sequence[Writer]) -> bool:
        looks.extend(ours.look() for _ in range(50))
        return all(writer.has_met_the_limit() for writer in writers)

    with contextlib.ExitStack() as stack:
        writers = [start(node) for node in ("aa", "aa", "bb")]
        stack.callback(lambda: [writer.kill() for writer in writers])
        stores = {node: ours.store(node) for node in ("aa", "bb")}
        for _ in range(3):
            wait_until(lambda: looked_until_all_have_met_the_limit(writers))
            victim = chance.randrange(len(writers))
            writers[victim].kill()
            writers[victim] = start(writers[victim].node)
            stores[writers[victim].node].recover(is_running)
        wait_until(lambda: looked_until_all_have_met_the_limit(writers))
    for look in looks:
        # Every byte is either stored, by the metadata, or was granted.
        assert look.taken <= look.stored + look.granted <= limit
        assert look.totals == (look.stored, look.granted)
    assert max(look.taken for look in looks) > limit / 2
    for store in stores.values():
        store.recover(is_running)
    assert ours.ledger.grants() == {}
    assert ours.ledger.totals()[3:5] == (0, 0)
    # The server may still have to read what a killed writer had sent.
    wait_until(lambda: ours.counted() == ours.taken())
    assert {*ours.ledger.usages().values()} != {Usage()}
    for store in stores.values():
        store.destroy(is_running)
    assert ours.data_keys() == []
    assert ours.counted() == 0
    assert ours.store().put([source(noise(int(0.9 * limit)))])[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["volatile-lru", "volatile-lfu"])
def test_many_writers_by_themselves_evict_no_key_of_a_neighbour(
    tenant: Any, server: Server, tmp_path: Path, policy: str
) -> None:
    ours = tenant(chunk_size=500_000)
    with neighbours_of(server, 100 * MIB, policy) as keys, contextlib.ExitStack() as stack:
        limit = server.client.info("memory")["maxmemory"]
        server.client.config_set("maxmemory", limit + margin(limit) + 10 * MIB)
        writers = [
            Writer(ours.params, node, seed, tmp_path / str(seed), scale=2)
            for seed, node in enumerate(("aa", "aa", "bb", "bb", "cc", "cc"))
        ]
        stack.callback(lambda: [writer.kill() for writer in writers])
        wait_until(
            lambda: evicted(server.client) or all(writer.has_met_the_limit() for writer in writers)
        )
        assert ours.taken() > 0
        assert server.client.exists(*keys) == len(keys)
        assert evicted(server.client) == 0
    for node in ("aa", "bb", "cc"):
        store = ours.store(node)
        store.recover(is_running)
        store.destroy(is_running)


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
