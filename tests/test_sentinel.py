"""Primaries that Sentinels watch, and replicas that a spill waits for."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from support.clusters import MIB, local_ray
from support.proxy import Proxy, proxy_to
from support.servers import (
    ROOT,
    Node,
    acl_user,
    dead_port,
    server_version,
    valkey_server,
    wait_until,
)
from support.stores import Store
from support.topologies import SentinelGroup, one_sentinel, sentinel_servers

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.packing import Packer, SourceObject
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.tiers.valkey import ValkeyTier

KEY = f"{ROOT}test"
INLINE, CHUNKED = b"x" * 5000, random.Random(0).randbytes(MIB)


@pytest.fixture(scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with sentinel_servers(tmp_path_factory.mktemp("servers"), replicas=2) as group:
        yield group


@pytest.fixture
def group(_group: SentinelGroup) -> Iterator[SentinelGroup]:
    """A primary with two replicas, all of which work, also afterwards. No key may be left."""
    _group.settle_foreign()
    yield _group
    for node in _group.nodes:
        if not node.alive:
            _group.restart(node)
    with hurried(_group):
        _group.wait_until_whole()
    assert _group.our_keys() == []


@contextlib.contextmanager
def hurried(group: SentinelGroup) -> Iterator[None]:
    """Have Sentinels see at once to what they else see to within some ten seconds."""
    pace(group, publish=100, info=100)
    yield
    pace(group, publish=2_000, info=10_000)


def pace(group: SentinelGroup, publish: int, info: int) -> None:
    for sentinel in group.sentinels:
        sentinel.client.execute_command(
            "SENTINEL DEBUG", "PUBLISH-PERIOD", publish, "INFO-PERIOD", info
        )


def config(url: str, **params: Any) -> Config:
    return Config.load(
        {
            "url": url,
            "sentinel_service": "spill",
            "retry_timeout": 5,
            "chunk_size": 10_000,
            **params,
        },
        {},
    )


class Stores:
    """Object stores of one node, what is left of which is removed in the end."""

    def __init__(self, group: SentinelGroup) -> None:
        self._group = group
        self._made: list[Store] = []

    def __call__(self, **params: Any) -> Store:
        wanted = {"retry_timeout": 30, **params}
        store = Store(config(self._group.url, **wanted), "session", "node")
        self._made.append(store)
        return store

    def close(self) -> None:
        self().destroy(is_alive=lambda process: False)
        for store in self._made:
            store.close()


@pytest.fixture
def stores(group: SentinelGroup, no_thread_left: None) -> Iterator[Stores]:
    with contextlib.closing(Stores(group)) as stores:
        yield stores


def source(data: bytes = CHUNKED) -> SourceObject:
    return SourceObject("ab" * 28, b"", b"", memoryview(data))


def put(store: Store, data: bytes = CHUNKED) -> str:
    """Put an object; its URL."""
    (url,), failure = store.put([source(data)])
    assert failure is None
    return url


def get(store: Store, url: str) -> bytes:
    found = store.find(url, "ab" * 28)
    target = bytearray(found.header.size)
    store.fill(found, memoryview(target))
    return bytes(target)


@contextlib.contextmanager
def in_background(run: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run, *args)


def striking(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, strike: Callable[[], object]
) -> None:
    """Have `strike` called once, in the middle of what the generator `name` yields."""
    method, struck = getattr(owner, name), in_the_middle(strike)
    monkeypatch.setattr(owner, name, lambda self, *args: struck(method(self, *args)))


def in_the_middle(strike: Callable[[], object]) -> Callable[[Iterator[Any]], Iterator[Any]]:
    strikes = [strike]

    def struck(items: Iterator[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 30 and strikes:
                strikes.pop()()
            yield item

    return struck


def ask_for_failover(group: SentinelGroup) -> None:
    group.failover()
    pace(group, publish=100, info=100)


def url_of(ports: Sequence[int]) -> str:
    return f"valkey://{','.join(f'127.0.0.1:{port}' for port in ports)}/0"


# --- who the primary is ---


def test_the_primary_is_found(group: SentinelGroup) -> None:
    with contextlib.closing(link_to(config(group.url))) as link:
        link.execute(command("SET", KEY, "x"))
        assert group.primary().client.get(KEY) == b"x"
        link.execute(command("UNLINK", KEY))
    assert preflight.run_all(config(group.url)).role == "master"


def test_sentinels_that_do_not_answer_are_passed_over(group: SentinelGroup) -> None:
    silent, *others = group.sentinels
    url = url_of([dead_port(), silent.port, *(sentinel.port for sentinel in others)])
    with silent.paused():
        assert preflight.run_all(config(url)).role == "master"


def test_sentinels_that_know_better_are_heard(group: SentinelGroup, tmp_path: Path) -> None:
    """Of the others one has never heard of the service, and one was cut off before a failover."""
    dead = dead_port()
    with (
        one_sentinel(tmp_path / "1", dead) as cut_off,
        one_sentinel(tmp_path / "2", dead, service="another") as ignorant,
    ):
        ports = [ignorant.port, cut_off.port, *(sentinel.port for sentinel in group.sentinels)]
        assert preflight.run_all(config(url_of(ports))).role == "master"


@pytest.mark.parametrize("state", ["dead", "silent"])
def test_where_no_sentinel_answers_the_head_start_names_them(
    group: SentinelGroup, state: str
) -> None:
    with contextlib.ExitStack() as stack:
        if state == "silent":
            for sentinel in group.sentinels:
                stack.enter_context(sentinel.paused())
            ports = [sentinel.port for sentinel in group.sentinels]
        else:
            held = [stack.enter_context(socket.socket()) for _ in range(3)]
            for one in held:
                one.bind(("127.0.0.1", 0))  # and no listen()
            ports = [one.getsockname()[1] for one in held]
        with pytest.raises(ServerUnavailableError) as caught:
            preflight.run_all(config(url_of(ports), retry_timeout=30))
    assert all(str(port) in str(caught.value) for port in ports)


def test_an_unknown_service_is_refused_at_once(group: SentinelGroup) -> None:
    with pytest.raises(ServerRefusedError, match=r"no service 'other'.*sentinel_service"):
        preflight.run_all(config(group.url, sentinel_service="other", retry_timeout=60))


def test_what_is_no_sentinel_is_refused_at_once(group: SentinelGroup) -> None:
    url = group.primary().url
    with pytest.raises(ServerRefusedError, match=rf"{group.primary().port} is not a Sentinel"):
        preflight.run_all(config(url, retry_timeout=60))


def test_sentinels_without_their_service_are_refused(group: SentinelGroup) -> None:
    with pytest.raises(ConfigError, match=r"is a Sentinel.*sentinel_service"):
        preflight.run_all(config(group.sentinels[0].url, sentinel_service=None))
    with pytest.raises(ConfigError, match=r"sentinel_service if they are Sentinels"):
        preflight.run_all(config(group.url, sentinel_service=None))


def test_a_replica_that_a_sentinel_names_is_waited_for_until_it_is_a_primary(
    tmp_path: Path,
) -> None:
    with valkey_server() as server, one_sentinel(tmp_path, server.port) as sentinel:
        server.client.replicaof("127.0.0.1", 1)
        wanted = config(sentinel.url, retry_timeout=0.5)
        with (
            contextlib.closing(link_to(wanted)) as link,
            pytest.raises(ServerUnavailableError, match=rf"{server.port} is a replica, though"),
        ):
            link.info()
        with (
            contextlib.closing(link_to(config(sentinel.url, retry_timeout=30))) as link,
            in_background(link.info) as info,
        ):
            wait_until(lambda: link.breaks > 1)
            server.client.replicaof("NO", "ONE")
            assert info.result().role == "master"


@pytest.mark.parametrize("options", [{}, {"requirepass": "secret"}], ids=["none", "the same"])
def test_sentinels_have_no_password_or_that_of_their_servers(
    tmp_path: Path, options: dict[str, str]
) -> None:
    with (
        valkey_server(password="secret") as server,
        one_sentinel(tmp_path, server.port, **options) as sentinel,
    ):
        params = {"url": sentinel.url, "sentinel_service": "spill"}
        assert (
            preflight.run_all(Config.load(params, {"RAY_VALKEY_SPILL_PASSWORD": "secret"})).role
            == "master"
        )


@pytest.mark.parametrize("password", ["secret", None])
def test_a_sentinel_with_another_password_is_named(tmp_path: Path, password: str | None) -> None:
    with (
        valkey_server(password=password) as server,
        one_sentinel(tmp_path, server.port, requirepass="another") as sentinel,
    ):
        environ = {"RAY_VALKEY_SPILL_PASSWORD": password} if password else {}
        params = {"url": sentinel.url, "sentinel_service": "spill"}
        with pytest.raises(ServerRefusedError, match=rf"Sentinel at .*{sentinel.port}") as caught:
            preflight.run_all(Config.load(params, environ))
    assert "password" in caught.value.hint
    assert "secret" not in str(caught.value)


# --- failovers ---


def test_a_primary_killed_while_idle_is_followed(group: SentinelGroup, stores: Stores) -> None:
    store = stores(min_replicas=1)
    data = [INLINE, CHUNKED] * 2
    urls = [put(store, each) for each in data[:2]]
    group.kill_primary()
    urls += [put(store, each) for each in data[2:]]
    assert [get(store, url) for url in urls] == data


def test_a_primary_killed_while_putting_loses_nothing_that_is_reported(
    group: SentinelGroup, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    striking(monkeypatch, Packer, "pack", group.kill_primary)
    url = put(stores(min_replicas=1))
    assert get(stores(), url) == CHUNKED
    # Nor is anything there that is not.
    stores().delete([url])
    assert group.spilled_keys() == []


def test_a_primary_killed_while_filling_is_followed(
    group: SentinelGroup, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(min_replicas=2)
    url = put(store)
    read, struck = ValkeyTier.read, in_the_middle(group.kill_primary)

    def struck_read(self: Any, place: Any, sizes: Any, use: Any) -> Any:
        return read(self, place, sizes, lambda receive: use(lambda wanted: struck(receive(wanted))))

    monkeypatch.setattr(ValkeyTier, "read", struck_read)
    assert get(store, url) == CHUNKED


def test_a_failover_that_was_asked_for_is_followed(
    group: SentinelGroup, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    striking(monkeypatch, Packer, "pack", lambda: ask_for_failover(group))
    url = put(stores(min_replicas=1))
    assert get(stores(), url) == CHUNKED


def test_a_primary_that_stood_still_is_not_relied_on_when_it_comes_back(
    group: SentinelGroup, stores: Stores
) -> None:
    """It takes writes, until a Sentinel has told it that it is none any more."""
    store = stores(min_replicas=1)
    put(store, INLINE)
    old = group.primary()
    with old.paused():
        group.wait_until_followed(old)
    had = old.client.dbsize()
    with in_background(put, store) as putting:
        wait_until(lambda: old.client.dbsize() > had)
        with hurried(group):
            url = putting.result()
    assert get(stores(), url) == CHUNKED


def test_a_primary_that_stood_still_does_not_make_objects_lost_when_it_comes_back(
    group: SentinelGroup, stores: Stores
) -> None:
    """It says that it has nothing of what was spilled meanwhile."""
    reader = stores()
    put(reader, INLINE)
    old = group.primary()
    with old.paused():
        group.wait_until_followed(old)
        urls = [put(stores(), data) for data in (INLINE, CHUNKED)]
    assert old.client.info("replication")["role"] == "master"
    assert [get(reader, url) for url in urls] == [INLINE, CHUNKED]


# --- replicas ---


def test_a_put_waits_for_as_many_replicas_as_wanted(group: SentinelGroup, stores: Stores) -> None:
    paused, _ = group.replicas()
    with paused.paused():
        urls, failure = stores(min_replicas=2, retry_timeout=1).put([source(), source(INLINE)])
        assert urls == []
        assert isinstance(failure, ServerUnavailableError)
        assert f"1 of 2 replicas of 127.0.0.1:{group.primary().port}" in str(failure)
        assert group.spilled_keys() == []
        assert get(stores(), put(stores(min_replicas=1))) == CHUNKED
    assert get(stores(), put(stores(min_replicas=2))) == CHUNKED


def test_a_put_that_waits_when_its_primary_is_followed_starts_again(
    group: SentinelGroup, stores: Stores
) -> None:
    paused, _ = group.replicas()
    with in_background(put, stores(min_replicas=2)) as putting:
        with paused.paused():
            wait_until(lambda: waits(group))
            ask_for_failover(group)
        url = putting.result()
    assert get(stores(), url) == CHUNKED


def waits(group: SentinelGroup) -> bool:
    """Whether a connection to the primary waits for replicas, or has done nothing since."""
    return any(client["cmd"] == "wait" for client in group.primary().client.client_list())


@pytest.mark.parametrize("data", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_a_connection_that_was_closed_for_being_idle_fails_no_put(
    group: SentinelGroup, stores: Stores, data: bytes
) -> None:
    store = stores(min_replicas=2)
    put(store, data)
    group.primary().client.config_set("timeout", 1)
    try:
        wait_until(lambda: not waits(group))
    finally:
        group.primary().client.config_set("timeout", 0)
    assert get(store, put(store, data)) == data


needs_waitaof = pytest.mark.skipif(
    server_version() < (7, 2), reason="the server that is tested has no WAITAOF"
)


@pytest.fixture
def append_only(group: SentinelGroup) -> Iterator[SentinelGroup]:
    """All its servers have append-only files."""
    for node in group.nodes:
        node.client.config_set("appendonly", "yes")
    wait_until(lambda: all(writes_its_file(node) for node in group.nodes))
    yield group
    for node in group.nodes:
        node.client.config_set("appendonly", "no")
        node.client.config_set("appendfsync", "everysec")


def writes_its_file(node: Node) -> bool:
    found = node.client.info("persistence")
    return not (found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"])


@needs_waitaof
def test_append_only_files_are_waited_for(append_only: SentinelGroup, stores: Stores) -> None:
    wanted = {"wait_aof": True, "min_replicas": 2}
    preflight.run_all(config(append_only.url, **wanted))
    store = stores(**wanted)
    url = put(store)
    assert get(store, url) == CHUNKED
    store.delete([url])
    without, _ = append_only.replicas()
    without.client.config_set("appendonly", "no")
    _, failure = stores(**wanted, retry_timeout=3).put([source()])
    assert f"1 of 2 replicas of 127.0.0.1:{append_only.primary().port}" in str(failure)
    append_only.primary().client.config_set("appendfsync", "no")
    _, failure = stores(wait_aof=True, retry_timeout=1).put([source()])
    assert f"append-only file of 127.0.0.1:{append_only.primary().port}" in str(failure)
    assert append_only.spilled_keys() == []


def test_the_head_start_refuses_to_wait_for_what_is_not_there(group: SentinelGroup) -> None:
    preflight.run_all(config(group.url, min_replicas=2))
    with pytest.raises(ConfigError, match=r"has 2 replicas, and min_replicas is 3"):
        preflight.run_all(config(group.url, min_replicas=3))
    with pytest.raises(ConfigError, match=r"append-only file.*wait_aof"):
        preflight.run_all(config(group.url, wait_aof=True))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("WAIT", {"min_replicas": 2}),
        pytest.param("WAITAOF", {"wait_aof": True}, marks=needs_waitaof),
    ],
)
def test_a_user_has_to_be_permitted_to_wait_and_nothing_else(
    append_only: SentinelGroup, name: str, params: dict[str, Any]
) -> None:
    given = {"url": append_only.url, "sentinel_service": "spill", "username": "ray", **params}
    wanted = Config.load(given, {"RAY_VALKEY_SPILL_PASSWORD": "secret"})
    rules = preflight.acl_rules(wanted)
    clients = [node.client for node in append_only.nodes]
    with acl_user(clients, rules):
        preflight.run_all(wanted)
        with contextlib.closing(Store(wanted, "session", "node")) as store:
            store.delete([put(store)])
            store.destroy(is_alive=lambda process: False)
    with (
        acl_user(clients, rules.replace(f" +{name.lower()}", "")),
        pytest.raises(ServerRefusedError, match=rf"'ray' run {name} on"),
    ):
        preflight.run_all(wanted)


# --- what replicas are waited for for ---


@contextlib.contextmanager
def lagging(group: SentinelGroup, *replicas: Node) -> Iterator[Proxy]:
    """Have `replicas` get nothing of what is written from now on."""
    with proxy_to(group.primary().port) as proxy:
        for replica in replicas:
            replica.client.replicaof("127.0.0.1", proxy.port)
        wait_until(lambda: all(follows(replica, proxy.port) for replica in replicas))
        proxy.to_client.stall()
        yield proxy


def follows(node: Node, port: int) -> bool:
    found = node.client.info("replication")
    return bool(found["master_port"] == port and found["master_link_status"] == "up")


@pytest.fixture
def favourite(group: SentinelGroup) -> Iterator[Node]:
    """A replica that Sentinels choose, whatever it has."""
    node, _ = group.replicas()
    prefer(group, node, 1)
    yield node
    prefer(group, node, 100)


def prefer(group: SentinelGroup, node: Node, priority: int) -> None:
    node.client.config_set("replica-priority", priority)
    with hurried(group):
        wait_until(lambda: all(is_known(node, priority, by) for by in group.sentinels))


def is_known(node: Node, priority: int, sentinel: Node) -> bool:
    known = sentinel.client.sentinel_slaves("spill")
    found = {replica["port"]: replica["slave-priority"] for replica in known}
    return found.get(node.port, priority) == priority


def lose_primary(group: SentinelGroup, proxy: Proxy) -> None:
    """With its machine, and so with all that was on its way to replicas."""
    old = group.kill_primary()
    proxy.refusing = True
    proxy.reset()
    group.wait_until_followed(old)


def test_without_replicas_waited_for_a_failover_loses_what_was_reported(
    group: SentinelGroup, stores: Stores
) -> None:
    store = stores()
    with lagging(group, *group.replicas()) as proxy:
        urls = [put(store, data) for data in (INLINE, CHUNKED)]
        assert [get(store, url) for url in urls] == [INLINE, CHUNKED]
        lose_primary(group, proxy)
    for url in urls:
        with pytest.raises(LostObjectError):
            get(store, url)


@pytest.mark.parametrize("data", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_with_a_replica_waited_for_it_loses_nothing_that_was_reported(
    group: SentinelGroup, stores: Stores, data: bytes
) -> None:
    with (
        lagging(group, *group.replicas()) as proxy,
        in_background(put, stores(min_replicas=1), data) as putting,
    ):
        wait_until(lambda: waits(group))
        assert not putting.done()
        lose_primary(group, proxy)
        url = putting.result()
    assert get(stores(), url) == data


def test_a_new_connection_does_not_count_for_what_went_over_the_one_before(
    group: SentinelGroup, stores: Stores
) -> None:
    """Over it a server says at once that replicas have all that was sent."""
    store = stores(min_replicas=1, retry_timeout=2)
    with lagging(group, *group.replicas()), in_background(store.put, [source()]) as putting:
        wait_until(lambda: waits(group))
        group.primary().client.client_kill_filter(_type="normal", skipme=True)
        urls, failure = putting.result()
        assert urls == []
        assert "only 0 of 1 replicas" in str(failure)


def test_a_replica_that_was_not_waited_for_may_be_the_one_that_follows(
    group: SentinelGroup, stores: Stores, favourite: Node
) -> None:
    store = stores(min_replicas=1)
    with lagging(group, favourite) as proxy:
        url = put(store)
        lose_primary(group, proxy)
    assert group.primary() is favourite
    with pytest.raises(LostObjectError):
        get(store, url)


# --- in Ray ---


@pytest.mark.slow
def test_a_job_under_memory_pressure_finishes_though_primaries_are_killed(
    group: SentinelGroup,
) -> None:
    def value(i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 256, 8 * MIB, np.uint8)

    @ray.remote
    def inverted(array: np.ndarray) -> np.ndarray:
        return ~array

    def bring_back(old: Node) -> None:
        group.wait_until_followed(old)
        group.restart(old)
        with hurried(group):
            group.wait_until_whole()

    # Nothing is lost only where all who may follow a primary have what was reported.
    with local_ray(group.url, io_workers=2, sentinel_service=group.service, min_replicas=2):
        refs = [ray.put(value(i)) for i in range(20)]
        assert group.spilled_ids()
        with in_background(bring_back, group.kill_primary()) as back:
            refs += [ray.put(value(i)) for i in range(20, 40)]
            back.result()
        results = [inverted.remote(ref) for ref in refs]
        with in_background(bring_back, group.kill_primary()) as back:
            for i, (ref, result) in enumerate(zip(refs, results)):
                assert (ray.get(ref) == value(i)).all()
                assert (ray.get(result) == ~value(i)).all()
            back.result()
        del refs, results, ref, result
        wait_until(lambda: group.spilled_keys() == [])
    group.assert_foreign_untouched()
