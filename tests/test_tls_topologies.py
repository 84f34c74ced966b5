"""A cluster, and a primary with Sentinels, whose servers speak TLS alone, also among themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.certificates import Certificates, make_certificates
from support.tls import tls_binary
from support.topologies import Cluster, SentinelGroup, cluster_servers, sentinel_servers

from ray_valkey_spill.cli import check
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ServerRefusedError
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.store.object_store import ObjectStore

pytestmark = [
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.skipif(tls_binary() is None, reason="no server here was built with TLS"),
]

CHUNK = 64 << 10
OBJECTS = {f"{i:056x}": np.random.default_rng(i).bytes(20 * CHUNK + i) for i in range(6)}

Servers = Cluster | SentinelGroup


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(
    scope="module", params=[cluster_servers, sentinel_servers], ids=["cluster", "sentinel"]
)
def servers(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    certificates: Certificates,
) -> Iterator[Servers]:
    directory = tmp_path_factory.mktemp("servers")
    with request.param(directory, certificates=certificates) as servers:
        yield servers


def params(servers: Servers, certificates: Certificates, **more: Any) -> dict[str, Any]:
    given = {"url": servers.url, "chunk_size": CHUNK, **certificates.params(), **more}
    if isinstance(servers, SentinelGroup):
        given["sentinel_service"] = servers.service
    return given


@contextlib.contextmanager
def opened(given: dict[str, Any]) -> Iterator[ObjectStore]:
    with contextlib.closing(ObjectStore(Config.load(given, {}), "session", "node")) as store:
        yield store


def put_all(store: ObjectStore) -> dict[str, str]:
    sources = [SourceObject(i, b"PYTHON", b"", memoryview(data)) for i, data in OBJECTS.items()]
    urls, failure = store.put(sources)
    assert failure is None, failure
    return dict(zip(OBJECTS, urls))


def assert_all_come_back(store: ObjectStore, urls: dict[str, str]) -> None:
    for object_id, url in urls.items():
        target = bytearray(len(OBJECTS[object_id]))
        store.fill(store.find(url, object_id), memoryview(target))
        assert target == OBJECTS[object_id]


def test_objects_are_put_found_and_removed(servers: Servers, certificates: Certificates) -> None:
    with opened(params(servers, certificates)) as store:
        urls = put_all(store)
        assert_all_come_back(store, urls)
        if isinstance(servers, Cluster):
            holders = [node for node in servers.primaries() if node.client.keys("ray:spill:*")]
            assert len(holders) == 3
        store.delete(urls.values())
    assert servers.our_keys() == []


def test_check_finds_nothing_wrong(servers: Servers, certificates: Certificates) -> None:
    findings = list(check.run(params(servers, certificates)))
    assert [f for f in findings if f.status == check.FAILED] == []
    details = {finding.subject: finding.detail for finding in findings}
    expected = "3 shards" if isinstance(servers, Cluster) else "as Sentinels say"
    assert expected in details["topology"]


def test_objects_survive_a_primary_that_is_killed(
    servers: Servers, certificates: Certificates
) -> None:
    with opened(params(servers, certificates, min_replicas=1)) as careful:
        urls = put_all(careful)
    with opened(params(servers, certificates)) as store:
        if isinstance(servers, Cluster):
            old = servers.primary_of(store.keys.index)
            servers.kill(old)
        else:
            old = servers.kill_primary()
        more = put_all(store)
        assert_all_come_back(store, urls)
        assert_all_come_back(store, more)
        servers.restart(old)
        servers.wait_until_whole()
        store.delete([*urls.values(), *more.values()])
    assert servers.our_keys() == []


def test_a_ca_that_did_not_sign_them_is_refused(
    servers: Servers, certificates: Certificates, tmp_path: Path
) -> None:
    stranger = make_certificates(tmp_path / "strangers")
    given = {**params(servers, certificates), "tls_ca_file": str(stranger.ca)}
    with opened(given) as store:
        source = SourceObject("ab" * 28, b"", b"", memoryview(b"data"))
        urls, failure = store.put([source])
    assert urls == []
    assert isinstance(failure, ServerRefusedError)
    assert "certificate" in str(failure)
    assert "tls_ca_file" in str(failure)
