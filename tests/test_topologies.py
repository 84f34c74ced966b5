"""The tests' own clusters, Sentinels and TLS servers do what the tests count on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import valkey
from support.proxy import proxy_to
from support.servers import Server, acl_user, wait_until
from support.tls import TLSServer, tls_binary, tls_front, tls_server
from support.topologies import Cluster, SentinelGroup, cluster_servers, sentinel_servers
from valkey.crc import key_slot

pytestmark = pytest.mark.usefixtures("no_thread_left")

KEYS = [b"{tag}:%d" % i for i in range(20)]
MIB = 1 << 20

Serve = Callable[..., AbstractContextManager[TLSServer]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_servers(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with sentinel_servers(tmp_path_factory.mktemp("group")) as group:
        yield group


def test_a_slot_half_way_answers_with_ask_for_what_has_gone(cluster: Cluster) -> None:
    cluster.flush()
    for key in KEYS:
        cluster.client.set(key, key)
    old = cluster.primary_of(KEYS[0])
    new = next(node for node in cluster.primaries() if node is not old)
    migration = cluster.migration(key_slot(KEYS[0]), new, step=5)
    assert [next(migration) for _ in range(3)] == [0, 5, 10]
    gone = [key for key in KEYS if not old.client.keys(key)]
    assert len(gone) == 10
    with pytest.raises(valkey.ResponseError, match=rf"ASK {key_slot(gone[0])} .*:{new.port}"):
        old.client.get(gone[0])
    assert list(migration) == [15, 20]
    with pytest.raises(valkey.ResponseError, match=rf"MOVED .*:{new.port}"):
        old.client.get(gone[0])
    assert cluster.primary_of(gone[0]) is new
    assert cluster.keys("{tag}:*") == sorted(KEYS)


@pytest.mark.slow
def test_a_killed_primary_of_a_cluster_is_followed_and_comes_back_as_a_replica(
    cluster: Cluster,
) -> None:
    cluster.wait_until_whole()
    cluster.settle_foreign()
    old = cluster.primary_of("emb:sha256:abc123")
    (replica,) = cluster.replicas_of(old)
    wait_until(lambda: old.client.wait(1, 1000))
    cluster.kill(old)
    assert cluster.primary_of("emb:sha256:abc123") is replica
    cluster.wait_until_whole()
    cluster.assert_foreign_untouched()
    cluster.restart(old)
    cluster.wait_until_whole()
    assert cluster.replicas_of(replica) == [old]
    cluster.failover(old)
    assert cluster.primary_of("emb:sha256:abc123") is old
    cluster.assert_foreign_untouched()


@pytest.mark.slow
def test_a_killed_primary_of_sentinels_is_followed_and_comes_back_as_a_replica(
    group: SentinelGroup,
) -> None:
    group.settle_foreign()
    (replica,) = group.replicas()
    wait_until(lambda: group.client.wait(1, 1000))
    old = group.kill_primary()
    group.wait_until_followed(old)
    assert group.primary() is replica
    group.restart(old)
    group.wait_until_whole()
    assert group.replicas() == [old]
    group.assert_foreign_untouched()


def test_a_paused_replica_acknowledges_nothing(group: SentinelGroup) -> None:
    group.wait_until_whole()
    primary, (replica,) = group.primary(), group.replicas()
    with replica.paused():
        primary.client.set("key", "value")
        assert primary.client.wait(1, 100) == 0
    wait_until(lambda: primary.client.wait(1, 1000))


@pytest.fixture(params=["front", *(["server"] if tls_binary() else [])])
def serve(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Serve:
    if request.param == "server":
        return functools.partial(tls_server, tmp_path)
    return functools.partial(tls_front, tmp_path, server.port)


def connect(tls: TLSServer, port: int | None = None, **options: object) -> valkey.Valkey:
    """As a careful client does that has no certificate."""
    return valkey.Valkey(
        port=port or tls.port,
        ssl=True,
        ssl_ca_certs=str(tls.certificates.ca),
        ssl_check_hostname=True,
        **options,
    )


def test_tls_carries_large_values_both_ways(serve: Serve) -> None:
    value = bytes(range(256)) * (MIB // 64)
    with serve() as tls, connect(tls) as client:
        client.set("key", value)
        assert client.get("key") == value


def test_tls_is_all_that_is_spoken(serve: Serve) -> None:
    with (
        serve() as tls,
        valkey.Valkey(port=tls.port, socket_timeout=10) as client,
        pytest.raises(valkey.ConnectionError),
    ):
        client.ping()


def test_tls_can_be_cut_in_the_middle(serve: Serve) -> None:
    with serve() as tls, proxy_to(tls.port) as proxy, connect(tls, proxy.port) as client:
        assert client.ping()
        proxy.to_client.reset_after = 10
        with pytest.raises((valkey.ConnectionError, OSError)):
            client.info()
        assert client.ping()


def test_tls_ends_for_both_sides(serve: Serve) -> None:
    def names() -> set[str]:
        return {client["name"] for client in tls.client.client_list()}

    with serve() as tls:
        with connect(tls) as client:
            client.client_setname("leaves")
            assert "leaves" in names()
        wait_until(lambda: "leaves" not in names())
        with connect(tls) as client:
            number = client.client_id()
            tls.client.client_kill_filter(_id=number)
            wait_until(lambda: is_new(client, number))


def is_new(client: valkey.Valkey, number: int) -> bool:
    with contextlib.suppress(valkey.ConnectionError):
        return client.client_id() != number
    return False


def test_tls_wants_a_certificate_where_one_is_required(serve: Serve) -> None:
    with serve(client_certificate_required=True) as tls:
        with connect(tls) as client, pytest.raises(valkey.ConnectionError):
            client.ping()
        pair = tls.certificates.client
        with connect(tls, ssl_certfile=pair.certificate, ssl_keyfile=pair.key) as client:
            assert client.ping()


def test_tls_is_not_trusted_under_another_name(serve: Serve) -> None:
    with serve(names=["elsewhere.example"]) as tls:
        with connect(tls) as client, pytest.raises(valkey.ConnectionError, match="mismatch"):
            client.ping()
        assert tls.client.ping()


def test_a_user_may_do_what_its_rules_allow(server: Server) -> None:
    with (
        acl_user([server.client], "~ours:* +get"),
        valkey.Valkey(port=server.port, username="ray", password="secret") as client,
    ):
        assert client.get("ours:key") is None
        with pytest.raises(valkey.exceptions.NoPermissionError):
            client.get("theirs")
    assert "ray" not in server.client.acl_users()
