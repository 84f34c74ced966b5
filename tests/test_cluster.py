"""A real cluster: found by itself, used whole, and survived whatever happens to it meanwhile."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import re
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from click.testing import CliRunner
from support.clusters import MIB, local_ray
from support.samples import noise, object_id, source
from support.servers import (
    INDEX,
    ROOT,
    Node,
    Server,
    acl_user,
    dead_port,
    free_port,
    server_binary,
    wait_until,
)
from support.stores import Store
from support.topologies import SLOTS, Cluster, cluster_servers
from valkey.crc import key_slot

from ray_valkey_spill.cli import check, commands
from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
    SpillError,
)
from ray_valkey_spill.format.names import ObjectName, new_attempt
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import Request, command, fetch, store
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.cleanup import CleanUp
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import Ledger, link_to

pytestmark = pytest.mark.usefixtures("no_thread_left")

CHUNK = 64 << 10
CHUNKS = 40
SIZE = CHUNKS * CHUNK
SESSION, NODE = "session_1", "ab" * 28
KEY = f"{ROOT}test"
REACHED_ALL = SLOTS  # more keys than any test has to try until one is where it wants it


def config(url: str, *, password: str | None = None, **params: Any) -> Config:
    environ = {"RAY_VALKEY_SPILL_PASSWORD": password} if password else {}
    given = {"url": url, "retry_timeout": 100, "chunk_size": CHUNK, **params}
    return Config.load(given, environ)


@contextlib.contextmanager
def linked(url: str, **params: Any) -> Iterator[Link]:
    with contextlib.closing(link_to(config(url, **params))) as link:
        yield link


def endpoints(nodes: Iterable[Node]) -> set[Endpoint]:
    return {Endpoint("127.0.0.1", node.port) for node in nodes}


@dataclass
class Objects:
    """An object store, what has been put into it, and what may happen in the middle of that."""

    store: Store
    data: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def put(self, *sizes: int) -> list[str]:
        urls, failure = self.try_to_put(*sizes)
        assert failure is None, failure
        return urls

    def try_to_put(self, *sizes: int) -> tuple[list[str], SpillError | None]:
        made = [(number, noise(size, number)) for number, size in zip(self._numbers, sizes)]
        urls, failure = self.store.put([source(value, number) for number, value in made])
        for url, (number, value) in zip(urls, made):
            self.data[url] = object_id(number), value
        return urls, failure

    def get(self, url: str) -> bytes:
        found = self.store.find(url, self.data[url][0])
        target = bytearray(found.header.size)
        self.store.fill(found, memoryview(target))
        return bytes(target)

    def check(self, *urls: str) -> None:
        """Those, or all there are, come back as they were put."""
        for url in urls or [*self.data]:
            assert self.get(url) == self.data[url][1]

    def delete(self, *urls: str) -> None:
        self.store.delete(urls)
        for url in urls:
            del self.data[url]

    def name(self, url: str) -> ObjectName:
        return self.store.keys.parse_url(url).name

    @contextlib.contextmanager
    def struck(
        self, what: str, when: int | Callable[[int], bool], strike: Callable[[], object]
    ) -> Iterator[None]:
        """Have `strike` come before the chunk `when` of a "put" or of a "fill".

        That is its number, or a condition that gets the number of each chunk.
        """
        is_due = when if callable(when) else when.__eq__
        steps = {"put": (self.store.packer, "pack"), "fill": (self.store.valkey, "read")}
        owner, name = steps[what]
        method = getattr(owner, name)
        strikes = [strike]

        def struck(items: Iterator[Any]) -> Iterator[Any]:
            for i, item in enumerate(items):
                if strikes and is_due(i):
                    strikes.pop()()
                yield item

        def pack(*args: Any) -> Iterator[Any]:
            return struck(method(*args))

        def read(place: Any, sizes: Any, use: Any) -> Any:
            return method(place, sizes, lambda receive: use(lambda wanted: struck(receive(wanted))))

        setattr(owner, name, pack if what == "put" else read)
        try:
            yield
        finally:
            setattr(owner, name, method)
        assert not strikes


@contextlib.contextmanager
def objects_at(url: str, **params: Any) -> Iterator[Objects]:
    with contextlib.closing(Store(config(url, **params), SESSION, NODE)) as store:
        yield Objects(store)


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_servers(tmp_path_factory.mktemp("shared")) as cluster:
        yield cluster


@pytest.fixture
def cluster(_shared: Cluster) -> Iterator[Cluster]:
    """One whose nodes live on, with foreign keys on it. A test must leave none of ours."""
    _shared.settle_foreign()
    yield _shared
    _shared.wait_until_whole()
    assert _shared.our_keys() == []
    _shared.assert_foreign_untouched()


@pytest.fixture(scope="module")
def _mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("mortal")
    # A killed process loses nothing that it has written.
    with cluster_servers(directory, appendonly=True, appendfsync="no") as cluster:
        yield cluster


@pytest.fixture
def mortal(_mortal: Cluster) -> Iterator[Cluster]:
    """One whose nodes a test may kill."""
    _mortal.flush()
    yield _mortal
    for node in _mortal.nodes:
        if not node.alive:
            _mortal.restart(node)
        # Of a `Loss` that a test did not end.
        node.client.config_set("masterauth", "")
    _mortal.wait_until_whole()
    assert _mortal.our_keys() == []


@pytest.fixture
def link(cluster: Cluster) -> Iterator[Link]:
    with linked(cluster.url) as link:
        yield link
    for key in cluster.our_keys():
        cluster.client.delete(key)


@pytest.fixture
def objects(cluster: Cluster) -> Iterator[Objects]:
    with objects_at(cluster.url) as objects:
        yield objects
        destroy(objects)


def destroy(objects: Objects) -> None:
    objects.store.destroy(lambda pid: False)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def key_at(cluster: Cluster, node: Node, but: Iterable[str] = ()) -> str:
    """A key that `node` serves."""
    keys = (f"{KEY}:{i}" for i in range(REACHED_ALL))
    return next(key for key in keys if key not in but and cluster.primary_of(key) is node)


def keys_in_a_slot(count: int) -> list[str]:
    return [f"{KEY}:{{slot}}:{i}" for i in range(count)]


def another(cluster: Cluster, node: Node) -> Node:
    return next(other for other in cluster.primaries() if other is not node)


# --- which servers it is ---


def test_a_cluster_is_recognised_from_any_one_node_of_it(cluster: Cluster) -> None:
    for node in cluster.nodes:
        with objects_at(node.url) as objects:
            assert {*objects.store.link.infos()} == endpoints(cluster.primaries())
            (url,) = objects.put(SIZE)
            objects.check()
            objects.delete(url)


def test_dead_and_foreign_nodes_among_several_do_not_matter(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Such as one that was restarted without its files: it serves nothing, and knows nobody."""
    bus = {"cluster_enabled": True, "cluster_port": free_port()}
    lonely = Node(tmp_path / "lonely", free_port(), bus)
    with contextlib.closing(lonely):
        lonely.start()
        wait_until(lonely.serves)
        seeds = [f"127.0.0.1:{port}" for port in (lonely.port, dead_port(), cluster.nodes[4].port)]
        for order in itertools.permutations(seeds):
            with linked(f"valkey://{','.join(order)}") as link:
                assert link.execute(command("GET", KEY)) == [None]
                assert {*link.infos()} == endpoints(cluster.primaries())


def test_silent_nodes_are_not_all_waited_for_one_after_the_other() -> None:
    """As a network that drops packets leaves them: they take connections, and say nothing."""
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=8))
            for _ in range(16)
        ]
        hosts = ",".join(f"127.0.0.1:{each.getsockname()[1]}" for each in listeners)
        link = stack.enter_context(linked(f"valkey://{hosts}", retry_timeout=1))
        with pytest.raises(ServerUnavailableError):
            link.execute(command("GET", KEY))
        asked = [each for each in listeners if select.select([each], [], [], 0)[0]]
        assert 1 <= len(asked) < len(listeners) // 2


def test_a_living_node_is_found_behind_two_silent_ones(cluster: Cluster) -> None:
    """Also by those that have little time, as a head that starts has."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [*(each.getsockname()[1] for each in silent), cluster.nodes[0].port]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        made = link_to(config(f"valkey://{hosts}"), unreachable_timeout=1.5)
        link = stack.enter_context(contextlib.closing(made))
        assert link.execute(command("GET", KEY)) == [None]
        assert {*link.infos()} == endpoints(cluster.primaries())


def test_several_hosts_that_are_no_cluster_are_refused(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"several hosts.*not a node of.*sentinel_service"):
        preflight.run_all(config(f"valkey://127.0.0.1:{server.port},127.0.0.1:1"))


def test_another_database_than_a_cluster_has_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ServerRefusedError, match="most clusters have only 0"):
        preflight.run_all(config(f"{cluster.url[:-1]}3"))


@pytest.mark.parametrize(
    ("preferred", "hostname"),
    [("hostname", "localhost"), ("hostname", ""), ("unknown-endpoint", "")],
)
def test_nodes_may_announce_a_name_or_nothing_at_all(
    cluster: Cluster, preferred: str, hostname: str
) -> None:
    def announce(preferred: str, hostname: str) -> None:
        for node in cluster.nodes:
            node.client.config_set("cluster-announce-hostname", hostname)
            node.client.config_set("cluster-preferred-endpoint-type", preferred)
        named = {"hostname": hostname.encode() or b"?", "unknown-endpoint": None}.get(preferred)
        for node in cluster.nodes:
            wait_until(lambda: preferred == "ip" or {*_announced(node)} == {named})  # noqa: B023

    announce(preferred, hostname)
    try:
        with objects_at(f"valkey://localhost:{cluster.nodes[0].port}") as objects:
            objects.put(SIZE, 100)
            objects.check()
            known = objects.store.link
            assert {node.host for node in known.infos()} == {"localhost"}
            with moved(cluster, INDEX):
                objects.check()
                objects.put(SIZE)
            destroy(objects)
    finally:
        announce("ip", "")


def _announced(node: Node) -> Iterator[Any]:
    for _, _, *nodes in node.client.execute_command("CLUSTER SLOTS"):
        yield from (told[0] for told in nodes)


@contextlib.contextmanager
def moved(cluster: Cluster, key: str) -> Iterator[None]:
    """With the slot of `key` half migrated at first, and then as a whole."""
    home = cluster.primary_of(key)
    migration = cluster.migration(key_slot(key.encode()), another(cluster, home))
    next(migration)
    next(migration, None)
    for _ in migration:
        pass
    yield
    cluster.migrate_slot(key_slot(key.encode()), home)


# --- how it is used ---


def test_chunks_lie_on_all_shards_and_the_books_on_one(cluster: Cluster, objects: Objects) -> None:
    (url,) = objects.put(SIZE)
    name = objects.name(url)
    chunks = objects.store.keys.chunks(name)
    assert len({cluster.primary_of(key).port for key in chunks}) == 3
    books = cluster.primary_of(INDEX)
    objects.store.renew_lease("", lambda: False)
    keys = objects.store.keys
    accounts = (keys.pending, keys.usage, keys.totals, keys.writers)
    for key in (*accounts, keys.leases, keys.overflows):
        assert cluster.primary_of(key) is books
    metadata = (INDEX, keys.usage, keys.totals, keys.leases)
    assert {*cluster.our_keys()} == {
        key.encode() for key in (*chunks, keys.header(name), *metadata)
    }


def test_nothing_else_is_looked_at(cluster: Cluster, objects: Objects) -> None:
    for node in cluster.nodes:
        node.client.config_resetstat()
    urls = objects.put(SIZE, 100, 5000)
    objects.check()
    objects.delete(*urls)
    objects.store.renew_lease("", lambda: False)
    objects.store.recover(lambda pid: False)
    destroy(objects)
    allowed = {name.lower() for name in preflight.COMMANDS} | {"cluster|slots", "hello"}
    ours = {"select", "client|setinfo", "config|resetstat", "info", "ping", "publish"}
    of_replication = {"replconf", "psync", "cluster|setslot", "multi", "exec"}
    for node in cluster.nodes:
        ran = {name.removeprefix("cmdstat_") for name in node.client.info("commandstats")}
        assert ran <= allowed | ours | of_replication


def test_all_shards_are_at_work_at_once(cluster: Cluster, background: ThreadPoolExecutor) -> None:
    """With one that does nothing, the others have done all that is theirs."""
    stalled = another(cluster, cluster.primary_of(INDEX))
    others = [node for node in cluster.primaries() if node is not stalled]

    def is_of_others(key: str) -> bool:
        return bool(cluster.client.get_node_from_key(key).port != stalled.port)

    def of_others(name: ObjectName) -> int:
        """Of its chunks and its header, how many."""
        keys = objects.store.keys
        return sum(is_of_others(key) for key in (*keys.chunks(name), keys.header(name)))

    # So small that all of a shard's can be under way.
    with objects_at(cluster.url, chunk_size=CHUNK // 4) as objects, patient(cluster):
        size = 5 * CHUNK
        (url,) = objects.put(size)
        name = objects.name(url)
        for node in others:
            node.client.config_resetstat()
        with stalled.paused():
            getting = background.submit(objects.get, url)
            wait_until(lambda: sum(_calls(node, "get") for node in others) == of_others(name))
            assert not getting.done()
        assert getting.result() == objects.data[url][1]
        # All are asked for their memory before a put, but not again within seconds.
        objects.delete(url, *objects.put(size))
        with stalled.paused():
            putting = background.submit(objects.put, size)
            pending = objects.store.keys.pending
            wait_until(lambda: cluster.client.zcard(pending))
            (member,) = cluster.client.zrange(pending, 0, -1)
            theirs = of_others(ObjectName.parse(member.decode()))
            wait_until(lambda: len(_data_at(cluster, stalled)) == theirs)
            assert not putting.done()
        objects.delete(*putting.result())


@contextlib.contextmanager
def patient(cluster: Cluster) -> Iterator[None]:
    """Have nodes wait for one that stands still."""
    for node in cluster.nodes:
        node.client.config_set("cluster-node-timeout", 60_000)
    try:
        yield
        cluster.wait_until_whole()
    finally:
        for node in cluster.nodes:
            node.client.config_set("cluster-node-timeout", 1_500)


def _calls(node: Node, name: str) -> int:
    return int(node.client.info("commandstats").get(f"cmdstat_{name}", {"calls": 0})["calls"])


def test_an_object_is_stored_only_after_its_data_and_forgotten_only_after_them(
    cluster: Cluster, objects: Objects, background: ThreadPoolExecutor
) -> None:
    # All are asked for their memory before a put, but not again within seconds.
    objects.delete(*objects.put(1000))
    books = cluster.primary_of(INDEX)
    stalled = another(cluster, books)
    sizes = [1000] * 40
    pending = objects.store.keys.pending
    with patient(cluster):
        with stalled.paused():
            putting = background.submit(objects.put, *sizes)
            wait_until(lambda: books.client.zcard(pending) == len(sizes))
            wait_until(lambda: _data_at(cluster, stalled))
            assert not books.client.exists(INDEX)
        urls = putting.result()
        assert books.client.zcard(INDEX) == len(sizes)
        with stalled.paused():
            deleting = background.submit(objects.store.delete, urls)
            wait_until(lambda: not _data_at(cluster, stalled))
            assert books.client.zcard(INDEX) == len(sizes)
        deleting.result()
    assert cluster.our_keys() == []


def _data_at(cluster: Cluster, but: Node) -> list[bytes]:
    """The data keys of all primaries but one, that may stand still."""
    nodes = [node for node in cluster.nodes if node is not but and node.alive]
    keys = [key for node in nodes if _is_primary(node) for key in node.client.keys(f"{ROOT}*")]
    return [key for key in keys if b"{" not in key]


def _is_primary(node: Node) -> bool:
    return bool(node.client.info("replication")["role"] == "master")


def test_what_could_not_be_removed_stays_in_the_books(cluster: Cluster, objects: Objects) -> None:
    (url,) = objects.put(SIZE)
    node = another(cluster, cluster.primary_of(INDEX))
    node.client.acl_setuser("default", enabled=True, commands=["-unlink"])
    try:
        with pytest.raises(ServerRefusedError, match="NOPERM"):
            objects.store.delete([url])
        assert cluster.spilled_ids() == {objects.data[url][0]}
    finally:
        node.client.acl_setuser("default", enabled=True, commands=["+unlink"])
    objects.delete(url)
    assert cluster.our_keys() == []


def test_runs_over_several_connections_may_alternate(link: Link) -> None:
    link.execute(*[store(f"{KEY}:{i}", [b"%d" % i]) for i in range(200)])
    forth = link.run([fetch(f"{KEY}:{i}") for i in range(200)])
    back = link.run([fetch(f"{KEY}:{i}") for i in reversed(range(200))])
    replies = [(int(one.result()), int(other.result())) for one, other in zip(forth, back)]
    assert replies == [(i, 199 - i) for i in range(200)]


def test_a_consumer_that_stops_early_does_not_spoil_what_follows(link: Link) -> None:
    link.execute(*[store(f"{KEY}:{i}", [b"%d" % i]) for i in range(200)])
    for stop in range(1, 60, 7):
        run = link.run([fetch(f"{KEY}:{i}") for i in range(200)])
        assert [int(request.result()) for request in itertools.islice(run, stop)] == [*range(stop)]
        values = link.execute(*[fetch(f"{KEY}:{i}") for i in range(100, 200)])
        assert [int(value) for value in values] == [*range(100, 200)]
        run.close()


def test_objects_are_looked_up_while_others_are_filled(objects: Objects) -> None:
    urls = objects.put(*[100, SIZE, 3 * CHUNK] * 15)
    wanted = [(url, objects.data[url][0]) for url in urls]
    for (url, _), found in zip(wanted, objects.store.find_all(wanted)):
        assert not isinstance(found, LostObjectError)
        target = bytearray(found.header.size)
        objects.store.fill(found, memoryview(target))
        assert target == objects.data[url][1]


# --- what a head start and `check` find ---


def findings(wanted: Config) -> dict[str, check.Finding]:
    params = {"url": str(wanted.address), "min_replicas": wanted.min_replicas, "retry_timeout": 2}
    return {finding.subject: finding for finding in check.run(params)}


def test_check_looks_at_the_whole_cluster(cluster: Cluster) -> None:
    found = findings(config(cluster.url, min_replicas=1))
    assert {finding.status for finding in found.values()} <= {check.OK, check.WARNING}
    assert found["topology"].detail == "a cluster of 3 shards that serve"
    assert all(f"1 of 127.0.0.1:{n.port}" in found["replicas"].detail for n in cluster.primaries())


def test_one_shard_that_evicts_is_found_and_named(cluster: Cluster) -> None:
    for node in cluster.primaries():
        node.client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigError, match=f"127.0.0.1:{node.port} has .*allkeys-lru"):
                preflight.run_all(config(cluster.url))
            policy = findings(config(cluster.url))["policy"]
            assert policy.status == check.FAILED
            assert f"127.0.0.1:{node.port}" in policy.detail
        finally:
            node.client.config_set("maxmemory-policy", "noeviction")


def test_one_shard_that_lacks_a_permission_is_found(cluster: Cluster) -> None:
    wanted = config(cluster.url, username="ray", password="secret")
    with acl_user([node.client for node in cluster.nodes], preflight.acl_rules(wanted)):
        preflight.run_all(wanted)
        for node in cluster.primaries():
            node.client.acl_setuser("ray", enabled=True, commands=["-strlen"])
            with pytest.raises(ServerRefusedError, match="run STRLEN"):
                preflight.run_all(wanted)
            node.client.acl_setuser("ray", enabled=True, commands=["+strlen"])


def test_one_shard_with_too_few_replicas_is_found_and_named(tmp_path: Path) -> None:
    with cluster_servers(tmp_path, primaries=2, replicas=1) as cluster:
        bare = next(node for node in cluster.primaries() if not cluster.replicas_of(node))
        wanted = config(cluster.url, min_replicas=1)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{bare.port} has 0 replicas"):
            preflight.run_all(wanted)
        replicas = findings(wanted)["replicas"]
        assert replicas.status == check.FAILED
        assert f"127.0.0.1:{bare.port}" in replicas.detail


def test_a_user_with_no_more_than_the_permissions_told_can_do_everything(cluster: Cluster) -> None:
    params = {"username": "ray", "password": "secret", "min_replicas": 1}
    wanted = config(cluster.url, **params)
    clients = [node.client for node in cluster.nodes]
    for client in clients:
        client.acl_log_reset()
    with acl_user(clients, preflight.acl_rules(wanted)):
        preflight.run_all(wanted)
        with objects_at(cluster.url, **params) as objects:
            objects.put(SIZE, 100)
            with moved(cluster, INDEX):
                objects.put(SIZE, 100)
                objects.check()
                objects.delete(*[*objects.data][:2])
            objects.store.renew_lease("", lambda: False)
            objects.store.recover(lambda pid: False)
            destroy(objects)
        assert [client.acl_log() for client in clients] == [[]] * len(clients)


# --- slots that move ---


def test_slots_that_moved_between_runs_are_found(cluster: Cluster, link: Link) -> None:
    keys = keys_in_a_slot(3)
    link.execute(*[store(key, [key.encode()]) for key in keys])
    slot, home = key_slot(keys[0].encode()), cluster.primary_of(keys[0])
    for to in (another(cluster, home), home):
        cluster.migrate_slot(slot, to)
        assert link.execute(*map(fetch, keys)) == [key.encode() for key in keys]
        # What it was told is looked up whole, and noted.
        assert link.owner(keys[0]) == Endpoint("127.0.0.1", to.port)
    assert link.breaks == 0


def test_a_move_is_looked_up_by_the_next_run_and_not_by_one_that_is_over(
    cluster: Cluster,
) -> None:
    """Who cannot look it up any more has got its replies nevertheless."""
    nodes = [node.client for node in cluster.nodes]
    slot, home = key_slot(KEY.encode()), cluster.primary_of(KEY)
    to = another(cluster, home)
    with (
        acl_user(nodes, "~ray:* +@all", password="pw"),
        linked(cluster.url, username="ray", password="pw") as link,
    ):
        link.execute(store(KEY, [b"value"]))
        for client in nodes:
            client.execute_command("ACL SETUSER ray -cluster|slots")
        cluster.migrate_slot(slot, to)
        assert link.execute(fetch(KEY)) == [b"value"]
        with pytest.raises(ServerRefusedError, match="NOPERM"):
            link.execute(fetch(KEY))
        for client in nodes:
            client.execute_command("ACL SETUSER ray +cluster|slots")
        assert link.execute(fetch(KEY), command("UNLINK", KEY)) == [b"value", 1]
        assert link.owner(KEY) == Endpoint("127.0.0.1", to.port)
        assert link.breaks == 0
    cluster.migrate_slot(slot, home)


def test_a_failover_that_only_the_last_reply_shows_counts_as_a_break(
    cluster: Cluster, link: Link
) -> None:
    """What the primary before had acknowledged may be lost, so that it has to be confirmed."""
    link.execute(store(KEY, [b"value"]))
    wait_until_replicated(cluster)
    (replica,) = cluster.replicas_of(cluster.primary_of(KEY))
    cluster.failover(replica)
    before = link.breaks
    assert link.execute(fetch(KEY)) == [b"value"]
    assert link.breaks > before


def test_slots_that_move_during_a_run_are_followed(cluster: Cluster, link: Link) -> None:
    keys = [f"{KEY}:{i}" for i in range(100)]
    link.execute(*[store(key, [key.encode()]) for key in keys])
    homes = {key: cluster.primary_of(key) for key in keys[40:90:10]}

    def requests() -> Iterator[Request]:
        for number, key in enumerate(keys):
            if number == 30:
                for moving, home in homes.items():
                    to = another(cluster, home)
                    cluster.migrate_slot(key_slot(moving.encode()), to)
            yield fetch(key)

    values = [request.result() for request in link.run(requests())]
    assert values == [key.encode() for key in keys]
    assert link.breaks == 0
    for key, home in homes.items():
        cluster.migrate_slot(key_slot(key.encode()), home)


def test_a_slot_on_its_way_is_served_by_both(cluster: Cluster, link: Link) -> None:
    keys = keys_in_a_slot(6)
    old, new = keys[:4], keys[4:]
    slot, home = key_slot(keys[0].encode()), cluster.primary_of(keys[0])
    to = another(cluster, home)
    link.execute(*[store(key, [key.encode()]) for key in old])
    migration = cluster.migration(slot, to)
    for _ in migration:
        assert link.execute(*map(fetch, old)) == [key.encode() for key in old]
        link.execute(*[store(key, [key.encode()]) for key in new])
        assert link.execute(*[command("UNLINK", key) for key in new]) == [1, 1]
        assert link.execute(*map(fetch, new)) == [None, None]
    assert link.execute(*map(fetch, old)) == [key.encode() for key in old]
    assert link.breaks == 0
    cluster.migrate_slot(slot, home)


@pytest.mark.parametrize("size", [1000, SIZE])
def test_books_on_their_way_are_waited_for(
    cluster: Cluster, objects: Objects, background: ThreadPoolExecutor, size: int
) -> None:
    """`TRYAGAIN`: a script's keys are on two shards."""
    slot, home = key_slot(INDEX.encode()), cluster.primary_of(INDEX)
    objects.put(size, 100)
    kept = [*objects.data]
    (gone,) = objects.put(size)
    link = objects.store.link
    migration = cluster.migration(slot, another(cluster, home))
    assert [next(migration), next(migration)] == [0, 1]
    putting = background.submit(objects.put, size, 100)
    before = link.breaks
    wait_until(lambda: link.breaks > before + 1)
    assert not putting.done()
    for _ in migration:
        pass
    new = putting.result()
    migration = cluster.migration(slot, home)
    assert [next(migration), next(migration)] == [0, 1]
    deleting = background.submit(objects.delete, gone, *new)
    before = link.breaks
    wait_until(lambda: link.breaks > before + 1)
    assert not deleting.done()
    for _ in migration:
        pass
    deleting.result()
    objects.check(*kept)
    assert cluster.spilled_ids() == {objects.data[url][0] for url in kept}


def test_nodes_that_send_it_back_and_forth_are_given_up(
    cluster: Cluster, background: ThreadPoolExecutor
) -> None:
    """One gives a slot away, the other knows nothing of that."""
    slot, home = key_slot(KEY.encode()), cluster.primary_of(KEY)
    identity = another(cluster, home).client.execute_command("CLUSTER MYID")
    home.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", identity)
    try:
        with (
            linked(cluster.url, retry_timeout=0.5) as link,
            pytest.raises(ServerUnavailableError, match=r"(MOVED|ASK).*tried for 0.5 s"),
        ):
            link.execute(command("GET", KEY))
        with linked(cluster.url) as link:
            getting = background.submit(link.execute, command("GET", KEY))
            wait_until(lambda: link.breaks > 1)
            home.client.execute_command("CLUSTER SETSLOT", slot, "STABLE")
            assert getting.result() == [None]
    finally:
        home.client.execute_command("CLUSTER SETSLOT", slot, "STABLE")


def test_a_move_is_noticed_while_another_connection_breaks(cluster: Cluster, link: Link) -> None:
    one, other = cluster.primaries()[:2]
    moving, cut = key_at(cluster, one), key_at(cluster, other)
    link.execute(store(moving, [b"moving"]), store(cut, [b"cut"]))
    cluster.migrate_slot(key_slot(moving.encode()), another(cluster, one))
    # In an operation: what is closed before one is replaced unnoticed.
    with link.operation():
        other.client.client_kill_filter(_type="normal", skipme=True)
        # The first of what is sent there only has the kernel learn that nobody listens any more.
        requests = [fetch(moving), store(cut, [bytes(200_000)]), fetch(cut)]
        value, _, there = link.execute(*requests)
    assert (value, len(there)) == (b"moving", 200_000)
    assert link.breaks == 1
    cluster.migrate_slot(key_slot(moving.encode()), one)


class Migrator:
    """Has slots that are in use move between shards, as fast as that goes, until it is stopped."""

    def __init__(self, cluster: Cluster) -> None:
        self.moved = 0
        self._cluster = cluster
        self._random = random.Random(0)
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            key = self._some_key()
            home = self._cluster.primary_of(key)
            to = self._random.choice([n for n in self._cluster.primaries() if n is not home])
            self._cluster.migrate_slot(key_slot(key), to)
            self.moved += 1

    def stop(self) -> None:
        self._stopped.set()

    def _some_key(self) -> bytes:
        node = self._random.choice(self._cluster.primaries())
        key = node.client.randomkey()
        return INDEX.encode() if key is None or self.moved % 5 == 0 else bytes(key)


def test_slots_may_move_under_load(
    cluster: Cluster, objects: Objects, background: ThreadPoolExecutor
) -> None:
    migrator = Migrator(cluster)
    migrating = background.submit(migrator.run)
    try:
        for _ in itertools.takewhile(lambda _: migrator.moved < 25, itertools.count()):
            assert not migrating.done()
            objects.put(SIZE, 100, 3 * CHUNK)
            objects.check()
            objects.delete(*[*objects.data][: len(objects.data) // 2])
    finally:
        migrator.stop()
        migrating.result()
    objects.check()
    objects.delete(*objects.data)
    objects.store.recover(lambda pid: False)
    assert cluster.our_keys() == []


def atomic(cluster: Cluster, node: Node, to: Node) -> None:
    """Move the first of `node`'s slots, half of them, as servers since 9.0 do by themselves."""

    def ranges(of: Node) -> list[tuple[int, int]]:
        told = of.client.execute_command("CLUSTER SLOTS")
        return [(first, last) for first, last, (_, port, *_), *_ in told if port == of.port]

    first, last = ranges(node)[0]
    identity = to.client.execute_command("CLUSTER MYID")
    half = ("SLOTSRANGE", first, (first + last) // 2, "NODE", identity)
    node.client.execute_command("CLUSTER MIGRATESLOTS", *half)
    wait_until(lambda: any(start <= first <= end for start, end in ranges(to)))
    cluster.wait_until_whole()


def one_by_one(cluster: Cluster, node: Node, to: Node) -> None:
    """Move the slots of twenty of `node`'s keys."""
    keys = node.client.keys(f"{ROOT}*")[:20]
    for slot in {key_slot(key) for key in keys}:
        cluster.migrate_slot(slot, to)


VERSION = subprocess.run([server_binary(), "--version"], capture_output=True, check=True).stdout
WAYS = [one_by_one, *([atomic] if re.search(rb"v=(9|\d\d)\.", VERSION) else [])]


@pytest.mark.parametrize("what", ["put", "fill"])
@pytest.mark.parametrize("way", WAYS)
def test_many_slots_may_move_in_the_middle(
    cluster: Cluster, objects: Objects, what: str, way: Callable[[Cluster, Node, Node], None]
) -> None:
    (before,) = objects.put(SIZE)
    home = cluster.primary_of(INDEX)
    to = another(cluster, home)
    for old, new in ((home, to), (to, home)):
        with objects.struck(what, 13, lambda: way(cluster, old, new)):  # noqa: B023
            urls = objects.put(SIZE) if what == "put" else []
            objects.check(before)
        objects.check(*urls)
    assert objects.store.valkey.breaks == 0


# --- nodes that fail, and are followed ---


KILLS = [("put", 0), ("put", 13), ("put", CHUNKS - 1), ("fill", 13)]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "number"), KILLS)
def test_a_primary_killed_in_the_middle_is_followed(
    mortal: Cluster, what: str, number: int
) -> None:
    with objects_at(mortal.url) as objects:
        (before,) = objects.put(SIZE)
        wait_until_replicated(mortal)
        key = objects.store.keys.chunks(objects.name(before))[number]
        # Of a chunk that is just to be read; and of the books, too.
        victim = mortal.primary_of(key if what == "fill" or number else INDEX)
        with objects.struck(what, number, victim.kill):
            urls = objects.put(SIZE) if what == "put" else []
            objects.check(before)
        objects.check(before, *urls)
        assert {*objects.store.link.infos()} == endpoints(mortal.primaries())
        objects.delete(*objects.data)
        objects.store.recover(lambda pid: False)


@pytest.mark.parametrize("how", ["", "TAKEOVER"])
@pytest.mark.parametrize("what", ["put", "fill"])
def test_a_primary_that_hands_over_in_the_middle_is_followed(
    cluster: Cluster, objects: Objects, what: str, how: str
) -> None:
    (before,) = objects.put(SIZE)
    wait_until_replicated(cluster)
    primary = cluster.primary_of(INDEX)
    (replica,) = cluster.replicas_of(primary)
    with objects.struck(what, 13, lambda: cluster.failover(replica, how)):
        urls = objects.put(SIZE) if what == "put" else []
        objects.check(before)
    objects.check(before, *urls)


@pytest.mark.slow
def test_a_primary_that_stood_still_and_does_not_know_that_it_was_followed(mortal: Cluster) -> None:
    with objects_at(mortal.url) as objects:
        primary = another(mortal, mortal.primary_of(INDEX))
        (replica,) = mortal.replicas_of(primary)

        def stand_still() -> None:
            wait_until(lambda: _offset(replica) == _offset(primary))
            with primary.paused():
                wait_until(lambda: _is_primary(replica))

        with objects.struck("put", 13, stand_still):
            (url,) = objects.put(SIZE)
        objects.check(url)
        objects.delete(url)
        objects.store.recover(lambda pid: False)


def wait_until_replicated(cluster: Cluster) -> None:
    for primary in cluster.primaries():
        for replica in cluster.replicas_of(primary):
            wait_until(lambda: _offset(replica) == _offset(primary))  # noqa: B023


def _offset(node: Node) -> int:
    found = node.client.info("replication")
    return int(found.get("slave_repl_offset", found["master_repl_offset"]))


class Loss:
    """Has a shard lose what it acknowledges between `begin` and `end`."""

    def __init__(self, cluster: Cluster, primary: Node) -> None:
        self._cluster = cluster
        self._primary = primary
        (self._replica,) = cluster.replicas_of(primary)

    def begin(self) -> None:
        """The replica gets nothing more."""
        wait_until(lambda: _offset(self._replica) == _offset(self._primary))
        # The primary wants none, and takes none for that either.
        self._replica.client.config_set("masterauth", "none is wanted")
        self._primary.client.execute_command("CLIENT KILL TYPE replica")
        wait_until(lambda: not self._primary.client.info("replication")["connected_slaves"])

    def is_acknowledged(self, link: Link, number: int) -> bool:
        """Whether, before chunk `number` of a put, the link has the reply to a value to be lost.

        The link reads replies in the order of the values, so only the latest ones have none.
        """
        first_without = number - 1 - link.under_way // CHUNK
        chunks = self._primary.client.keys(f"{ROOT}{SESSION}:{NODE}:*:*")
        # The replica may have got chunk 0.
        return any(0 < int(chunk.rsplit(b":", 1)[1]) < first_without for chunk in chunks)

    def end_by_killing_it(self) -> None:
        """The primary is no more, and the replica follows."""
        self._primary.kill()
        wait_until(lambda: _is_primary(self._replica))
        self._replica.client.config_set("masterauth", "")

    def end_by_catching_up(self) -> None:
        """Nothing is lost."""
        self._replica.client.config_set("masterauth", "")
        self._cluster.wait_until_whole()

    def end_by_taking_over(self) -> None:
        """The replica follows, and the primary learns of it: no connection breaks."""
        self._cluster.failover(self._replica, "TAKEOVER")
        self._replica.client.config_set("masterauth", "")


@pytest.mark.slow
@pytest.mark.parametrize("end", [Loss.end_by_killing_it, Loss.end_by_taking_over])
def test_what_a_failover_lost_of_a_put_is_put_again(
    mortal: Cluster, end: Callable[[Loss], None]
) -> None:
    """Also if no connection broke meanwhile."""
    with objects_at(mortal.url) as objects:
        tries = _counted(objects.store.valkey, "confirm")
        loss = Loss(mortal, another(mortal, mortal.primary_of(INDEX)))
        is_due = functools.partial(loss.is_acknowledged, objects.store.link)
        with (
            objects.struck("put", 1, loss.begin),
            objects.struck("put", is_due, lambda: end(loss)),
        ):
            # More than a cluster may have under way at once.
            (url,) = objects.put(10 * SIZE)
        assert tries() == 2
        objects.check(url)
        objects.delete(url)
        objects.store.recover(lambda pid: False)


def _counted(owner: Any, name: str) -> Callable[[], int]:
    method, calls = getattr(owner, name), itertools.count()

    def run(*args: Any) -> Any:
        next(calls)
        return method(*args)

    setattr(owner, name, run)
    return lambda: calls.__reduce__()[1][0]


@pytest.mark.slow
def test_what_a_failover_lost_of_the_books_is_noted_again(mortal: Cluster) -> None:
    """Else a put that was reported would count as half-written once its process has ended."""
    with objects_at(mortal.url) as objects:
        tier = objects.store.valkey
        loss = Loss(mortal, mortal.primary_of(INDEX))
        confirm = tier.confirm

        def confirm_what_is_lost(*args: Any) -> None:
            tier.confirm = confirm  # type: ignore[method-assign]
            loss.end_by_killing_it()
            tier.ledger.usages()
            confirm(*args)

        tier.confirm = confirm_what_is_lost  # type: ignore[method-assign]
        # The last value is on its way, and so is what was registered.
        with objects.struck("put", CHUNKS, loss.begin):
            (url,) = objects.put(SIZE)
        assert mortal.spilled_ids() == {objects.data[url][0]}
        objects.store.recover(lambda pid: False)
        objects.check(url)
        objects.delete(url)


@pytest.mark.slow
def test_what_a_failover_lost_of_a_delete_is_removed_again(
    mortal: Cluster, background: ThreadPoolExecutor
) -> None:
    """Else the books would have forgotten what is there again."""
    with objects_at(mortal.url) as objects:
        primary = mortal.primary_of(INDEX)
        keys = objects.store.keys
        headers = {keys.header(objects.name(url)): url for url in objects.put(*[10 * CHUNK] * 20)}
        # The first key to go is lost, and another shard keeps the delete from being over by then.
        header = next(header for header in headers if mortal.primary_of(header) is primary)
        chunks = map(mortal.primary_of, keys.chunks(objects.name(headers[header])))
        busy = next(node for node in chunks if node is not primary)
        loss = Loss(mortal, primary)
        loss.begin()
        busy.client.client_pause(60_000, all=False)
        deleting = background.submit(objects.delete, headers[header])
        wait_until(lambda: not primary.client.keys(f"{header}*"))
        loss.end_by_killing_it()
        busy.client.client_unpause()
        deleting.result()
        objects.delete(*objects.data)
        objects.store.recover(lambda pid: False)
        assert mortal.our_keys() == []


def test_replicas_hear_of_a_removal_before_the_books_forget_the_object(mortal: Cluster) -> None:
    """Else a failover could bring values back that nobody knows of."""
    books = mortal.primary_of(INDEX)
    with objects_at(mortal.url, min_replicas=1) as objects:
        (url,) = objects.put(SIZE)
        waits = {node: _calls(node, "wait") for node in mortal.primaries()}
        with books.client.monitor() as monitor:
            objects.delete(url)
            books.client.echo("the end")
            seen = []
            while (ran := monitor.next_command())["command"] != "ECHO the end":
                name = ran["command"].split()[0]
                if ran["client_type"] != "lua" and name in ("UNLINK", "WAIT", "EVAL"):
                    seen.append(name)
        values = seen.count("UNLINK")
        assert values > 1
        assert seen == [*["UNLINK"] * values, "WAIT", "EVAL"]
        assert all(_calls(node, "wait") == calls + 1 for node, calls in waits.items())


def test_a_removal_goes_on_without_replicas_that_are_away(mortal: Cluster) -> None:
    with objects_at(mortal.url, min_replicas=1) as objects:
        objects.put(*[SIZE] * 3)
        loss = Loss(mortal, another(mortal, mortal.primary_of(INDEX)))
        loss.begin()
        objects.delete(*objects.data)
        assert mortal.our_keys() == []
        loss.end_by_catching_up()


@pytest.mark.slow
def test_what_a_primary_removes_that_has_been_followed_is_removed_from_its_successor_too(
    mortal: Cluster, background: ThreadPoolExecutor
) -> None:
    with objects_at(mortal.url, min_replicas=1) as objects:
        objects.put(*[SIZE] * 3)
        primary = another(mortal, mortal.primary_of(INDEX))
        (replica,) = mortal.replicas_of(primary)
        link = objects.store.link
        with primary.paused():
            wait_until(lambda: _is_primary(replica))
            deleting = background.submit(objects.delete, *objects.data)
            wait_until(lambda: link.under_way)
        # It executes what it was sent meanwhile, and answers, before it hears that it was followed.
        deleting.result()
        mortal.wait_until_whole()
        assert mortal.our_keys() == []


@pytest.mark.slow
def test_one_shard_whose_replica_lags_is_waited_for_and_named(mortal: Cluster) -> None:
    with objects_at(mortal.url, min_replicas=1, retry_timeout=1) as objects:
        objects.delete(*objects.put(SIZE))
        primary = another(mortal, mortal.primary_of(INDEX))
        loss = Loss(mortal, primary)
        loss.begin()
        urls, failure = objects.try_to_put(SIZE)
        assert not urls
        assert isinstance(failure, ServerUnavailableError)
        assert f"0 of 1 replicas of 127.0.0.1:{primary.port}" in failure.message
        assert mortal.our_keys() == []
        loss.end_by_catching_up()
        objects.check(*objects.put(SIZE))
        objects.delete(*objects.data)


@pytest.mark.slow
def test_a_shard_that_is_down_is_waited_for(
    mortal: Cluster, background: ThreadPoolExecutor
) -> None:
    with objects_at(mortal.url) as objects:
        (url,) = objects.put(SIZE)
        primary = another(mortal, mortal.primary_of(INDEX))
        others = [node for node in mortal.primaries() if node is not primary]
        for node in (*mortal.replicas_of(primary), primary):
            mortal.kill(node)
        wait_until(lambda: all(_state(node) == "fail" for node in others))
        with (
            linked(mortal.url, retry_timeout=0.5) as link,
            pytest.raises(ServerUnavailableError, match=r"(CLUSTERDOWN|refused).*tried for 0.5 s"),
        ):
            link.execute(*[command("GET", f"{KEY}:{i}") for i in range(100)])
        putting = background.submit(objects.put, SIZE)
        link = objects.store.link
        before = link.breaks
        wait_until(lambda: link.breaks > before + 1)
        mortal.restart(primary)
        objects.check(url, *putting.result())
        objects.delete(*objects.data)
        objects.store.recover(lambda pid: False)


def _state(node: Node) -> str:
    return str(node.client.cluster("INFO")["cluster_state"])


# --- how much there is room for ---


@contextlib.contextmanager
def bounded(nodes: Iterable[Node], size: int) -> Iterator[None]:
    nodes = [*nodes]
    for node in nodes:
        node.client.config_set("maxmemory", size)
    try:
        yield
    finally:
        for node in nodes:
            node.client.config_set("maxmemory", 0)


def test_no_shard_evicts_keys_of_others_for_spilling_by_itself(
    cluster: Cluster, objects: Objects
) -> None:
    keys = [f"session:{i}" for i in range(300)]
    for key in keys:
        cluster.client.set(key, bytes(100_000), ex=3600)
    primaries = cluster.primaries()
    limit = max(node.client.info("memory")["used_memory"] for node in primaries) + 30 * MIB
    for node in primaries:
        node.client.config_set("maxmemory-policy", "volatile-lru")
        node.client.config_resetstat()
    try:
        with bounded(primaries, limit):
            urls, failure = objects.try_to_put(*[2 * MIB] * 60)
            assert isinstance(failure, ServerFullError)
            assert "max_bytes" in str(failure)
            assert urls
            assert all(node.client.info("stats")["evicted_keys"] == 0 for node in primaries)
            objects.delete(*urls)
    finally:
        for node in primaries:
            node.client.config_set("maxmemory-policy", "noeviction")
    for key in keys:
        cluster.client.delete(key)


def test_there_is_as_much_room_as_the_fullest_shard_has_times_their_number(
    cluster: Cluster, objects: Objects, tmp_path: Path
) -> None:
    fullest, *others = cluster.primaries()
    limit = 24 * MIB
    backlog = fullest.client.info("replication")
    backlog_left = backlog["repl_backlog_size"] - backlog["repl_backlog_histlen"]
    used = int(fullest.client.info("memory")["used_memory"]) + max(0, backlog_left)
    room = limit - limit // 4 - used  # a quarter is left to others
    # A batch that has begun may use half of that.
    too_much = 3 * room + 3 * limit // 8 + 3 * MIB
    with bounded([fullest], limit), bounded(others, 1000 * MIB):
        (url,) = objects.put(2 * room)
        objects.delete(url)
        urls, failure = objects.try_to_put(1000, too_much)
        assert (len(urls), type(failure)) == (1, ServerFullError)
        objects.check(*urls)
        assert objects.store.recover(lambda pid: False) == 0
        assert cluster.spilled_ids() == {objects.data[url][0] for url in urls}
        with objects_at(cluster.url, overflow_uri=str(tmp_path)) as overflowing:
            overflowing.store.renew_lease("", lambda: False)
            urls = overflowing.put(1000, too_much)
            assert [url.startswith("overflow:") for url in urls] == [False, True]
            overflowing.check()
            destroy(overflowing)


def test_a_shard_that_fills_up_meanwhile_fails_the_put_and_nothing_is_left(
    cluster: Cluster, objects: Objects
) -> None:
    full = another(cluster, cluster.primary_of(INDEX))
    with (
        contextlib.ExitStack() as stack,
        objects.struck("put", 13, lambda: stack.enter_context(bounded([full], 1))),
    ):
        urls, failure = objects.try_to_put(SIZE)
    assert (urls, type(failure)) == ([], ServerFullError)
    assert cluster.our_keys() == []


# --- its tools ---


def test_destroying_a_node_leaves_nothing_of_it(cluster: Cluster, objects: Objects) -> None:
    objects.put(SIZE, *[100] * 50)
    name = ObjectName(SESSION, NODE, object_id(99), new_attempt(), CHUNKS)
    with contextlib.closing(link_to(config(cluster.url))) as link:
        link.execute(*Ledger(link, objects.store.keys).registrations([name]))
    cluster.client.set(objects.store.keys.chunks(name)[7], b"half-written")
    with contextlib.closing(Store(config(cluster.url), SESSION, "other")) as other:
        assert other.destroy(lambda pid: False) == 0
        objects.check()
    assert objects.store.destroy(lambda pid: False) == 52
    assert cluster.our_keys() == []


def test_a_clean_up_removes_what_the_dead_have_on_all_shards(
    cluster: Cluster, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "LEASE", 0)
    monkeypatch.setattr(cleanup, "CONFIRMATION", 0)
    monkeypatch.setattr(cleanup, "BETWEEN_LOOKS", 0.01)
    objects.store.renew_lease("10.0.0.1:6379", lambda: False)
    objects.put(SIZE, 100)
    with contextlib.closing(CleanUp(config(cluster.url), lambda address: None)) as clean_up:
        remains = clean_up.find()
        assert [(left.node_name.session, left.usage.objects) for left in remains] == [(SESSION, 2)]
        clean_up.remove(remains)
    assert cluster.our_keys() == []


def test_the_command_line_tells_of_a_cluster(cluster: Cluster, objects: Objects) -> None:
    objects.store.renew_lease("", lambda: False)
    (url,) = objects.put(SIZE)

    def printed(*args: str) -> Any:
        result = CliRunner().invoke(commands.cli, [*args, "--url", cluster.url, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    with bounded(cluster.primaries(), 100 * MIB):
        server = printed("stats")["server"]
    used = sum(node.client.info("memory")["used_memory"] for node in cluster.primaries())
    assert (server["shards"], server["maxmemory_bytes"]) == (3, 300 * MIB)
    assert used / 2 < server["used_bytes"] < 2 * used
    assert objects.data[url][0] in json.dumps(printed("ls"))
    assert objects.data[url][0] in json.dumps(printed("inspect", url))


# --- in Ray ---


@pytest.mark.slow
def test_ray_spills_to_a_cluster_while_a_primary_is_killed(mortal: Cluster) -> None:
    mortal.settle_foreign()
    with local_ray(mortal.url, io_workers=2):
        refs = []
        for i in range(30):
            refs.append(ray.put(np.full(MIB, i)))
            if i == 20:
                mortal.primary_of(INDEX).kill()
        for i, ref in enumerate(refs):
            assert (ray.get(ref) == np.full(MIB, i)).all()
        del refs, ref
        wait_until(lambda: mortal.spilled_keys() == [])
        mortal.assert_foreign_untouched()
