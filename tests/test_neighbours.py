"""Spilling on a server that others use: nothing of theirs is touched, and nothing of ours lost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import valkey
from ray.exceptions import ObjectLostError
from support.clusters import OBJECT_STORE, local_ray, run_driver, spill
from support.servers import (
    BOOKS,
    FOREIGN,
    INDEX,
    PATIENCE,
    Server,
    acl_user,
    valkey_server,
    wait_until,
)
from support.tenants import (
    MIB,
    Embeddings,
    KVCache,
    LastingSessions,
    Neighbour,
    Sessions,
    Spills,
    at_work,
)
from valkey.exceptions import NoPermissionError

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace, NodeName
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.cleanup import CleanUp
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import Ledger, link_to
from ray_valkey_spill.tiers.room import margin

PASSWORD = "pw"

# What the neighbours and their clients send, and what this test sends itself while they work.
OF_OTHERS = {
    *("set", "get", "hset", "hget", "expire", "client|setinfo"),
    *("config|resetstat", "acl|log", "client|list", "zcard"),
}
# What a connection sends before its first command.
CONNECTING = {"auth", "hello"}


@contextlib.contextmanager
def shared_server(**config: Any) -> Iterator[Server]:
    """A server on which Ray has a user of its own, with the rules that are advised for it."""
    # DEBUG is there to be refused for want of permission, and the log is long enough for all.
    with valkey_server(enable_debug_command="yes", acllog_max_len=10_000, **config) as server:
        server.settle_foreign()
        rules = preflight.acl_rules(config_of(server))
        with acl_user([server.client], rules, password=PASSWORD):
            server.client.acl_log_reset()
            server.client.config_resetstat()
            yield server


@pytest.fixture(scope="module")
def _server() -> Iterator[Server]:
    with shared_server() as server:
        yield server


@pytest.fixture
def shared(_server: Server) -> Iterator[Server]:
    """The same for several tests; a test leaves no key but the foreign ones."""
    with _server.in_turn():
        _server.client.acl_log_reset()
        _server.client.config_resetstat()
        yield _server


def config_of(server: Server, **params: Any) -> Config:
    """Ray's user's."""
    params = {"url": server.url, "username": "ray", **params}
    return Config.load(params, {"RAY_VALKEY_SPILL_PASSWORD": PASSWORD})


def refused(server: Server) -> set[str]:
    """What Ray's user has tried and may not do: commands and keys."""
    return {entry["object"] for entry in server.client.acl_log(10_000)}


def commands(server: Server) -> set[str]:
    """What anybody has sent to the server, from scripts too, since its statistics were reset."""
    stats = server.client.info("commandstats")
    return {name.removeprefix("cmdstat_") for name in stats}


def assert_only_our_own_was_touched(server: Server) -> None:
    """To be asked before anything else is asked of the server."""
    ours = {name.lower() for name in preflight.COMMANDS} | CONNECTING
    assert commands(server) <= ours | OF_OTHERS
    assert refused(server) == set()
    server.assert_foreign_untouched()


def assert_nothing_lost(*neighbours: Neighbour | Spills) -> None:
    for each in neighbours:
        assert each.tally.operations > 0
        assert (each.tally.misses, each.tally.wrong, each.tally.errors) == (0, 0, {}), each.prefix


@contextlib.contextmanager
def neighbours(server: Server) -> Iterator[tuple[KVCache, Embeddings, Sessions]]:
    """The three others, with at most 11 MiB in all."""
    with (
        contextlib.closing(KVCache(server.url, 32)) as kv,
        contextlib.closing(Embeddings(server.url, 300)) as embeddings,
        contextlib.closing(Sessions(server.url, 300)) as sessions,
    ):
        yield kv, embeddings, sessions


# --- four tenants ---


A_NODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from support.tenants import Spills
from ray_valkey_spill.config import Config
spills = Spills(Config.load(json.loads(sys.argv[2])), 8, sys.argv[3])
for _ in range(40):
    spills.step()
spills.check_all()
spills.delete_all()
spills.store.destroy(lambda pid: False)
print(json.dumps([spills.tally.misses, spills.tally.wrong, dict(spills.tally.errors)]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_thread_left")
def test_spilling_at_full_speed_touches_nothing_of_the_neighbours(shared: Server) -> None:
    params = {"url": shared.url, "username": "ray", "max_bytes": 200 * MIB}
    env = {"RAY_VALKEY_SPILL_PASSWORD": PASSWORD}
    arguments = [str(Path(__file__).parent), json.dumps(params)]
    spills = [Spills(Config.load(params, env), 8, node) for node in ("cd" * 28, "ef" * 28)]
    with neighbours(shared) as others, ThreadPoolExecutor(2) as pool:
        with at_work(*others, *spills):
            processes = [
                pool.submit(run_driver, A_NODE, *arguments, f"{i:056x}", env=env) for i in range(2)
            ]
            assert [json.loads(process.result()) for process in processes] == [[0, 0, {}]] * 2
            wait_until(lambda: all(each.tally.operations > 100 for each in (*others, *spills)))
        for each in spills:
            each.delete_all()
            each.store.destroy(lambda pid: False)
            each.close()
        assert_only_our_own_was_touched(shared)
        assert_nothing_lost(*others, *spills)
    assert shared.our_keys() == []


def test_everything_a_cluster_needs_works_with_the_advised_permissions(
    shared: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    config = config_of(shared, max_bytes=4 * MIB, overflow_uri=f"file://{tmp_path}")
    preflight.run_all(config)
    link = link_to(config)
    ledger = Ledger(link, Keyspace.of(config))
    with contextlib.closing(Spills(config, 6)) as spills, contextlib.closing(link):
        spills.store.probe_overflow()
        spills.store.renew_lease("127.0.0.1:1", lambda: False)
        spills.store.renew_lease("127.0.0.1:1", lambda: False)
        spills.store.join_overflow()
        for _ in range(12):
            spills.step()
        spills.check_all()
        assert_nothing_lost(spills)
        # The budget was reached, and the rest is in the overflow.
        assert list(tmp_path.rglob(f"{0:040x}*"))
        spills.store.recover(lambda pid: False)
        owner = NodeName("session_1", "ab" * 28)
        assert ledger.node_names() == {owner}
        assert sum(map(len, ledger.stored())) == ledger.usages()[owner].objects > 0
        assert list(ledger.pending(owner)) == []
        assert ledger.totals().granted <= 4 * MIB / 20
        spills.store.give_back()
        assert ledger.grants() == {}
        assert [lease.node_name for lease in ledger.leases()] == [owner]
        assert ledger.overflows().keys() == {"session_1"}
        assert ledger.recount(owner)

        for name, seconds in (("LEASE", 0.2), ("CONFIRMATION", 0.2), ("BETWEEN_LOOKS", 0.1)):
            monkeypatch.setattr(cleanup, name, seconds)
        look = CleanUp(config, lambda address: None)
        remains = look.find()
        assert [each.node_name for each in remains] == [owner]
        look.remove(remains)
        look.recount()
        look.close()
    assert_only_our_own_was_touched(shared)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


FORBIDDEN: list[tuple[str | int, ...]] = [
    *[("GET", key) for key in FOREIGN],
    *[("SET", key, "x") for key in FOREIGN],
    *[("UNLINK", key) for key in FOREIGN],
    ("STRLEN", "vllm:kv:x"),
    ("ZADD", "ray:spill:defaultx", 0, "x"),
    ("HGETALL", "session:x"),
    ("DEL", "ray:spill:default:x"),
    ("SCAN", 0),
    ("KEYS", "*"),
    ("RANDOMKEY",),
    ("DBSIZE",),
    ("FLUSHDB",),
    ("FLUSHALL",),
    ("SWAPDB", 0, 1),
    ("SELECT", 1),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", 1),
    ("DEBUG", "SLEEP", 0),
    ("SCRIPT", "FLUSH"),
    ("SCRIPT", "KILL"),
    ("FUNCTION", "FLUSH"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("ACL", "WHOAMI"),
    ("MONITOR",),
    ("PUBLISH", "x", "x"),
    ("REPLICAOF", "NO", "ONE"),
    ("SHUTDOWN",),
]  # fmt: skip


def test_nothing_else_of_the_server_can_be_touched(shared: Server) -> None:
    with valkey.Valkey(port=shared.port, username="ray", password=PASSWORD) as client:
        for command in FORBIDDEN:
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
            with pytest.raises(valkey.ResponseError, match=r"ACL failure|not allowed from script"):
                client.execute_command("EVAL", "return redis.call(unpack(ARGV))", 0, *command)
        with pytest.raises(NoPermissionError):
            client.execute_command("EVAL", "return 1", 1, "vllm:kv:x")
    # Each of these would have shown in the other tests.
    assert refused(shared) >= {"scan", "keys", "flushall", "vllm:kv:x", *map(bytes.decode, FOREIGN)}


@pytest.mark.slow
def test_ray_spills_at_full_speed_and_touches_nothing_of_the_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_VALKEY_SPILL_PASSWORD", PASSWORD)
    count = 3 * OBJECT_STORE // (8 * MIB)
    data = np.random.default_rng(0).random(MIB)
    with shared_server() as server, neighbours(server) as others:
        with local_ray(server.url, username="ray"), at_work(*others, pause=0.002):
            refs = [ray.put(data + i) for i in range(count)]
            for i, ref in enumerate(refs):
                assert (ray.get(ref, timeout=PATIENCE) == data + i).all()
            assert server.client.zcard(INDEX) > count // 3
            clients = server.client.client_list()
            assert {c["user"] for c in clients if c["lib-name"] != "valkey-py"} == {"ray"}
            del refs, ref
            wait_until(lambda: server.client.zcard(INDEX) == 0)
        assert_only_our_own_was_touched(server)
        assert_nothing_lost(*others)
        assert server.our_keys() == []


# --- a full server ---


@pytest.mark.slow
def test_where_nothing_is_evicted_the_neighbours_can_still_grow(shared: Server) -> None:
    limit = 100 * MIB
    shared.client.config_set("maxmemory", limit)
    config = config_of(shared)
    spills = [Spills(config, 1000, node) for node in ("cd" * 28, "ef" * 28)]
    with neighbours(shared) as others:
        kv, *_ = others
        for each in others:
            for _ in range(each.keys):
                each.step()
        with at_work(*others, *spills):
            wait_until(lambda: all(each.tally.errors for each in spills))
            # They have what spilling may have, and go on trying.
            assert shared.client.info("memory")["used_memory"] > limit * 2 // 3
            more = margin(limit) * 2 // 3 // KVCache.largest
            kv.keys += more
            after = kv.tally.operations + 4 * kv.keys
            wait_until(lambda: kv.tally.operations > after)
        assert_nothing_lost(*others)
        for each in spills:
            assert (each.tally.misses, each.tally.wrong) == (0, 0)
            assert each.tally.errors.keys() == {"ServerFullError"}
            each.delete_all()
            each.store.destroy(lambda pid: False)
            each.close()


EVICTING = ["volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"]


def evicted(server: Server) -> int:
    return int(server.client.info("stats")["evicted_keys"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", EVICTING)
def test_without_max_bytes_nobody_loses_anything_and_the_overflow_takes_the_rest(
    shared: Server, policy: str, tmp_path: Path
) -> None:
    shared.client.config_set("maxmemory", 64 * MIB)
    shared.client.config_set("maxmemory-policy", policy)
    config = config_of(shared, overflow_uri=str(tmp_path))
    spills = [Spills(config, 40, node) for node in ("cd" * 28, "ef" * 28)]
    with neighbours(shared) as others:
        for each in others:
            for _ in range(each.keys):
                each.step()
        with at_work(*others, *spills, pause=0.002):
            wait_until(lambda: all(each.tally.operations > 5 * each.keys for each in spills))
        assert shared.client.zcard(INDEX) > 0
        assert all(each.store.sweep_overflow() for each in spills)
        assert evicted(shared) == 0
        assert_nothing_lost(*others, *spills)
        for spilling in spills:
            spilling.delete_all()
            spilling.store.destroy(lambda pid: False)
            spilling.close()


@pytest.mark.slow
@pytest.mark.parametrize("policy", EVICTING)
def test_where_caches_take_all_there_is_spilling_takes_nothing_without_max_bytes(
    shared: Server, policy: str, tmp_path: Path
) -> None:
    shared.client.config_set("maxmemory", 64 * MIB)
    shared.client.config_set("maxmemory-policy", policy)
    with neighbours(shared) as (kv, *_):
        kv.keys = 10_000
        while not evicted(shared):
            kv.step()
        config = config_of(shared, overflow_uri=str(tmp_path))
        with contextlib.closing(Spills(config, 10)) as spills:
            with at_work(kv, spills):
                wait_until(lambda: spills.tally.operations > 40)
                assert shared.client.zcard(INDEX) == 0
            assert_nothing_lost(spills)
            spills.delete_all()
            spills.store.destroy(lambda pid: False)


@pytest.mark.slow
@pytest.mark.parametrize("policy", EVICTING)
def test_max_bytes_is_taken_from_the_caches_and_no_spilled_object_is_lost(
    shared: Server, policy: str
) -> None:
    budget = 40 * MIB
    shared.client.config_set("maxmemory", 120 * MIB)
    shared.client.config_set("maxmemory-policy", policy)
    config = config_of(shared, max_bytes=budget)
    spills, cold = (Spills(config, 12, node) for node in ("cd" * 28, "ef" * 28))
    with (
        neighbours(shared) as (kv, embeddings, sessions),
        contextlib.closing(LastingSessions(shared.url, 100)) as lasting,
        contextlib.closing(spills),
        contextlib.closing(cold),
    ):
        # Those that are spilled before everything else, and not read meanwhile, would go first.
        for _ in range(cold.keys):
            cold.step()
        kv.keys = 10_000
        while not evicted(shared):
            kv.step()
        with at_work(kv, embeddings, sessions, lasting, spills):
            after = spills.tally.operations + 2 * 2 * spills.keys
            wait_until(lambda: spills.tally.operations > after)
            assert cold.store.room().used <= budget
        assert kv.tally.misses > 0
        for each in (kv, embeddings, sessions):
            assert (each.tally.wrong, each.tally.errors) == (0, {})
        cold.check_all()
        assert_nothing_lost(lasting, spills, cold)
        for spilling in (spills, cold):
            spilling.delete_all()
            spilling.store.destroy(lambda pid: False)


def test_where_everything_may_be_evicted_what_is_lost_is_told_and_the_rest_comes_back() -> None:
    with shared_server(maxmemory="60mb", maxmemory_policy="allkeys-lru") as server:
        config = config_of(server, allow_eviction=True)
        preflight.run_all(config)
        with (
            contextlib.closing(Spills(config, 20)) as spills,
            contextlib.closing(KVCache(server.url, 10_000)) as kv,
        ):
            for _ in range(spills.keys):
                spills.step()

            def values() -> int:
                return sum(not key.endswith(BOOKS) for key in server.our_keys())

            before = values()
            while values() == before:
                kv.step()
            assert_nothing_lost(spills)
            spills.check_all()
            assert 0 < spills.tally.misses < spills.keys
            assert (spills.tally.wrong, spills.tally.errors) == (0, {})
            # And it goes on, with room so that it is not evicted at once.
            server.client.config_set("maxmemory", "120mb")
            spills.step()
            assert spills.tally.errors == {}
            spills.delete_all()


@pytest.mark.slow
def test_in_ray_what_was_evicted_is_object_lost_error_and_the_rest_comes_back() -> None:
    with (
        shared_server(maxmemory="130mb", maxmemory_policy="allkeys-lru") as server,
        contextlib.closing(KVCache(server.url, 10_000)) as kv,
        local_ray(server.url, allow_eviction=True),
    ):
        data = np.random.default_rng(0).random(MIB)
        refs = [ray.put(data + i) for i in range(8)]
        spill(refs, server)

        def values() -> int:
            ids = [ref.hex().encode() for ref in refs]
            return sum(any(i in key for i in ids) for key in server.our_keys())

        before = values()
        while values() == before:
            kv.step()
        lost = 0
        for i, ref in enumerate(refs):
            try:
                assert (ray.get(ref, timeout=PATIENCE) == data + i).all()
            except ObjectLostError:
                lost += 1
        assert 0 < lost < len(refs)
