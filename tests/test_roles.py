"""What a replica that lags, or a primary that is one no more, does not have is not lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from support.clock import Clock
from support.clusters import MIB, failures, local_ray, spill
from support.proxy import Proxy, proxy_to
from support.samples import get, noise, object_id, source
from support.servers import INDEX, ROOT, Node, Server, acl_user, valkey_server, wait_until
from support.stores import Store
from support.topologies import cluster_servers, one_sentinel
from support.writer import Writer

from ray_valkey_spill.cli.inspection import Inspector, Target
from ray_valkey_spill.cli.inventory import Inventory
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError, ServerUnavailableError
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.cleanup import RENEWAL, CleanUp
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import link_to

below_ray = pytest.mark.usefixtures("no_thread_left")

CHUNK = 64 << 10
INLINE, CHUNKED = noise(5000), noise(5 * CHUNK)
SESSION, NODE = "session_1", "ab" * 28
KEY = f"{ROOT}test"
NOWHERE = ("127.0.0.1", 1)


def config(url: str, **params: Any) -> Config:
    password = params.pop("password", None)
    environ = {"RAY_VALKEY_SPILL_PASSWORD": password} if password else {}
    given = {"url": url, "retry_timeout": 100, "chunk_size": CHUNK, **params}
    return Config.load(given, environ)


@contextlib.contextmanager
def stored_at(url: str, **params: Any) -> Iterator[Store]:
    with contextlib.closing(Store(config(url, **params), SESSION, NODE)) as store:
        yield store


def put(store: Store, data: bytes) -> str:
    (url,), failure = store.put([source(data)])
    assert failure is None
    return url


@contextlib.contextmanager
def in_background(run: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run, *args)


def expect_waiting(store: Store, work: Future[Any]) -> None:
    """`work` tries again and again over `store`."""
    before = store.breaks
    wait_until(lambda: work.done() or store.breaks > before + 2)
    assert not work.done()


@dataclass(frozen=True)
class Pair:
    """A primary and its replica, and a name that leads to either.

    Attributes:
        name: what clients connect to.
        replication: what the replica follows the primary over.
    """

    primary: Server
    replica: Server
    name: Proxy
    replication: Proxy

    def lead_to(self, server: Server) -> None:
        self.name.forward_to(server.port)
        self.name.reset()

    def lag(self) -> None:
        """Let the replica have all there is, and nothing that comes."""
        wait_until(lambda: _offset(self.primary) == _offset(self.replica))
        self.replication.to_client.stall()

    def demote(self) -> None:
        """Make a primary of the replica and a replica, that lags, of the primary.

        All connections to it stay as they are.
        """
        self.replica.client.replicaof("NO", "ONE")
        self.primary.client.replicaof(*NOWHERE)


def _offset(server: Server) -> int:
    """How much of the replication stream it has."""
    return int(server.client.info("replication")["master_repl_offset"])


@pytest.fixture
def pair() -> Iterator[Pair]:
    with (
        valkey_server(repl_diskless_sync_delay=0) as primary,
        valkey_server() as replica,
        proxy_to(primary.port) as name,
        proxy_to(primary.port) as replication,
    ):
        replica.client.replicaof("127.0.0.1", replication.port)
        primary.client.set("first", "x")
        wait_until(lambda: replica.client.get("first"))
        yield Pair(primary, replica, name, replication)


# --- a name that leads to a replica for a while ---


@below_ray
@pytest.mark.parametrize("data", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_an_object_that_a_replica_lacks_is_waited_for(pair: Pair, data: bytes) -> None:
    with stored_at(pair.name.url) as store:
        pair.lag()
        url = put(store, data)
        pair.lead_to(pair.replica)
        with in_background(get, store, url) as getting:
            expect_waiting(store, getting)
            pair.lead_to(pair.primary)
            assert getting.result() == data


@below_ray
def test_a_replica_is_named_once_patience_is_over(pair: Pair) -> None:
    with stored_at(pair.name.url, retry_timeout=0.5) as store:
        url = put(store, INLINE)
        pair.lead_to(pair.replica)
        with pytest.raises(ServerUnavailableError, match=rf"{pair.name.port} is a replica"):
            get(store, url)
        _, failure = store.put([source(INLINE)])
        assert isinstance(failure, ServerUnavailableError)
        pair.lead_to(pair.primary)
        assert get(store, url) == INLINE


@below_ray
def test_chunks_that_a_replica_lacks_are_waited_for(pair: Pair) -> None:
    """Also where the header was read from the primary, and other chunks too."""
    with stored_at(pair.name.url) as store:
        pair.lag()
        found = store.find(put(store, CHUNKED), object_id(0))
        store.leave(found)  # the first chunks are on their way already
        first = next(pair.primary.client.scan_iter(f"{ROOT}*:0"))
        pair.demote()
        pair.replica.client.set(first, pair.primary.client.get(first))
        pair.lead_to(pair.replica)
        pair.replica.client.replicaof(*NOWHERE)
        target = bytearray(len(CHUNKED))
        with in_background(store.fill, found, memoryview(target)) as filling:
            expect_waiting(store, filling)
            pair.primary.client.replicaof("NO", "ONE")
            pair.lead_to(pair.primary)
            filling.result()
        assert target == CHUNKED


@below_ray
@pytest.mark.parametrize("data", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_a_primary_that_is_demoted_with_its_connections_kept_is_not_believed(
    pair: Pair, data: bytes
) -> None:
    with stored_at(pair.name.url) as reader, stored_at(pair.replica.url) as writer:
        put(reader, INLINE)
        pair.lag()
        pair.demote()
        url = put(writer, data)
        with in_background(get, reader, url) as getting:
            expect_waiting(reader, getting)
            pair.lead_to(pair.replica)
            assert getting.result() == data


@below_ray
def test_chunks_that_a_demoted_primary_lacks_are_waited_for(pair: Pair) -> None:
    with stored_at(pair.name.url) as reader, stored_at(pair.replica.url) as writer:
        put(reader, INLINE)
        pair.lag()
        pair.demote()
        found = writer.find(put(writer, CHUNKED), object_id(0))
        target = bytearray(len(CHUNKED))
        with in_background(reader.fill, found, memoryview(target)) as filling:
            expect_waiting(reader, filling)
            pair.lead_to(pair.replica)
            filling.result()
        assert target == CHUNKED


@below_ray
def test_a_role_that_changes_during_a_look_makes_it_looked_again(pair: Pair) -> None:
    looks = []

    def look() -> list[Any]:
        found = link.execute(command("GET", KEY))
        looks.append(found)
        if len(looks) == 1:
            pair.primary.client.replicaof(*NOWHERE)
        elif len(looks) == 2:
            pair.lead_to(pair.primary)  # cuts what was just read over
            link.execute(command("GET", KEY))
        return found

    with contextlib.closing(link_to(config(pair.name.url))) as link:
        with in_background(link.confirmed, look) as looking:
            wait_until(lambda: link.breaks > 2)
            assert len(looks) == 1
            pair.primary.client.replicaof("NO", "ONE")
            assert looking.result() == [None]
        assert len(looks) == 3


@below_ray
@pytest.mark.parametrize("data", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_what_a_primary_lacks_is_lost_at_once(pair: Pair, data: bytes) -> None:
    with stored_at(pair.name.url, retry_timeout=0) as store:
        urls = [put(store, data), put(store, data)]
        found = store.find(urls[0], object_id(0))
        pair.primary.flush()
        for url in urls:
            with pytest.raises(LostObjectError):
                store.find(url, object_id(0))
        if data is CHUNKED:
            with pytest.raises(LostObjectError):
                store.fill(found, memoryview(bytearray(len(data))))


# --- proxies that do not know HELLO ---


HELLO, INFO, ROLE = (
    (b"\r\nHELLO\r\n", b"\r\nHELL_\r\n"),
    (b"*1\r\n$4\r\nINFO\r\n", b"*1\r\n$4\r\nINF_\r\n"),
    (b"\r\nROLE\r\n", b"\r\nROL_\r\n"),
)


@below_ray
@pytest.mark.parametrize("unknown", [[HELLO], [HELLO, INFO]], ids=["HELLO", "HELLO and INFO"])
def test_a_replica_behind_a_proxy_that_knows_no_hello_is_recognised(
    pair: Pair, unknown: list[tuple[bytes, bytes]]
) -> None:
    pair.name.to_server.replaced = dict(unknown)
    with stored_at(pair.name.url) as store:
        pair.lag()
        url = put(store, INLINE)
        pair.lead_to(pair.replica)
        with in_background(get, store, url) as getting:
            expect_waiting(store, getting)
            pair.lead_to(pair.primary)
            assert getting.result() == INLINE
        pair.primary.flush()
        with pytest.raises(LostObjectError):
            store.find(url, object_id(0))


@below_ray
def test_nothing_is_lost_where_nobody_says_what_the_server_is(pair: Pair) -> None:
    pair.name.to_server.replaced = dict([HELLO, INFO, ROLE])
    with stored_at(pair.name.url, retry_timeout=0.5) as store:
        url = put(store, CHUNKED)
        assert get(store, url) == CHUNKED
        pair.primary.flush()
        with pytest.raises(ServerUnavailableError, match="answer HELLO, INFO or ROLE"):
            store.find(url, object_id(0))
        pair.name.to_server.replaced = {}
        with pytest.raises(LostObjectError):
            store.find(url, object_id(0))


@below_ray
def test_the_role_costs_an_exchange_only_where_hello_is_unknown(pair: Pair) -> None:
    def round_trips() -> int:
        before = pair.name.round_trips
        with contextlib.closing(link_to(config(pair.name.url))) as link:
            link.execute(command("GET", KEY))
        return pair.name.round_trips - before

    known = round_trips()
    pair.name.to_server.replaced = dict([HELLO])
    assert round_trips() == known + 1


@below_ray
def test_a_user_needs_no_permission_more(pair: Pair) -> None:
    pair.name.to_server.replaced = dict([HELLO])
    params = {"username": "ray", "password": "secret"}
    with acl_user([pair.primary.client], preflight.acl_rules(config(pair.name.url))):
        with stored_at(pair.name.url, **params) as store:
            url = put(store, CHUNKED)
            pair.primary.client.delete(pair.primary.header_of(object_id(0)))
            with pytest.raises(LostObjectError):
                store.find(url, object_id(0))
        assert pair.primary.client.acl_log() == []


# --- what is concluded of the dead ---


def half_write(server: Server, store: Store, url: str) -> None:
    """Make the metadata of `server` what they were before the object was settled."""
    name = store.keys.parse_url(url).name
    (entry,) = server.client.zrangebylex(INDEX, f"[{name}.", f"({name}/")
    server.client.zrem(INDEX, entry)
    server.client.zadd(store.keys.pending, {str(name): 0})


@below_ray
def test_what_a_replica_calls_half_written_is_not_removed(pair: Pair) -> None:
    pair.replica.client.config_set("replica-read-only", "no")
    params = {"url": pair.name.url, "retry_timeout": 100, "chunk_size": CHUNK}
    with stored_at(pair.name.url) as store:
        # What earlier tests in this process have left in doubt counts too.
        store.recover(lambda pid: True)
        # Another process's: of its own this one knows that they are whole.
        with Writer(params, SESSION, NODE) as writer:
            (url,) = writer.put([len(CHUNKED)]).urls
        pair.lag()
        half_write(pair.replica, store, url)
        pair.lead_to(pair.replica)
        with pytest.raises(ServerUnavailableError, match="is a replica"):
            store.recover(lambda pid: False)
        pair.lead_to(pair.primary)
        assert store.recover(lambda pid: False) == 0
        assert get(store, url) == CHUNKED


@below_ray
def test_what_is_half_written_on_one_server_is_not_removed_from_another(pair: Pair) -> None:
    """Nobody can tell an old primary, that was never demoted, from its reply to one command."""
    params = {"url": pair.name.url, "retry_timeout": 100, "chunk_size": CHUNK}
    with stored_at(pair.name.url) as store:
        # Another process's: whether one of ours is under way, nobody has to be asked.
        with Writer(params, SESSION, NODE) as writer:
            (url,) = writer.put([len(CHUNKED)]).urls
        pair.lag()
        pair.replica.client.replicaof("NO", "ONE")
        half_write(pair.replica, store, url)
        pair.lead_to(pair.replica)
        asked = []

        def is_alive(pid: int) -> bool:
            asked.append(pid)
            if len(asked) == 2:
                pair.lead_to(pair.primary)
            return False

        assert store.recover(is_alive) == 0
        assert len(asked) == 2
        assert get(store, url) == CHUNKED


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cleanup, "time", clock)
    return clock


def renew(server: Server) -> None:
    """Renew the node's lease, ten seconds after the last time by the server's clock."""
    leases = Keyspace(ROOT).leases
    server.client.zincrby(leases, RENEWAL * 1000, f"{SESSION}:{NODE}:10.0.0.1:6379")


@contextlib.contextmanager
def looking(pair: Pair) -> Iterator[CleanUp]:
    """A node that has a lease, and a look for the dead to which no GCS says that it lives."""
    with (
        stored_at(pair.name.url) as store,
        contextlib.closing(
            CleanUp(config(pair.name.url, retry_timeout=0.5), lambda address: None)
        ) as look,
    ):
        put(store, INLINE)
        store.renew_lease("10.0.0.1:6379", lambda: False)
        yield look


@below_ray
def test_a_lease_that_is_renewed_elsewhere_has_not_run_out(pair: Pair, clock: Clock) -> None:
    with looking(pair) as look:
        pair.lag()
        clock.every(RENEWAL, lambda: renew(pair.primary))
        pair.lead_to(pair.replica)
        with pytest.raises(ServerUnavailableError, match="is a replica"):
            look.find()
        pair.lead_to(pair.primary)
        assert look.find() == []


@below_ray
def test_a_lease_is_not_watched_on_a_primary_that_is_demoted_meanwhile(
    pair: Pair, clock: Clock
) -> None:
    with looking(pair) as look:
        clock.at(5, pair.demote)
        clock.every(RENEWAL, lambda: renew(pair.replica))
        with pytest.raises(ServerUnavailableError, match="is a replica"):
            look.find()
        pair.lead_to(pair.replica)
        assert look.find() == []


@below_ray
def test_to_inspect_and_to_count_is_to_ask_a_primary(pair: Pair) -> None:
    wanted = config(pair.name.url, retry_timeout=0.5)
    with (
        stored_at(pair.name.url) as store,
        contextlib.closing(Inspector(wanted)) as inspector,
        contextlib.closing(Inventory(wanted)) as inventory,
    ):
        pair.lag()
        put(store, INLINE)
        target = Target(object_id(0))
        assert not inspector.inspect(target)[0].problems
        (node,) = inventory.statistics().nodes
        assert node.valkey.objects == 1
        pair.demote()
        for look in (lambda: inspector.inspect(target), inventory.statistics):
            with pytest.raises(ServerUnavailableError, match="is a replica"):
                look()
        pair.primary.client.replicaof("NO", "ONE")
        assert not inspector.inspect(target)[0].problems


# --- primaries that are cut off from the others ---


@contextlib.contextmanager
def paused(nodes: list[Node]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for node in nodes:
            stack.enter_context(node.paused())
        yield


@dataclass(frozen=True)
class Divided:
    """An old primary, the one that follows it, and Sentinels: the first has not heard of that."""

    old: Server
    new: Server
    sentinels: list[Node]

    @property
    def params(self) -> dict[str, str]:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.sentinels)
        return {"url": f"valkey://{hosts}/0", "sentinel_service": "spill"}


@pytest.fixture
def divided(tmp_path: Path) -> Iterator[Divided]:
    # Two servers that have never met: else the first Sentinel would hear of the other two.
    with contextlib.ExitStack() as stack:
        old, new = (stack.enter_context(valkey_server()) for _ in range(2))
        sentinels = [
            stack.enter_context(one_sentinel(tmp_path / str(number), server.port))
            for number, server in enumerate((old, new, new))
        ]
        yield Divided(old, new, sentinels)


@below_ray
def test_an_old_primary_beside_a_minority_of_sentinels_is_not_believed(divided: Divided) -> None:
    with stored_at(divided.new.url) as writer, paused(divided.sentinels[1:]):
        url = put(writer, CHUNKED)
        with stored_at(**divided.params) as reader, in_background(get, reader, url) as getting:
            expect_waiting(reader, getting)
            for node in divided.sentinels[1:]:
                _continue(node)
            assert getting.result() == CHUNKED


@below_ray
def test_while_sentinels_name_two_primaries_nothing_is_lost(divided: Divided) -> None:
    with stored_at(**divided.params, retry_timeout=1) as store:
        url = put(store, INLINE)
        for server in (divided.old, divided.new):
            server.flush()
        with pytest.raises(ServerUnavailableError, match="of 3 Sentinels"):
            store.find(url, object_id(0))
        divided.old.client.replicaof(*NOWHERE)
        with pytest.raises(LostObjectError):
            store.find(url, object_id(0))


def _continue(node: Node) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGCONT)


@below_ray
@pytest.mark.slow
def test_an_old_primary_that_is_cut_off_from_its_cluster_is_not_believed(tmp_path: Path) -> None:
    with cluster_servers(tmp_path, cluster_allow_reads_when_down=True) as cluster:
        old = next(n for n in cluster.primaries() if n is not cluster.primary_of(INDEX))
        (new,) = cluster.replicas_of(old)
        others = [node for node in cluster.nodes if node is not old]
        with stored_at(cluster.url) as writer:
            old.kill()
            wait_until(lambda: new.client.info("replication")["role"] == "master")
            url = _put_at(writer, new)
            # It starts as what it was: nobody tells it that it was followed.
            with paused(others):
                cluster.restart(old)
                with stored_at(old.url) as reader, in_background(get, reader, url) as getting:
                    wait_until(lambda: getting.done() or reader.breaks > 0)
                    assert not getting.done()
                    for node in others:
                        _continue(node)
                    assert getting.result() == INLINE
            cluster.wait_until_whole()
            writer.destroy(lambda pid: False)


def _put_at(store: Store, node: Node) -> str:
    """The URL of an object whose only key `node` has."""
    while True:
        url = put(store, INLINE)
        if node.client.keys(_header(store, url)):
            return url


def _header(store: Store, url: str) -> str:
    return store.keys.header(store.keys.parse_url(url).name)


@below_ray
@pytest.mark.slow
def test_what_a_whole_cluster_lacks_is_lost_also_while_a_minority_is_away(tmp_path: Path) -> None:
    with cluster_servers(tmp_path, replicas=0, cluster_require_full_coverage=False) as cluster:
        away = next(n for n in cluster.primaries() if n is not cluster.primary_of(INDEX))
        there = next(n for n in cluster.primaries() if n is not away)
        # By a name that the cluster does not know.
        with stored_at(f"valkey://localhost:{there.port}", retry_timeout=5) as store:
            url = _put_at(store, there)
            assert cluster.client.delete(_header(store, url))
            with pytest.raises(LostObjectError):
                store.find(url, object_id(0))
            assert store.breaks == 0
            cluster.kill(away)
            with pytest.raises(LostObjectError):
                store.find(url, object_id(0))


# --- in Ray ---


def test_ray_get_waits_while_the_name_leads_to_a_replica_that_lags(pair: Pair) -> None:
    def value() -> np.ndarray:
        return np.random.default_rng(1).integers(0, 256, 8 * MIB, np.uint8)

    with local_ray(pair.name.url, retry_timeout=1):
        pair.lag()
        ref = ray.put(value())
        spill([ref], pair.primary)
        # So that nothing but the restore fails again and again from now on.
        wanted = {ref.hex()}
        wait_until(lambda: pair.primary.spilled_ids() == wanted)
        pair.lead_to(pair.replica)
        with in_background(ray.get, ref) as getting:
            wait_until(lambda: getting.done() or failures() > 5)
            assert not getting.done()
            pair.lead_to(pair.primary)
            assert (getting.result() == value()).all()
        del ref
        pair.replication.flow()
