"""The object store, the same suite on every kind of server, and where it can be in the overflow.

A kind of server is a context manager in `STARTED_BY`, under a name that `KINDS` has.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import shutil
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import valkey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.proxy import proxy_to
from support.samples import get, noise, source
from support.servers import (
    Server,
    acl_user,
    redis_server,
    unix_socket_server,
    valkey_server,
    wait_until,
)
from support.stores import Store
from support.tls import tls_binary, tls_front, tls_server
from support.topologies import Cluster, cluster_servers, sentinel_servers
from support.writer import Writer

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError, ServerFullError, ServerUnavailableError
from ray_valkey_spill.format.codec import Codec, checksum
from ray_valkey_spill.format.header import FORMAT_VERSION, decode_header, encode_header
from ray_valkey_spill.format.names import Entry
from ray_valkey_spill.format.packing import INLINE_LIMIT, SourceObject
from ray_valkey_spill.format.sealing import TAG_SIZE
from ray_valkey_spill.protocol.link import Sharing
from ray_valkey_spill.store.object_store import StoredObject
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import Ledger, link_to

pytestmark = pytest.mark.usefixtures("no_thread_left")

SESSION, NODE = "session_1", "ab" * 28
CHUNK = 10_000
BOOKS = 3  # keys: the index, the usage and the totals


@dataclass(frozen=True)
class Running:
    """A server that has been started.

    Attributes:
        url: of the server.
        client: past the store.
        params: what a store has to be given beside the url.
        overflow: a directory that takes everything in the server's place.
    """

    url: str
    client: Any
    params: dict[str, Any] = field(default_factory=dict)
    overflow: Path | None = None


@contextlib.contextmanager
def at(url: str) -> Iterator[Running]:
    with valkey.from_url(url) as client:
        yield Running(url, client)


@contextlib.contextmanager
def tcp(directory: Path) -> Iterator[Running]:
    with valkey_server() as server, at(server.url) as running:
        yield running


@contextlib.contextmanager
def unix_socket(directory: Path) -> Iterator[Running]:
    with unix_socket_server(directory) as url, at(url) as running:
        yield running


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[Running]:
    with redis_server(directory) as url, at(url) as running:
        yield running


@contextlib.contextmanager
def acl(directory: Path) -> Iterator[Running]:
    """As a user who may do no more than has to be."""
    file = directory / "password"
    file.write_text("secret")
    with tcp(directory) as running:
        namespaces = [Config.load({"namespace": name}, {}) for name in ("default", "other")]
        with acl_user([running.client], " ".join(map(preflight.acl_rules, namespaces))):
            yield replace(running, params={"username": "ray", "password_file": str(file)})


@contextlib.contextmanager
def encrypted(directory: Path) -> Iterator[Running]:
    """By the server itself, if one that can is installed."""
    with contextlib.ExitStack() as stack:
        if tls_binary():
            server = stack.enter_context(tls_server(directory))
        else:
            plain = stack.enter_context(valkey_server())
            server = stack.enter_context(tls_front(directory, plain.port))
        server.client.ping()  # what serves it is no test's
        yield Running(server.url, server.client, server.certificates.params())


class ClusterClient:
    """One that looks for keys on all shards."""

    def __init__(self, servers: Cluster) -> None:
        self._servers = servers

    def keys(self, pattern: str) -> list[bytes]:
        return self._servers.keys(pattern)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._servers.client, name)


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Running]:
    with cluster_servers(directory) as servers:
        yield Running(servers.url, ClusterClient(servers))


@contextlib.contextmanager
def sentinel(directory: Path) -> Iterator[Running]:
    """Where a put waits for the replica."""
    with sentinel_servers(directory) as group:
        params = {"sentinel_service": group.service, "min_replicas": 1}
        yield Running(group.url, group.client, params)


@contextlib.contextmanager
def sealed(directory: Path) -> Iterator[Running]:
    file = directory / "keys"
    file.write_text(secrets.token_hex(32))
    with tcp(directory) as running:
        yield replace(running, params={"encryption_key_file": str(file)})


@contextlib.contextmanager
def overflow(directory: Path) -> Iterator[Running]:
    with tcp(directory) as running:
        yield replace(running, overflow=directory / "overflow")


@contextlib.contextmanager
def sealed_overflow(directory: Path) -> Iterator[Running]:
    with sealed(directory) as running:
        yield replace(running, overflow=directory / "overflow")


STARTED_BY: dict[str, Callable[[Path], AbstractContextManager[Running]]] = {
    "tcp": tcp,
    "unix socket": unix_socket,
    "redis": redis,
    "acl": acl,
    "tls": encrypted,
    "cluster": cluster,
    "sentinel": sentinel,
    "sealed": sealed,
    "overflow": overflow,
    "sealed overflow": sealed_overflow,
}
PLAIN_KINDS = [
    *("tcp", "unix socket", "acl", "tls", "cluster", "sentinel"),
    *(["redis"] if shutil.which("redis-server") else []),
]
KINDS = [*PLAIN_KINDS, "sealed"]
# For what looks at objects, and not at how they lie on a server.
everywhere = pytest.mark.parametrize(
    "running", [*KINDS, "overflow", "sealed overflow"], indirect=True, scope="module"
)
# For what looks at what is stored.
unsealed = pytest.mark.parametrize("running", PLAIN_KINDS, indirect=True, scope="module")


@dataclass
class Backend:
    """A server and, past the store, what is on it; or a directory that takes everything instead."""

    url: str
    client: Any
    params: dict[str, Any] = field(default_factory=dict)
    overflow: Path | None = None
    stores: list[Store] = field(default_factory=list)

    @property
    def tag_size(self) -> int:
        """What sealing adds to a chunk."""
        return TAG_SIZE if "encryption_key_file" in self.params else 0

    def config(self, **params: Any) -> Config:
        if self.overflow is not None:
            params = {"overflow_uri": str(self.overflow), "max_bytes": 0, **params}
        return Config.load({"url": self.url, "chunk_size": CHUNK, **self.params, **params}, {})

    def store(self, node: str = NODE, session: str = SESSION, **params: Any) -> Store:
        self.stores.append(Store(self.config(**params), session, node))
        return self.stores[-1]

    def all_keys(self) -> list[bytes]:
        return sorted(self.client.keys("*"))

    def left(self) -> list[object]:
        """Keys and files, but for what a session has that uses an overflow."""
        keys = [key for key in self.all_keys() if not key.endswith(b":overflows")]
        files = (
            [path for path in self.overflow.rglob("*.*") if path.is_file()] if self.overflow else []
        )
        return [*keys, *(path for path in files if not path.name.startswith("place."))]

    def clear(self) -> None:
        self.client.flushall()
        if self.overflow is not None:
            shutil.rmtree(self.overflow, ignore_errors=True)

    def chunk_keys(self) -> list[bytes]:
        keys = [key for key in self.all_keys() if key.count(b":") == 6]
        return sorted(keys, key=lambda key: int(key.rsplit(b":", 1)[1]))

    def header_key(self) -> bytes:
        (key,) = (key for key in self.all_keys() if key.count(b":") == 5)
        return key


@pytest.fixture(scope="module", params=KINDS)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("server")
    with STARTED_BY[request.param](directory) as running:
        yield running


@pytest.fixture
def backend(running: Running) -> Iterator[Backend]:
    backend = Backend(running.url, running.client, running.params, running.overflow)
    backend.clear()
    yield backend
    for store in backend.stores:
        store.close()
    backend.clear()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def destroy(store: Store) -> int:
    return store.destroy(is_alive=lambda pid: False)


def put(store: Store, data: bytes, number: int = 0) -> str:
    (url,) = put_all(store, [source(data, number)])
    return url


def put_all(store: Store, sources: list[SourceObject]) -> list[str]:
    urls, failure = store.put(sources)
    assert failure is None
    assert len(urls) == len(sources)
    return urls


def pattern(size: int) -> bytes:
    """Compressible, and different from chunk to chunk."""
    return np.arange(size // 8 + 1, dtype=np.int64).tobytes()[:size]


# --- round trips ---


@everywhere
@pytest.mark.parametrize("compression", ["auto", "lz4", "none"])
@pytest.mark.parametrize("make", [noise, pattern, bytes])
@pytest.mark.parametrize(
    "size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 25 * CHUNK + 7]
)
def test_what_was_put_is_got_and_what_is_deleted_is_gone(
    backend: Backend, size: int, make: Any, compression: str
) -> None:
    store = backend.store(compression=compression)
    data = make(size)
    url = put(store, data)
    assert get(store, url) == data
    assert store.delete([url]) == []
    assert backend.left() == []


@pytest.mark.parametrize("size", [INLINE_LIMIT - 1, INLINE_LIMIT, INLINE_LIMIT + 1])
def test_a_small_object_costs_one_key(backend: Backend, size: int) -> None:
    store = backend.store(chunk_size=1 << 20)
    url = put(store, noise(size))
    assert len(backend.all_keys()) == BOOKS + 1 + (size > INLINE_LIMIT)
    assert get(store, url) == noise(size)


@everywhere
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_batch_with_any_chunk_size_and_compression_comes_back(
    backend: Backend, data: st.DataObject
) -> None:
    store = backend.store(
        chunk_size=data.draw(st.integers(1024, 5000)),
        compression=data.draw(st.sampled_from(["auto", "lz4", "none"])),
    )
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(0, 12_000), st.integers(0, 9), st.integers(1, 8)), max_size=8
        )
    )
    values = [(noise(size, seed) * repeat)[:30_000] for size, seed, repeat in shapes]
    urls = put_all(store, [source(value, i) for i, value in enumerate(values)])
    assert [get(store, url, i) for i, url in enumerate(urls)] == values
    store.delete(urls)
    assert backend.left() == []
    store.close()


@everywhere
def test_any_order_of_operations_leaves_what_it_should(backend: Backend) -> None:
    class Operations(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            backend.clear()
            self.store = backend.store(chunk_size=1024)
            self.live: dict[str, bytes] = {}

        @rule(sizes=st.lists(st.integers(0, 5000), max_size=4), seed=st.integers(0, 99))
        def put(self, sizes: list[int], seed: int) -> None:
            values = [noise(size, seed) for size in sizes]
            self.live |= zip(put_all(self.store, [source(v) for v in values]), values)

        @rule(data=st.data())
        def get(self, data: st.DataObject) -> None:
            if self.live:
                url = data.draw(st.sampled_from(sorted(self.live)))
                assert get(self.store, url) == self.live[url]

        @rule(data=st.data())
        def delete(self, data: st.DataObject) -> None:
            urls = data.draw(st.lists(st.sampled_from(sorted(self.live)))) if self.live else []
            self.store.delete(urls)
            for url in urls:
                self.live.pop(url, None)

        @rule()
        def destroy(self) -> None:
            assert destroy(self.store) == len(self.live)
            self.teardown()
            self.store = backend.store(chunk_size=1024)
            self.live.clear()

        def teardown(self) -> None:
            self.store.close()

        @invariant()
        def the_index_tells_every_key(self) -> None:
            if not backend.overflow:
                assert backend.client.zcard(self.store.keys.index) == len(self.live)
            if not self.live:
                assert backend.left() == []

    run_state_machine_as_test(
        Operations, settings=settings(max_examples=15, stateful_step_count=20, deadline=None)
    )


@everywhere
def test_the_same_object_can_be_put_twice(backend: Backend) -> None:
    store = backend.store()
    first, second = put(store, b"old"), put(store, b"new")
    assert first != second
    store.delete([first])
    assert get(store, second) == b"new"


@everywhere
def test_an_object_is_got_from_any_node(backend: Backend) -> None:
    url = put(backend.store(), noise(5 * CHUNK))
    assert get(backend.store(node="cd" * 28), url) == noise(5 * CHUNK)


@everywhere
def test_odd_names_of_session_and_node_do_not_leave_their_place(backend: Backend) -> None:
    odd = backend.store(node="n:0?x=1&y", session="a:b c#*")
    neighbour = backend.store(node="n", session="a")
    put(neighbour, b"x")
    url = put(odd, noise(3 * CHUNK))
    assert get(odd, url) == noise(3 * CHUNK)
    assert destroy(neighbour) == 1
    assert get(odd, url) == noise(3 * CHUNK)
    assert destroy(odd) == 1
    assert backend.left() == []


# --- how it is stored ---


@unsealed
def test_incompressible_chunks_are_stored_as_they_are(backend: Backend) -> None:
    put(backend.store(), noise(3 * CHUNK))
    assert [backend.client.get(key) for key in backend.chunk_keys()] == [
        noise(3 * CHUNK)[start : start + CHUNK] for start in range(0, 3 * CHUNK, CHUNK)
    ]


def test_compressible_chunks_are_stored_small(backend: Backend) -> None:
    put(backend.store(), pattern(20 * CHUNK))
    assert sum(backend.client.strlen(key) for key in backend.chunk_keys()) < 12 * CHUNK


def test_compression_none_compresses_nothing(backend: Backend) -> None:
    put(backend.store(compression="none"), bytes(3 * CHUNK))
    assert [backend.client.strlen(key) for key in backend.chunk_keys()] == [
        CHUNK + backend.tag_size
    ] * 3


def test_an_object_half_of_which_compresses_is_stored_chunk_by_chunk(backend: Backend) -> None:
    data = noise(10 * CHUNK) + bytes(10 * CHUNK)
    url = put(backend.store(), data)
    sizes = [backend.client.strlen(key) for key in backend.chunk_keys()]
    assert sizes[:10] == [CHUNK + backend.tag_size] * 10
    assert max(sizes[10:]) < CHUNK // 10
    assert get(backend.store(), url) == data


def test_no_key_of_ours_has_a_ttl(backend: Backend) -> None:
    put(backend.store(), noise(3 * CHUNK))
    assert {backend.client.ttl(key) for key in backend.all_keys()} == {-1}


@everywhere
def test_many_are_found_in_order_whatever_becomes_of_each(backend: Backend) -> None:
    store = backend.store(chunk_size=1024)
    sizes = [10, 20, 5000, 6000, 30, 0, 7000, 40] * 20
    urls = put_all(store, [source(noise(size, i), i) for i, size in enumerate(sizes)])
    wanted = [(url, f"{i:056x}") for i, url in enumerate(urls)]
    store.delete(url for url, _ in wanted[:3])
    wanted[1] = ("file:///not/ours", wanted[1][1])
    for i, found in enumerate(store.find_all(wanted)):
        if i < 3:
            assert isinstance(found, LostObjectError)
            continue
        assert isinstance(found, StoredObject)
        target = bytearray(sizes[i])
        store.fill(found, memoryview(target))
        assert target == noise(sizes[i], i)
        store.delete([wanted[i][0]])
    assert backend.left() == []


# --- what is missing or damaged ---


def damage_chunk_deleted(backend: Backend) -> None:
    backend.client.delete(backend.chunk_keys()[2])


def damage_chunk_truncated(backend: Backend) -> None:
    key = backend.chunk_keys()[2]
    backend.client.set(key, backend.client.get(key)[:-1])


def damage_chunk_grown(backend: Backend) -> None:
    backend.client.append(backend.chunk_keys()[2], b"x")


def damage_chunk_of_another_type(backend: Backend) -> None:
    key = backend.chunk_keys()[2]
    backend.client.delete(key)
    backend.client.rpush(key, "x")


def damage_chunks_swapped(backend: Backend) -> None:
    backend.client.set(backend.chunk_keys()[2], backend.client.get(backend.chunk_keys()[3]))


def damage_bit_flipped(backend: Backend) -> None:
    key = backend.chunk_keys()[2]
    value = bytearray(backend.client.get(key))
    value[len(value) // 2] ^= 4
    backend.client.set(key, bytes(value))


def damage_header_deleted(backend: Backend) -> None:
    backend.client.delete(backend.header_key())


def damage_header_truncated(backend: Backend) -> None:
    backend.client.set(backend.header_key(), backend.client.get(backend.header_key())[:-30])


def damage_header_emptied(backend: Backend) -> None:
    backend.client.set(backend.header_key(), b"")


def damage_header_bit_flipped(backend: Backend) -> None:
    value = bytearray(backend.client.get(backend.header_key()))
    value[300] ^= 4
    backend.client.set(backend.header_key(), bytes(value))


def damage_header_of_another_type(backend: Backend) -> None:
    key = backend.header_key()
    backend.client.delete(key)
    backend.client.hset(key, "a", "b")


def damage_all_gone(backend: Backend) -> None:
    backend.client.flushall()


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("make", [noise, pattern])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_noticed_and_never_read(backend: Backend, damage: Any, make: Any) -> None:
    store = backend.store()
    url = put(store, make(6 * CHUNK - 1))
    damage(backend)
    with pytest.raises(LostObjectError, match=f"{0:056x}"):
        get(store, url)
    assert store.delete([url]) == []
    backend.client.delete(*backend.all_keys() or ["x"])


@pytest.mark.parametrize("running", ["tcp"], indirect=True, scope="module")
def test_an_inline_object_that_cannot_be_decompressed_is_named(backend: Backend) -> None:
    store = backend.store()
    url = put(store, pattern(CHUNK))
    value = backend.client.get(backend.header_key())
    header, payload = decode_header(value)
    (chunk,) = header.chunks
    assert header.inline
    assert chunk.codec is not Codec.RAW
    garbage = noise(len(payload))
    header.chunks = [chunk._replace(checksum=checksum(garbage))]
    backend.client.set(backend.header_key(), b"".join(encode_header(header, [garbage])))
    with pytest.raises(LostObjectError, match=rf"object {0:056x}, spilled as .* is lost: a chunk"):
        get(store, url)


def test_most_damage_is_found_before_any_data_move(backend: Backend) -> None:
    store = backend.store()
    for damage in set(DAMAGES) - {damage_bit_flipped, damage_chunks_swapped}:
        url = put(store, noise(6 * CHUNK - 1))
        damage(backend)
        with pytest.raises(LostObjectError):
            store.find(url, f"{0:056x}")
        backend.client.flushall()


@everywhere
def test_a_header_of_a_newer_format_is_refused(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = backend.store()
    monkeypatch.setattr("ray_valkey_spill.format.header.FORMAT_VERSION", FORMAT_VERSION + 1)
    url = put(store, noise(3 * CHUNK))
    monkeypatch.undo()
    with pytest.raises(LostObjectError, match="upgrade"):
        get(store, url)


def test_a_header_is_bound_to_its_object_and_its_url(backend: Backend) -> None:
    store = backend.store()
    url = put(store, noise(3 * CHUNK), number=7)
    with pytest.raises(LostObjectError, match="is that of object"):
        get(store, url, number=8)
    with pytest.raises(LostObjectError, match="bytes, not"):
        get(store, url.replace(f"size={3 * CHUNK}", "size=12345"), number=7)


def test_an_object_marked_lost_stays_lost_and_can_be_deleted(backend: Backend) -> None:
    store = backend.store()
    url = put(store, noise(3 * CHUNK))
    store.mark_lost(store.find(url, f"{0:056x}"))
    with pytest.raises(LostObjectError, match="header is gone"):
        get(store, url)
    store.delete([url])
    assert backend.all_keys() == []


# --- whose is what ---


@everywhere
def test_destroy_takes_its_own_node_of_its_own_session_only(backend: Backend) -> None:
    mine = backend.store()
    others = [
        backend.store(node="cd" * 28),
        backend.store(node=NODE[:-1]),
        backend.store(node=NODE + "0"),
        backend.store(session="session_2"),
        backend.store(session="session_1x"),
        backend.store(namespace="other"),
    ]
    urls = [put(store, noise(3 * CHUNK)) for store in others]
    for _ in range(3):
        put(mine, noise(3 * CHUNK))
    assert destroy(mine) == 3
    assert [get(store, url) for store, url in zip(others, urls)] == [noise(3 * CHUNK)] * 6
    assert destroy(mine) == 0


@everywhere
def test_destroy_finds_more_than_one_page_of_objects(backend: Backend) -> None:
    store = backend.store()
    put_all(store, [source(b"x", i) for i in range(1234)])
    assert destroy(store) == 1234
    assert backend.left() == []


def test_a_store_touches_no_key_of_others_and_never_scans(backend: Backend) -> None:
    for key in ("vllm:kv:a", "ray:actor:x", "ray:spill:other:{other}:index"):
        backend.client.set(key, "foreign")
    before = {key: backend.client.get(key) for key in backend.all_keys()}
    backend.client.config_resetstat()
    store = backend.store()
    urls = [put(store, noise(3 * CHUNK)) for _ in range(3)]
    get(store, urls[0])
    store.delete([urls[0], urls[0], "vllm:kv:a?offset=0&size=1", "session:user:1"])
    destroy(store)
    used = {name.removeprefix("cmdstat_") for name in backend.client.info("commandstats")}
    assert {key: backend.client.get(key) for key in backend.all_keys()} == before
    assert not used & {"scan", "keys", "flushall", "flushdb", "del", "randomkey", "sscan", "zscan"}


@everywhere
def test_deleting_what_is_not_ours_is_reported_and_not_done(backend: Backend) -> None:
    foreign = ["vllm:kv:a?offset=0&size=1", "nonsense", ""]
    assert backend.store().delete(foreign) == foreign


@everywhere
def test_deleting_twice_is_no_error(backend: Backend) -> None:
    store = backend.store()
    url = put(store, noise(3 * CHUNK))
    store.delete([url])
    assert store.delete([url, url]) == []


# --- failures ---


@pytest.fixture
def full_server() -> Iterator[Server]:
    with valkey_server(maxmemory="12mb") as server:
        yield server


def test_a_full_server_keeps_the_prefix_and_nothing_of_the_rest(full_server: Server) -> None:
    backend = Backend(full_server.url, full_server.client)
    store = backend.store(chunk_size=1 << 20)
    urls, failure = store.put([source(noise(3 << 20, i), i) for i in range(6)])
    assert isinstance(failure, ServerFullError)
    assert 0 < len(urls) < 6
    store.give_back()
    assert len(full_server.our_keys()) == BOOKS + 4 * len(urls)
    for i, url in enumerate(urls):
        assert get(store, url, i) == noise(3 << 20, i)
    store.delete(urls)
    assert full_server.our_keys() == []
    store.close()


@pytest.mark.parametrize("overflow", [None, "overflow"])
def test_a_put_that_was_refused_holds_no_memory_of_the_caller(
    full_server: Server, tmp_path: Path, overflow: str | None
) -> None:
    """A buffer of plasma's that is still held is neither freed nor used again."""
    uri = overflow and str(tmp_path / overflow)
    store = Backend(full_server.url, full_server.client).store(overflow_uri=uri)
    data = np.frombuffer(noise(12 << 20), np.uint8).copy()
    held = weakref.ref(data)
    gc.disable()  # what only a collection frees can be held for minutes
    try:
        urls, failure = store.put([SourceObject("0" * 56, b"", b"", memoryview(data))])
        assert isinstance(failure, ServerFullError) == (not urls) == (overflow is None)
        del data, failure
        assert held() is None
    finally:
        gc.enable()
    destroy(store)
    store.close()


@pytest.mark.parametrize("chunk_size", [16 << 10, 1 << 20])
def test_a_full_server_behind_a_slow_link_is_left_without_orphans(
    full_server: Server, chunk_size: int
) -> None:
    with proxy_to(full_server.port) as proxy:
        proxy.to_server.delay = 0.001
        store = Backend(proxy.url, full_server.client).store(chunk_size=chunk_size)
        for _ in range(3):
            urls, failure = store.put([source(noise(3 << 20, i), i) for i in range(6)])
            assert isinstance(failure, ServerFullError)
            # What was sent after the first refusal has come too late to be stored.
            chunks = sum(store.keys.parse_url(url).name.chunks for url in urls)
            store.give_back()
            books = BOOKS if urls else 0
            assert len(full_server.our_keys()) == books + len(urls) + chunks
            store.delete(urls)
            assert full_server.our_keys() == []
        store.close()


def test_stores_of_one_process_leave_each_others_puts_alone(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    with proxy_to(server.port) as proxy:
        backend = Backend(proxy.url, server.client)
        first, second = backend.store(), Backend(server.url, server.client).store()
        settling = proxy.hold(b"EVAL", number=2)
        putting = pool.submit(put_all, first, [source(noise(3 * CHUNK, i), i) for i in range(20)])
        settling.wait()
        wait_until(lambda: server.client.zcard(first.keys.pending) == 20)
        assert second.recover(is_alive=lambda pid: True) == 0
        settling.release()
        for i, url in enumerate(putting.result()):
            assert get(first, url, i) == noise(3 * CHUNK, i)
        destroy(second)
        first.close()
        second.close()


def test_puts_of_one_thread_are_spared_by_the_recovery_in_another(
    backend: Backend, pool: ThreadPoolExecutor
) -> None:
    first, second = backend.store(), backend.store()
    for _ in range(10):
        sources = [source(noise(3 * CHUNK, i), i) for i in range(20)]
        putting = pool.submit(put_all, first, sources)
        while not putting.done():
            assert second.recover(is_alive=lambda pid: True) == 0
        second.delete(putting.result())


def test_objects_destroyed_while_they_are_written_are_not_reported(server: Server) -> None:
    store = Backend(server.url, server.client).store()
    with proxy_to(server.port) as proxy, writer(proxy.url) as writing:
        settling = proxy.hold(b"EVAL", number=2)
        writing.begin([3 * CHUNK] * 20)
        settling.wait()
        wait_until(lambda: len(server.our_keys()) == 1 + 20 * 4)
        assert destroy(store) == 20
        settling.release()
        assert writing.end() == ([], "LostObjectError")
    assert server.our_keys() == []
    store.close()


@pytest.mark.parametrize("number", [1, 2, 31, 80])
def test_a_server_that_loses_its_data_meanwhile_is_noticed(server: Server, number: int) -> None:
    with proxy_to(server.port) as proxy:
        store = Backend(proxy.url, server.client).store()
        put(store, b"x")
        proxy.before(server.flush, b"SET", number)
        urls, failure = store.put([source(noise(3 * CHUNK, i), i) for i in range(20)])
        assert urls == []
        assert isinstance(failure, LostObjectError)
        assert server.keys() == []
        server.settle_foreign()
        store.close()


def writer(url: str, **params: Any) -> Writer:
    return Writer({"url": url, "chunk_size": CHUNK, **params}, SESSION, NODE)


def test_what_a_killed_writer_left_is_found_and_nothing_else(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        backend = Backend(server.url, server.client)
        survivor = backend.store()
        kept = put(survivor, noise(3 * CHUNK))
        elsewhere = put(backend.store(node="cd" * 28), noise(3 * CHUNK))
        writing = proxy.hold(b"SET", 8)
        with writer(proxy.url) as dying:
            before = server.our_keys()
            dying.begin([3 * CHUNK] * 10)
            writing.wait()
            # Seven values, and what is pending.
            wait_until(lambda: len(server.our_keys()) == len(before) + 8)
            before = server.our_keys()
            assert server.client.zcard(survivor.keys.pending) == 10
            assert survivor.recover(is_alive=lambda pid: pid == dying.pid) == 0
            assert server.our_keys() == before
        writing.cut()
        assert survivor.recover(is_alive=lambda pid: pid != dying.pid) == 10
        assert get(survivor, kept) == get(survivor, elsewhere) == noise(3 * CHUNK)
        survivor.delete([kept, elsewhere])
        assert server.our_keys() == []


def test_destroy_waits_for_a_living_writer_and_leaves_what_is_unfinished(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    store = Backend(server.url, server.client).store()
    store.renew_lease("127.0.0.1:1", lambda: False)
    done = put(store, noise(3 * CHUNK))
    before = len(server.our_keys())
    with proxy_to(server.port) as proxy, writer(proxy.url) as writing:
        settling = proxy.hold(b"EVAL", number=2)
        writing.begin([3 * CHUNK] * 10)
        settling.wait()
        wait_until(lambda: len(server.our_keys()) == before + 1 + 4 * 10)
        assert store.destroy(is_alive=lambda pid: True, patience=0) == 1
        with pytest.raises(LostObjectError):
            get(store, done)
        # The ten that are being written are whole, and can still be found.
        assert server.client.zcard(store.keys.pending) == 10
        assert len(server.spilled_keys()) == 1 + 10 * 4
        # By it, a clean-up asks the node's GCS, instead of waiting for ten minutes.
        assert server.client.zcard(store.keys.leases) == 1
        destroying = pool.submit(store.destroy, is_alive=lambda pid: True, patience=30)
        settling.release()
        assert writing.end().failure is None
        assert destroying.result() == 10
    assert server.our_keys() == []
    store.close()


def test_what_was_put_while_recover_looked_is_spared(server: Server) -> None:
    store = Backend(server.url, server.client).store()
    with proxy_to(server.port) as proxy, writer(proxy.url) as writing:
        settling = proxy.hold(b"EVAL", number=2)
        writing.begin([INLINE_LIMIT + 1])
        settling.wait()
        wait_until(lambda: server.client.zcard(store.keys.pending) == 1)
        outcomes = []

        def ends_well_and_then_dies(pid: int) -> bool:
            if not outcomes:
                settling.release()
                outcomes.append(writing.end())
                writing.kill()
            return False

        assert store.recover(ends_well_and_then_dies) == 0
        (url,) = outcomes[0].urls
        assert get(store, url) == noise(INLINE_LIMIT + 1)
    destroy(store)
    store.close()


@pytest.mark.parametrize("size", [1000, 3 << 20])
def test_what_a_broken_connection_carries_out_late_spoils_nothing(
    backend: Backend, size: int
) -> None:
    store = backend.store(chunk_size=1 << 20)
    url = put(store, noise(size))
    name = store.keys.parse_url(url).name

    def accounts() -> list[object]:
        totals = backend.client.get(store.keys.totals)
        # But for how often they have changed.
        return [backend.client.hgetall(store.keys.usage), totals.split()[:5]]

    before = accounts()
    backend.client.zadd(store.keys.pending, {str(name): 0})
    assert store.recover(is_alive=lambda pid: False) == 0
    (entry,) = (Entry.parse(e.decode()) for e in backend.client.zrange(store.keys.index, 0, -1))
    with contextlib.closing(link_to(backend.config())) as link:
        ledger = Ledger(link, store.keys)
        assert link.execute(*ledger.settlements(store.node, [entry])) == [[1, 0, 0]]
    assert accounts() == before
    assert get(store, url) == noise(size)
    store.delete([url])
    assert backend.all_keys() == []


def test_what_a_failed_put_could_not_remove_is_recovered(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        store = Backend(proxy.url, server.client).store(retry_timeout=0.2)
        put(store, b"x")
        proxy.to_server.refuse_after = 50_000
        urls, failure = store.put([source(noise(3 * CHUNK, i), i) for i in range(10)])
        assert urls == []
        assert isinstance(failure, ServerUnavailableError)
        assert len(server.our_keys()) > 2
        proxy.refusing = False
        assert store.recover(is_alive=lambda pid: True) == 10
        assert destroy(store) == 1
        store.close()


@pytest.mark.parametrize("make", [noise, pattern])
def test_cuts_in_both_directions_go_unnoticed(server: Server, make: Any) -> None:
    with proxy_to(server.port) as proxy:
        backend = Backend(proxy.url, server.client)
        store = backend.store(chunk_size=1 << 20)
        data = make((20 << 20) + 17)
        proxy.to_server.reset_after = 30_000
        url = put(store, data)
        proxy.to_client.reset_after = 30_000
        assert get(store, url) == data
        assert proxy.connections == 3
        store.delete([url])
        store.close()


def test_objects_go_both_ways_without_a_stall_after_a_nat_forgot_the_connections(
    server: Server,
) -> None:
    with proxy_to(server.port) as proxy:
        params = {"url": proxy.url, "max_bytes": 64 << 20}
        config = Config.load(params, {})
        store = Store(config, "session", "node", sharing=Sharing(idle=0))
        data = noise(3 << 20)
        url = put(store, data)
        for _ in range(2):
            proxy.forget()
            assert get(store, url) == data
            proxy.forget()
            store.delete([url])
            proxy.forget()
            url = put(store, data)
        assert proxy.swallowed == 0
        assert store.breaks == 0
        destroy(store)
        store.close()


def test_a_server_that_is_away_is_never_taken_for_lost_data(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        backend = Backend(proxy.url, server.client)
        store = backend.store(retry_timeout=0.2)
        url = put(store, noise(3 * CHUNK))
        proxy.refusing = True
        proxy.reset()
        with pytest.raises(ServerUnavailableError):
            get(store, url)
        proxy.refusing = False
        assert get(store, url) == noise(3 * CHUNK)
        store.delete([url])
        store.close()


# --- what it costs ---


def test_a_small_object_takes_one_round_trip_each_way(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        store = Backend(proxy.url, server.client).store(chunk_size=1 << 20)
        urls = [put(store, noise(1000))]
        before = proxy.round_trips
        urls.append(put(store, noise(1000)))
        assert proxy.round_trips - before == 1
        before = proxy.round_trips
        assert get(store, urls[1]) == noise(1000)
        assert proxy.round_trips - before == 1
        before = proxy.round_trips
        store.delete(urls)
        assert proxy.round_trips - before == 1
        store.close()


def test_a_batch_of_small_objects_is_pipelined(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        store = Backend(proxy.url, server.client).store(chunk_size=1 << 20)
        put(store, b"")
        before = proxy.round_trips
        urls = put_all(store, [source(noise(500), i) for i in range(500)])
        assert proxy.round_trips - before < 50
        before = proxy.round_trips
        wanted = [(url, f"{i:056x}") for i, url in enumerate(urls)]
        found = list(store.find_all(wanted))
        assert proxy.round_trips - before < 50
        assert all(isinstance(f, StoredObject) and f.payload == noise(500) for f in found)
        destroy(store)
        store.close()


def test_chunks_are_pipelined(server: Server) -> None:
    # A busy machine splits what is under way at any place: only one exchange per chunk is wrong.
    with proxy_to(server.port) as proxy:
        store = Backend(proxy.url, server.client).store(chunk_size=4096)
        before = proxy.round_trips
        url = put(store, noise(1000 * 4096))
        assert proxy.round_trips - before < 250
        before = proxy.round_trips
        assert get(store, url) == noise(1000 * 4096)
        assert proxy.round_trips - before < 250
        destroy(store)
        store.close()


@everywhere
@pytest.mark.parametrize("make", [noise, pattern])
def test_memory_stays_bounded_whatever_the_size(backend: Backend, make: Any) -> None:
    store = backend.store(chunk_size=1 << 20)
    data = make(64 << 20)
    target = bytearray(len(data))
    put(store, make(8 << 20))
    tracemalloc.start()
    pool = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(pool)
    pa.set_memory_pool(counted)
    try:
        url = put(store, data)
        found = store.find(url, f"{0:056x}")
        store.fill(found, memoryview(target))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        pa.set_memory_pool(pool)
        tracemalloc.stop()
    assert target == data
    # Raw chunks are never copied. Of compressed and of sealed ones some are held at a time: those
    # under way, at most 16 MiB in a cluster, and those that threads work on. Where sealing has a
    # buffer to write to, that is Arrow's, which is not counted in `peak`.
    raw = make is noise
    copied = backend.tag_size > 0 and not hasattr(AESGCM, "encrypt_into")
    assert peak < (32 << 20 if copied or not raw else 1 << 20)
    assert counted.max_memory() < (1 << 20 if raw and not backend.tag_size else 32 << 20)


@pytest.mark.parametrize("threads", [0, 1])
def test_where_no_more_threads_can_start_objects_are_compressed_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Under a limit on processes, such as a container's."""
    data = bytes(range(256)) * (1 << 16)
    start, started = threading.Thread.start, []

    def start_few(self: threading.Thread) -> None:
        if len(started) == threads:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    config = Config.load({"url": server.url, "compression": "lz4"}, {})
    with contextlib.closing(Store(config, "session", "node")) as store:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start_few)
            (url,), failure = store.put([source(data)])
            assert failure is None
            started.clear()
            assert get(store, url) == data
        store.destroy(lambda pid: False)
