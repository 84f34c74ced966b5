"""An exchange with the server that is interrupted at each of its commands, and what it costs."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import valkey
from support.clock import Clock
from support.proxy import Hold, Proxy, proxy_to
from support.rigs import Rig
from support.samples import get, noise, object_id, source
from support.servers import Node, Server, valkey_server, wait_until
from support.stores import Store
from support.topologies import Cluster, cluster_servers
from support.writer import Writer

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ServerFullError, SpillError
from ray_valkey_spill.format.names import Entry, Keyspace
from ray_valkey_spill.store.object_store import StoredObject
from ray_valkey_spill.tiers import budget
from ray_valkey_spill.tiers.room import cost, member_cost
from ray_valkey_spill.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

CHUNK, SMALL_CHUNK = 10_000, 1024
SESSION, NODE = "session_1", "ab" * 28

# What is spilled together, in bytes.
BATCHES = {"inline": [1000], "chunked": [3 * CHUNK], "batch": [100, 2 * CHUNK, 0, 1000, 2 * CHUNK]}
# What limits the writer: parameters, and the server's maxmemory.
LIMITS: dict[str, tuple[dict[str, Any], int]] = {
    "no limit": ({}, 0),
    "maxmemory": ({}, 200 * MIB),
    "max_bytes": ({"max_bytes": 100 * MIB}, 0),
    "both": ({"max_bytes": 100 * MIB}, 200 * MIB),
}
batches = pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
limits = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


@dataclass
class Namespace:
    """A server, the proxy before it, and an independent look at what is on it."""

    server: Server | Rig
    url: str  # past the proxy
    proxy: Proxy
    maxmemory: int
    params: dict[str, Any]
    stores: list[Store] = field(default_factory=list)

    @property
    def client(self) -> valkey.Valkey:
        return self.server.client

    def store(self, url: str | None = None) -> Store:
        """One over the proxy, unless a `url` is given."""
        given = {"url": url or self.proxy.url, "chunk_size": CHUNK, **self.params}
        self.stores.append(Store(Config.load(given, {}), SESSION, NODE))
        return self.stores[-1]

    def writer(self) -> Writer:
        """A process of its own that has spilled before, and so has what it keeps of a grant."""
        params = {"url": self.proxy.url, "chunk_size": CHUNK, **self.params}
        return Writer(params, SESSION, NODE)

    def fill_up(self) -> None:
        """Let the server refuse whatever takes memory."""
        self.client.config_set("maxmemory", 1)

    def make_room(self) -> None:
        self.client.config_set("maxmemory", self.maxmemory)

    def check(self) -> set[str]:
        """Check the metadata against what is there; returns the ids of the objects.

        Nothing is there but the values of stored objects, and the sums over these, and over what is
        granted, are right.
        """
        keys = self.stores[0].keys
        entries = [Entry.parse(e.decode()) for e in self.client.zrange(keys.index, 0, -1)]
        stored = sum(self._cost(keys, entry) for entry in entries)
        size = sum(entry.size for entry in entries)
        assert [entry.stored for entry in entries] == [self._cost(keys, each) for each in entries]
        values = {key for e in entries for key in (keys.header(e.name), *keys.chunks(e.name))}
        metadata = {keys.index, keys.usage, keys.totals, keys.writers}
        assert {key.decode() for key in self.server.our_keys()} - metadata == values
        granted, written = 0, 0
        for grants in self.client.hvals(keys.writers):
            for grant in grants.decode().split():
                granted += int(grant.partition("=")[2].partition("/")[0])
                written += int(grant.partition("/")[2])
        totals = (self.client.get(keys.totals) or b"0 0 0 0 0 0").decode().split()
        assert [*map(int, totals[:5])] == [len(entries), size, stored, granted, written]
        usages = self.client.hvals(keys.usage)
        assert [usage.split()[:3] for usage in usages] == (
            [[b"%d" % number for number in (len(entries), size, stored)]] if entries else []
        )
        return {entry.name.object_id for entry in entries}

    def _cost(self, keys: Keyspace, entry: Entry) -> int:
        values = [keys.header(entry.name), *keys.chunks(entry.name)]
        lengths = [(len(key), self.client.strlen(key)) for key in values]
        return member_cost(len(str(entry.name))) + sum(cost(*each) for each in lengths)

    def check_pending(self) -> int:
        """Check that nothing is stored; returns how many objects are being written."""
        keys = self.stores[0].keys
        assert not self.client.exists(keys.index)
        return int(self.client.zcard(keys.pending))

    def check_outcome(self, urls: Sequence[str], sizes: Sequence[int]) -> None:
        """Check that what was reported is there, and that nothing of the rest is once recovered."""
        survivor = self.store(self.url)
        for number, url in enumerate(urls):
            assert get(survivor, url, number) == noise(sizes[number], number)
        survivor.recover(is_alive=lambda pid: True)
        assert self.check() == {object_id(number) for number in range(len(urls))}
        survivor.delete(urls)


@pytest.fixture(scope="module")
def _bounded() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture
def namespace(_bounded: Server, limit: tuple[dict[str, Any], int]) -> Iterator[Namespace]:
    params, maxmemory = limit
    with proxy_to(_bounded.port) as proxy:
        namespace = Namespace(_bounded, _bounded.url, proxy, maxmemory, params)
        namespace.make_room()
        yield namespace
        for store in namespace.stores:
            store.close()
        namespace.make_room()
        _bounded.flush()


def spill(store: Store, sizes: Sequence[int]) -> tuple[list[str], SpillError | None]:
    return store.put([source(noise(size, number), number) for number, size in enumerate(sizes)])


def spilled(store: Store, sizes: Sequence[int]) -> list[str]:
    urls, failure = spill(store, sizes)
    assert failure is None
    assert len(urls) == len(sizes)
    return urls


def steady(namespace: Namespace, sizes: Sequence[int]) -> Store:
    """A store over the proxy that has a connection, and the grant for another such batch."""
    store = namespace.store()
    for _ in range(2):
        store.delete(spilled(store, sizes))
    return store


def every_command(proxy: Proxy, within: int = 0) -> Iterator[Hold]:
    """A hold for each command of what is done with each in turn, until there are no more."""
    for number in itertools.count(1):
        hold = proxy.hold(number=number, within=within)
        yield hold
        if not hold.is_reached:
            proxy.disarm()
            assert number > 1, "there were no commands"
            return


# --- what is cut ---


@batches
@limits
@pytest.mark.parametrize("within", [0, 9], ids=["before", "within"])
def test_a_connection_cut_at_any_command_of_a_spill_costs_nothing(
    namespace: Namespace, sizes: list[int], within: int
) -> None:
    store = steady(namespace, sizes)
    for command in every_command(namespace.proxy, within):
        command.cut()
        namespace.check_outcome(spilled(store, sizes), sizes)


@batches
@limits
def test_a_connection_cut_at_any_reply_to_a_spill_costs_nothing(
    namespace: Namespace, sizes: list[int]
) -> None:
    store = steady(namespace, sizes)
    way = namespace.proxy.to_client
    for size in itertools.count(1, 3):
        way.reset_after = size
        urls = spilled(store, sizes)
        is_over = way.reset_after is not None or size > 100
        way.reset_after = None
        namespace.check_outcome(urls, sizes)
        if is_over:
            assert size > 20
            return


@batches
@pytest.mark.parametrize("limit", [LIMITS["no limit"]])
def test_a_connection_cut_anywhere_in_a_restore_costs_nothing(
    namespace: Namespace, sizes: list[int]
) -> None:
    store = steady(namespace, sizes)
    urls = spilled(store, sizes)

    def restore() -> None:
        for number, url in enumerate(urls):
            assert get(store, url, number) == noise(sizes[number], number)

    for within in (0, 9):
        for command in every_command(namespace.proxy, within):
            command.cut()
            restore()
    way, before = namespace.proxy.to_client, namespace.proxy.to_client.bytes
    restore()
    replies = way.bytes - before
    for size in range(0, replies, max(1, replies // 40)):
        way.reset_after = size
        restore()
        assert way.reset_after is None
    store.delete(urls)


@batches
@pytest.mark.parametrize("limit", [LIMITS["no limit"], LIMITS["max_bytes"]])
def test_a_connection_cut_at_any_command_of_a_delete_costs_nothing(
    namespace: Namespace, sizes: list[int]
) -> None:
    store = steady(namespace, sizes)
    urls = spilled(store, sizes)
    for command in every_command(namespace.proxy):
        command.cut()
        store.delete(urls)
        assert namespace.check() == set()
        namespace.proxy.disarm()
        urls = spilled(store, sizes)


@batches
@pytest.mark.parametrize("limit", [LIMITS["no limit"], LIMITS["max_bytes"]])
def test_a_connection_cut_at_any_reply_to_a_delete_costs_nothing(
    namespace: Namespace, sizes: list[int]
) -> None:
    store = steady(namespace, sizes)
    way = namespace.proxy.to_client
    for size in itertools.count(1):
        urls = spilled(store, sizes)
        way.reset_after = size
        store.delete(urls)
        is_over = way.reset_after is not None
        way.reset_after = None
        assert namespace.check() == set()
        if is_over:
            assert size > 5
            return


# --- what is refused ---


@batches
@limits
def test_a_server_that_is_full_from_any_command_on_keeps_what_was_reported(
    namespace: Namespace, sizes: list[int]
) -> None:
    store = steady(namespace, sizes)
    refused = 0
    for number in itertools.count(1):
        filled: list[None] = []

        def act() -> None:
            namespace.fill_up()
            filled.append(None)  # noqa: B023

        namespace.proxy.before(act, number=number)
        urls, failure = spill(store, sizes)
        namespace.proxy.disarm()
        namespace.make_room()
        assert failure is None or isinstance(failure, ServerFullError)
        refused += failure is not None
        # Nobody has to come and clean up after a failure that no connection broke by.
        assert namespace.check() == {object_id(number) for number in range(len(urls))}
        namespace.check_outcome(urls, sizes)
        if not filled:
            break
    assert refused > len(sizes)


# --- what is lost ---


@pytest.mark.parametrize("params", [{}, {"max_bytes": 100 * MIB}], ids=["no limit", "max_bytes"])
def test_a_server_that_restarts_empty_at_any_command_keeps_what_is_reported_afterwards(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    sizes = [100, 2 * CHUNK]
    with contextlib.closing(Rig(tmp_path / "data")) as rig:
        for number in itertools.count(1):
            port = rig.client.connection_pool.connection_kwargs["port"]
            namespace = Namespace(rig, f"valkey://127.0.0.1:{port}/0", rig.proxy, 0, params)
            store = steady(namespace, sizes)
            restarted: list[None] = []

            def act() -> None:
                rig.restart_empty()
                restarted.append(None)  # noqa: B023

            rig.proxy.before(act, number=number)
            urls, _ = spill(store, sizes)
            rig.proxy.disarm()
            port = rig.client.connection_pool.connection_kwargs["port"]
            namespace.url = f"valkey://127.0.0.1:{port}/0"
            namespace.check_outcome(urls, sizes)
            namespace.check_outcome(spilled(store, sizes), sizes)
            store.destroy(is_alive=lambda pid: False)
            for each in namespace.stores:
                each.close()
            assert rig.our_keys() == []
            if not restarted:
                break
        assert number > 5


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
def test_a_failover_at_any_command_keeps_what_is_reported(tmp_path: Path, is_late: bool) -> None:
    """To a replica that has carried out all commands before.

    If it comes late, the primary has carried out that command too, and those that came with it;
    its replies are not heard.
    """
    sizes = [100, 2 * CHUNK]
    for number in itertools.count(1):
        with contextlib.ExitStack() as stack:
            rig = stack.enter_context(contextlib.closing(Rig(tmp_path / f"{number}")))
            replica, replication = stack.enter_context(rig.replica())
            params = {"max_bytes": 100 * MIB}
            namespace = Namespace(rig, rig.node.url, rig.proxy, 0, params)
            store = steady(namespace, sizes)
            over: list[None] = []

            def fail_over(
                rig: Rig = rig, replica: Node = replica, replication: Proxy = replication
            ) -> bool:
                rig.client.ping()  # it has carried out what was passed on to it
                rig.catch_up(replica)
                replication.to_client.stall()
                replica.client.replicaof("NO", "ONE")
                rig.proxy.forward_to(replica.port)
                rig.proxy.to_client.reset_after = 0 if is_late else None
                over.append(None)  # noqa: B023
                return is_late  # else the connection is cut

            rig.proxy.before(fail_over, number=number)
            urls, _ = spill(store, sizes)
            rig.proxy.disarm()
            if over:
                server = Server(replica.url, replica.port, replica.client, replica.process)
                namespace.server, namespace.url = server, server.url
            namespace.check_outcome(urls, sizes)
            namespace.check_outcome(spilled(store, sizes), sizes)
            store.destroy(is_alive=lambda pid: False)
            assert namespace.server.our_keys() == []
            for each in namespace.stores:
                each.close()
        if not over:
            break
    assert number > 5


# --- who is killed ---


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1000], [100, 2 * CHUNK, 0]])
@pytest.mark.parametrize("limit", [LIMITS["no limit"], LIMITS["both"]])
@pytest.mark.parametrize("is_late", [False, True], ids=["lost", "late"])
def test_a_writer_killed_at_any_command_leaves_nothing(
    namespace: Namespace, sizes: list[int], is_late: bool
) -> None:
    """Whether what it had sent is lost with it, or reaches the server later."""
    survivor = namespace.store(namespace.url)
    for number in itertools.count(1):
        survivor.delete(spilled(survivor, sizes))
        survivor.recover(is_alive=lambda pid: True)
        survivor.give_back()
        clients = len(namespace.client.client_list())
        with namespace.writer() as writer:
            survivor.delete(writer.put(sizes).urls)
            hold = namespace.proxy.hold(number=number)
            writer.begin(sizes)
            wait_until(lambda: hold.is_reached or writer.has_ended)  # noqa: B023
            if not hold.is_reached:
                break
            assert survivor.recover(is_alive=lambda pid: True) == 0
        if is_late:
            hold.release()
        else:
            hold.cut()
        wait_until(lambda: len(namespace.client.client_list()) <= clients)  # noqa: B023
        survivor.recover(is_alive=lambda pid: False)
        # Where it had settled, and could not say so, these are objects of the node as any other.
        left = namespace.check()
        assert left in (set(), {object_id(i) for i in range(len(sizes))})
        assert namespace.client.exists(survivor.keys.writers) == 0
        assert survivor.destroy(is_alive=lambda pid: False) == len(left)
        assert namespace.server.our_keys() == []
    assert number > 3


@pytest.mark.parametrize("limit", [LIMITS["no limit"]])
def test_an_object_of_which_the_server_took_no_value_is_not_settled(namespace: Namespace) -> None:
    """By what its writer had sent before it heard of that, and was killed."""
    survivor = namespace.store(namespace.url)
    with namespace.writer() as writer:
        survivor.delete(writer.put([1000]).urls)
        # More than the proxy has at once, so that it does not have the settlement by then.
        storing = namespace.proxy.hold(b"SET")
        writer.begin([10 * CHUNK])
        storing.wait()
        wait_until(lambda: namespace.check_pending() == 1)
        namespace.fill_up()
        settling = namespace.proxy.hold(b"EVAL")
        storing.release()
        settling.wait()
    namespace.make_room()
    settling.release()
    wait_until(lambda: namespace.proxy.open_connections == 0)
    assert namespace.check_pending() == 1
    assert survivor.recover(is_alive=lambda pid: False) == 1
    assert namespace.check() == set()


# --- what it costs ---


@dataclass(frozen=True)
class Cost:
    """How often clients spoke after a server had, and the commands that they sent, by name."""

    exchanges: int
    commands: Counter[bytes]


def cost_of(proxies: Sequence[Proxy], act: Callable[[], object]) -> Cost:
    """What `act` costs; of several servers, how often it had to wait for one of them, at most.

    Looks at the server's memory are left out: they follow the clock, and nobody waits for them.
    """
    before = [(proxy.round_trips, len(proxy.commands)) for proxy in proxies]
    act()
    commands: Counter[bytes] = Counter()
    for proxy, (_, count) in zip(proxies, before):
        commands.update(proxy.commands[count:])
    del commands[b"INFO"]
    exchanges = max(p.round_trips - count for p, (count, _) in zip(proxies, before))
    return Cost(exchanges, commands)


def counted(**commands: int) -> Counter[bytes]:
    return Counter({name.upper().encode(): count for name, count in commands.items()})


@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize(("count", "chunks"), [(1, 0), (1, 2), (1, 20), (10, 0), (10, 2)])
@limits
def test_an_operation_is_one_exchange_of_few_commands(
    namespace: Namespace, tmp_path: Path, is_sealed: bool, chunks: int, count: int
) -> None:
    if is_sealed:
        file = tmp_path / "keys"
        file.write_text(secrets.token_hex(32))
        namespace.params = {**namespace.params, "encryption_key_file": str(file)}
    # Little: what a proxy passes on in two pieces may be answered in two.
    namespace.params = {**namespace.params, "chunk_size": SMALL_CHUNK}
    sizes = [chunks * SMALL_CHUNK or 1000] * count
    store, proxies = steady(namespace, sizes), [namespace.proxy]
    values = count * (1 + chunks)
    urls: list[str] = []
    spilling = cost_of(proxies, lambda: urls.extend(spilled(store, sizes)))
    assert spilling == Cost(1, counted(eval=2, set=values))
    # No request waits for a reply, though the first ones are sent before the others are made.
    namespace.proxy.to_client.stall()
    namespace.proxy.before(namespace.proxy.to_client.flow, b"GET", number=1 + chunks)
    restoring = cost_of(proxies, lambda: get(store, urls[0]))
    assert restoring == Cost(1, counted(get=1 + chunks, eval=int(chunks > 0)) + Counter())
    deleting = cost_of(proxies, lambda: store.delete(urls))
    assert deleting == Cost(1, counted(unlink=values, eval=1))


# For each object: a tenth more than Python 3.11 makes, and some for bytes that come in pieces.
# On a machine that is busy with other tests they come in more of them, though not each time.
@pytest.mark.parametrize(
    ("count", "size", "most"),
    [
        (1, 128 * KIB, {"spill": 490, "restore": 190}),
        (1, MIB, {"spill": 800, "restore": 620}),
        (50, 128 * KIB, {"spill": 200, "restore": 152}),
    ],
)
def test_an_operation_takes_few_calls(
    server: Server, count: int, size: int, most: dict[str, int]
) -> None:
    """What an operation costs beside its bytes, whatever machine it runs on."""
    sources = [source(noise(size), number) for number in range(count)]
    target = memoryview(bytearray(size))
    urls: list[str] = []

    def spill() -> None:
        urls[:], _ = store.put(sources)

    def restore() -> None:
        wanted = [(url, object_id(number)) for number, url in enumerate(urls)]
        for found in store.find_all(wanted):
            assert isinstance(found, StoredObject)
            store.fill(found, target)

    with contextlib.closing(Store(Config.load({"url": server.url}, {}), SESSION, NODE)) as store:
        calls: dict[str, float] = {}
        for attempt in range(10):
            store.delete(urls)
            made = {act.__name__: calls_of(act) / count for act in (spill, restore)}
            if attempt:  # the first one opens connections, and learns the form of a header
                calls = {
                    name: min(number, calls.get(name, number)) for name, number in made.items()
                }
        store.destroy(lambda pid: False)
    assert {name: calls[name] for name in most if calls[name] > most[name]} == {}


def calls_of(act: Callable[[], object]) -> int:
    """How many functions `act` calls in this thread, Python's and C's."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(before)
    return calls


@limits
def test_a_writer_without_a_grant_asks_for_one_first(
    namespace: Namespace, limit: tuple[dict[str, Any], int]
) -> None:
    store = steady(namespace, [1000])
    store.give_back()
    urls: list[str] = []
    cost = cost_of([namespace.proxy], lambda: urls.extend(spilled(store, [1000])))
    is_limited = limit != LIMITS["no limit"]
    assert cost == Cost(1 + is_limited, counted(eval=2 + is_limited, set=1))
    store.delete(urls)


@pytest.mark.parametrize(
    ("limit", "policy", "pause", "exchanges"),
    [
        (LIMITS["maxmemory"], "noeviction", 5.0, 1),
        (LIMITS["maxmemory"], "volatile-lru", 0.1, 1),
        (LIMITS["maxmemory"], "volatile-lru", 2.0, 2),
        (LIMITS["both"], "volatile-lru", 5.0, 1),
        (LIMITS["no limit"], "noeviction", 5.0, 1),
        (LIMITS["no limit"], "noeviction", 11.0, 2),
    ],
)
def test_a_spill_looks_first_where_others_may_have_filled_the_room_in_a_pause(
    namespace: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    pause: float,
    exchanges: int,
) -> None:
    """And would lose keys to it, or where nobody knows of a limit yet."""
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    namespace.client.config_set("maxmemory-policy", policy)
    namespace.client.set("session:1", "", ex=3600)
    store = steady(namespace, [1000])
    clock.sleep(pause)
    urls: list[str] = []
    cost = cost_of([namespace.proxy], lambda: urls.extend(spilled(store, [1000])))
    asks = policy == "volatile-lru" and exchanges == 2
    assert cost == Cost(exchanges, counted(eval=2 + asks, set=1))
    store.delete(urls)
    namespace.client.config_set("maxmemory-policy", "noeviction")


@contextlib.contextmanager
def proxied_cluster(directory: Path) -> Iterator[tuple[Cluster, list[Proxy]]]:
    """A cluster whose nodes announce the ports of proxies."""
    with cluster_servers(directory, replicas=0) as cluster, contextlib.ExitStack() as stack:
        proxies = []
        for node in cluster.nodes:
            proxies.append(stack.enter_context(proxy_to(node.port)))
            bus = node.client.config_get("cluster-port")["cluster-port"]
            node.client.config_set("cluster-announce-bus-port", bus)
            node.client.config_set("cluster-announce-port", proxies[-1].port)
        ports = {proxy.port for proxy in proxies}
        wait_until(lambda: all(_announced(node) == ports for node in cluster.nodes))
        yield cluster, proxies


def _announced(node: Node) -> set[int]:
    return {int(primary[1]) for _, _, primary in node.client.execute_command("CLUSTER SLOTS")}


@pytest.mark.parametrize("params", [{}, {"max_bytes": 100 * MIB}], ids=["no limit", "max_bytes"])
def test_a_cluster_is_spoken_to_once_a_stage(tmp_path: Path, params: dict[str, Any]) -> None:
    with proxied_cluster(tmp_path) as (cluster, proxies):
        given = {"url": proxies[0].url.removesuffix("/0"), "chunk_size": SMALL_CHUNK, **params}
        with contextlib.closing(Store(Config.load(given, {}), SESSION, NODE)) as store:
            sizes = [10 * SMALL_CHUNK]
            for _ in range(2):
                store.delete(spilled(store, sizes))
            urls: list[str] = []
            spilling = cost_of(proxies, lambda: urls.extend(spilled(store, sizes)))
            assert spilling.commands == counted(eval=2, set=11)
            # What is registered, the values, and what is settled, which is on one of the shards.
            assert spilling.exchanges <= 3
            restoring = cost_of(proxies, lambda: get(store, urls[0]))
            assert restoring.commands == counted(get=11, strlen=10)
            assert restoring.exchanges == 1
            deleting = cost_of(proxies, lambda: store.delete(urls))
            assert deleting.commands == counted(unlink=11, eval=1)
            assert deleting.exchanges <= 2
            store.destroy(lambda pid: False)
        assert cluster.our_keys() == []
