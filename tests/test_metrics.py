"""What the object store tells of its work, and what of that comes out of a node's endpoint."""

from __future__ import annotations

import contextlib
import logging
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ObjectLostError
from support.clusters import MIB, ray_with, system_config
from support.proxy import Proxy, proxy_to
from support.samples import get, noise, object_id, source
from support.servers import PATIENCE, ROOT, Server, valkey_server, wait_until
from support.stores import Store

from ray_valkey_spill import errors
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    ServerFullError,
    ServerUnavailableError,
    SpillError,
    UnconfirmedError,
)
from ray_valkey_spill.format.names import Keyspace, NodeName, TierName
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.plugin import metrics
from ray_valkey_spill.plugin.metrics import DEFINITIONS, Metrics
from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.store.node import Room
from ray_valkey_spill.store.object_store import StoredObject
from ray_valkey_spill.store.observer import Observer
from ray_valkey_spill.tiers.ledger import Grant, Ledger, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier

OWNER = NodeName("session_1", "ab" * 28)
CHUNK = 10_000


def sources(*sizes: int) -> list[SourceObject]:
    return [source(noise(size, number), number) for number, size in enumerate(sizes)]


def is_alive(pid: int) -> bool:
    return True


@dataclass
class Told(Observer):
    """Keeps what it is told: objects, logical and stored bytes by operation and tier; losses."""

    sums: dict[tuple[str, str], tuple[int, int, int | None]] = field(default_factory=dict)
    calls: int = 0
    losses: list[str] = field(default_factory=list)

    def done(  # type: ignore[override]
        self,
        operation: str,
        tier: str,
        objects: int,
        logical: int,
        stored: int | None,
        seconds: float,
    ) -> None:
        assert seconds > 0
        had = self.sums.get((operation, tier), (0, 0, 0))
        counted = None if stored is None or had[2] is None else had[2] + stored
        self.sums[operation, tier] = had[0] + objects, had[1] + logical, counted
        self.calls += 1

    def lost(self, reason: str, tier: TierName) -> None:  # type: ignore[override]
        self.losses.append(reason)


@dataclass
class Watched:
    store: Store
    told: Told


Watch = Callable[..., Watched]


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxy_to(server.port) as proxy:
        yield proxy


@pytest.fixture
def watch(no_thread_left: None) -> Iterator[Watch]:
    """Makes stores, whose observers keep what they are told."""
    made: list[Store] = []

    def make(url: str, **params: Any) -> Watched:
        told = Told()
        config = Config.load({"url": url, "chunk_size": CHUNK, **params}, {})
        made.append(Store(config, *OWNER, told))
        return Watched(made[-1], told)

    yield make
    for store in made:
        store.destroy(is_alive)
        store.close()


def usages(server: Server) -> dict[str, tuple[int, ...]]:
    """Objects, logical and stored bytes by owner, as the books have them."""
    found = server.client.hgetall(Keyspace(ROOT).usage)
    return {
        owner.decode(): tuple(map(int, numbers.split()[:3])) for owner, numbers in found.items()
    }


def usage(server: Server) -> tuple[int, ...]:
    return usages(server).get(str(OWNER), (0, 0, 0))


def files(directory: Path) -> list[int]:
    """The lengths of the objects in an overflow."""
    config = Config.load({"url": "valkey://h", "overflow_uri": str(directory)}, {})
    tier = OverflowTier.of(config)
    assert tier is not None
    with contextlib.closing(tier):
        found = [file for owner in tier.node_names() for file in tier.files(owner)]
    return [file.entry.stored for file in found if file.is_whole]


# --- the object store ---


def test_each_operation_is_told_once_and_agrees_with_the_books(
    server: Server, watch: Watch
) -> None:
    it = watch(server.url)
    sizes = [0, 1000, 3 * CHUNK, 30 * CHUNK + 1]
    urls, failure = it.store.put(sources(*sizes))
    assert failure is None
    assert it.told.sums == {("spill", "valkey"): usage(server)}
    assert usage(server)[:2] == (4, sum(sizes))
    for number, url in enumerate(urls):
        get(it.store, url, number)
    assert it.told.sums["restore", "valkey"] == (4, sum(sizes), sum(sizes))
    it.store.delete(urls)
    assert it.told.sums["delete", "valkey"] == (4, sum(sizes), None)
    assert it.told.calls == 1 + 4 + 1
    assert usage(server) == (0, 0, 0)


def test_what_the_budget_has_no_room_for_counts_for_the_overflow(
    server: Server, watch: Watch, tmp_path: Path
) -> None:
    it = watch(server.url, max_bytes=MIB, overflow_uri=str(tmp_path))
    urls, failure = it.store.put(sources(*[30 * CHUNK] * 6))
    assert failure is None
    in_valkey = it.told.sums["spill", "valkey"]
    in_overflow = it.told.sums["spill", "overflow"]
    assert in_valkey == usage(server)
    assert in_overflow == (6 - in_valkey[0], (6 - in_valkey[0]) * 30 * CHUNK, sum(files(tmp_path)))
    assert in_valkey[0] > 0 < in_overflow[0]
    for number, url in enumerate(urls):
        get(it.store, url, number)
    it.store.delete(urls)
    for tier, (objects, logical, _) in (("valkey", in_valkey), ("overflow", in_overflow)):
        assert it.told.sums["restore", tier] == (objects, logical, logical)
        assert it.told.sums["delete", tier] == (objects, logical, None)


def test_room_and_overflow_are_what_metadata_server_and_files_say(
    server: Server, watch: Watch, tmp_path: Path
) -> None:
    server.client.config_set("maxmemory", 1 << 30)
    params = {"max_bytes": MIB, "overflow_uri": str(tmp_path)}
    it = watch(server.url, **params)
    assert it.store.sweep_overflow() == 0
    it.store.put(sources(*[30 * CHUNK] * 6))
    it.store.give_back()
    with contextlib.closing(link_to(Config.load({"url": server.url}, {}))) as link:
        ledger, other = Ledger(link, it.store.keys), NodeName("session", "other")
        link.execute(ledger.reservation(other, "1-x", Grant(0, 0), 1000, 1000, None, None))
        room = it.store.room()
        ledger.release(other, ["1-x"])
    assert room.used == usage(server)[2] + 1000
    assert room.max_bytes == MIB
    assert room.memory.maxmemory == 1 << 30
    assert room.memory.used > usage(server)[1]
    assert it.store.sweep_overflow() == sum(files(tmp_path)) > 0


def test_a_put_is_counted_as_far_as_it_went_and_not_at_all_if_nothing_is_left_of_it(
    server: Server, watch: Watch
) -> None:
    it = watch(server.url, max_bytes=MIB)
    urls, failure = it.store.put(sources(*[30 * CHUNK] * 6))
    assert isinstance(failure, ServerFullError)
    assert it.told.sums == {("spill", "valkey"): usage(server)}
    assert 0 < len(urls) == usage(server)[0] < 6
    for _ in range(3):
        assert it.store.put(sources(*[90 * CHUNK]))[0] == []
    assert it.told.calls == 1


def test_a_connection_that_breaks_counts_as_such_and_nothing_counts_twice(
    server: Server, proxy: Proxy, watch: Watch
) -> None:
    it = watch(proxy.url)
    proxy.to_server.reset_after = 300_000
    urls, failure = it.store.put(sources(*[100 * CHUNK] * 3))
    assert failure is None
    assert it.told.sums["spill", "valkey"] == usage(server)
    assert it.store.breaks > 0
    before = it.store.breaks
    proxy.to_client.reset_after = 300_000
    assert get(it.store, urls[0]) == noise(100 * CHUNK)
    assert it.told.sums["restore", "valkey"][0] == 1
    assert it.store.breaks > before


def test_a_put_that_is_made_again_counts_once(
    server: Server, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = watch(server.url)
    confirm, tries = it.store.valkey.confirm, []

    def unconfirmed_once(*args: Any) -> None:
        tries.append(args)
        if len(tries) == 1:
            raise UnconfirmedError("the server failed over")
        confirm(*args)

    monkeypatch.setattr(it.store.valkey, "confirm", unconfirmed_once)
    _, failure = it.store.put(sources(3 * CHUNK))
    assert (failure, len(tries)) == (None, 2)
    assert it.told.sums == {("spill", "valkey"): usage(server)}


def test_a_deletion_that_failed_is_counted_when_it_is_made_up_for(
    proxy: Proxy, watch: Watch
) -> None:
    it = watch(proxy.url, retry_timeout=0.2)
    urls, _ = it.store.put(sources(*[3 * CHUNK] * 4))
    proxy.refusing = True
    proxy.reset()
    with pytest.raises(ServerUnavailableError):
        it.store.delete(urls)
    with pytest.raises(ServerUnavailableError):
        it.store.delete_again(urls)
    assert ("delete", "valkey") not in it.told.sums
    proxy.refusing = False
    it.store.delete_again(urls)
    assert it.told.sums["delete", "valkey"] == (4, 12 * CHUNK, None)


def chunk_gone(server: Server, watched: Watched, url: str) -> None:
    server.client.delete(server.keys_of(object_id(0))[1])


def header_and_chunks_gone(server: Server, watched: Watched, url: str) -> None:
    watched.store.delete([url])


def header_damaged(server: Server, watched: Watched, url: str) -> None:
    key = server.header_of(object_id(0))
    server.client.setrange(key, 100, b"x" * 50)


def found_damaged_by_another(server: Server, watched: Watched, url: str) -> None:
    """As an IO worker leaves it that has to exit."""
    # The look reads the first chunks ahead.
    server.client.setrange(server.keys_of(object_id(0))[1], 100, b"x" * 50)
    found = watched.store.find(url, object_id(0))
    with pytest.raises(LostObjectError, match="checksum"):
        watched.store.fill(found, memoryview(bytearray(found.header.size)))
    watched.store.mark_lost(found)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (chunk_gone, "missing"),
        (header_and_chunks_gone, "missing"),
        (header_damaged, "damaged"),
        (found_damaged_by_another, "damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_loss_is_told_with_its_reason_each_time_it_is_found(
    server: Server, watch: Watch, damage: Callable[[Server, Watched, str], None], reason: str
) -> None:
    it = watch(server.url)
    (url,), _ = it.store.put(sources(3 * CHUNK))
    damage(server, it, url)
    assert it.told.losses == []
    for times in (1, 2):
        assert isinstance(next(it.store.find_all([(url, object_id(0))])), LostObjectError)
        assert it.told.losses == [reason] * times
    assert ("restore", "valkey") not in it.told.sums


def test_a_url_of_others_is_told_as_such(server: Server, watch: Watch) -> None:
    it = watch(server.url)
    (lost,) = it.store.find_all([("s3://bucket/x?offset=0&size=1", "0" * 56)])
    assert isinstance(lost, LostObjectError)
    assert it.told.losses == ["foreign"]


def test_many_that_are_looked_up_together_are_timed_one_by_one(
    server: Server, watch: Watch
) -> None:
    it = watch(server.url)
    urls, _ = it.store.put(sources(*[3 * CHUNK] * 20))
    found = list(it.store.find_all([(url, object_id(i)) for i, url in enumerate(urls)]))
    assert all(isinstance(each, StoredObject) and each.seconds > 0 for each in found)


# --- Ray's instruments ---


@dataclass
class Instrument:
    """Stands for one of Ray's, and keeps what it is given."""

    name: str
    rest: tuple[Any, ...]
    given: list[tuple[float, dict[str, str] | None]] = field(default_factory=list)

    def record(self, value: float, labels: dict[str, str] | None) -> None:
        self.given.append((value, labels))

    inc = set = observe = record


@pytest.fixture
def instruments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Instrument]:
    made: dict[str, Instrument] = {}

    def make(name: str, *rest: Any) -> Instrument:
        assert name not in made
        made[name] = Instrument(name, rest)
        return made[name]

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, make)
    return made


def given(instruments: dict[str, Instrument], name: str) -> list[tuple[float, Any]]:
    return instruments[f"valkey_spill_{name}"].given


@pytest.mark.parametrize(
    ("error", "reason", "is_connected"),
    [
        (ConfigError("x"), "config", None),
        (LostObjectError("x"), "lost", None),
        (errors.OverflowUnavailableError("x"), "overflow", None),
        (ServerUnavailableError("x"), "unavailable", 0),
        (UnconfirmedError("x"), "unavailable", 0),
        (ServerFullError("x"), "full", None),
        (errors.ServerRefusedError("x"), "refused", 0),
        (errors.NotValkeyError("x"), "not_valkey", 0),
        (errors.ServerError("x"), "other", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_failure_has_a_reason_and_tells_whether_the_server_can_be_used(
    instruments: dict[str, Instrument], error: SpillError, reason: str, is_connected: int | None
) -> None:
    it = Metrics(lambda: True)
    it.failed("spill", error)
    assert given(instruments, "failures") == [(1, {"operation": "spill", "reason": reason})]
    it.looked(breaks=0)
    connected = instruments.get("valkey_spill_connected")
    told = {value for value, _ in connected.given} if connected else set()
    assert told == ({is_connected} if is_connected is not None else set())
    it.done("restore", "overflow", 1, 2, 3, 0.1)
    it.done("restore", "valkey", 1, 2, 3, 0.1)
    assert given(instruments, "connected")[-1] == (1, None)


def test_a_look_tells_of_the_breaks_since_the_one_before_and_of_the_last_lease(
    instruments: dict[str, Instrument],
) -> None:
    it = Metrics(lambda: True)
    for breaks in (0, 3, 3, 10):
        it.looked(breaks)
    assert [value for value, _ in given(instruments, "connection_breaks")] == [3, 7]
    assert {value for value, _ in given(instruments, "lease_renewed_timestamp_seconds")} == {0}
    it.renewed_lease()
    # A round can take longer than the endpoint exports a gauge.
    (*_, at_once) = given(instruments, "lease_renewed_timestamp_seconds")
    it.looked(10)
    it.looked(10)
    *_, first, last = given(instruments, "lease_renewed_timestamp_seconds")
    assert at_once == first == last
    assert first[0] > 0
    assert given(instruments, "connected")[-1] == (1, None)


def test_without_a_budget_there_is_no_limit(instruments: dict[str, Instrument]) -> None:
    it = Metrics(lambda: True)
    memory = MemoryInfo(maxmemory=0, policy="noeviction", used=5, keys=0, volatile=0)
    it.found_room(Room(10, None, memory))
    assert "valkey_spill_budget_limit_bytes" not in instruments
    it.found_room(Room(10, 20, memory))
    assert given(instruments, "budget_limit_bytes") == [(20, None)]
    assert given(instruments, "budget_used_bytes") == [(10, None)] * 2


def test_nothing_is_made_before_the_process_is_to_report(
    instruments: dict[str, Instrument],
) -> None:
    reporting = False
    it = Metrics(lambda: reporting)
    it.done("spill", "valkey", 1, 2, 3, 0.1)
    it.lost("missing", "valkey")
    it.looked(0)
    assert instruments == {}
    reporting = True
    it.lost("missing", "valkey")
    assert given(instruments, "lost_objects") == [(1, {"reason": "missing"})]


def test_metrics_that_fail_are_told_of_once_and_stop_nothing(
    instruments: dict[str, Instrument],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("Ray has changed")

    monkeypatch.setattr(metrics, "Counter", broken)
    it = Metrics(lambda: True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            it.done("spill", "valkey", 1, 2, 3, 0.1)
            it.failed("spill", ServerFullError("x"))
            it.lost("missing", "valkey")
    (record,) = caplog.records
    assert record.getMessage() == "metrics are not reported"
    assert len(given(instruments, "operation_seconds")) == 3


# --- names ---


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [definition.exported for definition in DEFINITIONS]
    assert len(set(names)) == len(names)
    for definition in DEFINITIONS:
        base = definition.exported.removesuffix("_total")
        assert base.startswith("ray_valkey_spill_")
        assert definition.exported.endswith("_total") == (definition.kind == "counter")
        for unit in ("bytes", "seconds", "objects"):
            assert (definition.unit == unit) <= base.endswith(unit)
        # Kubernetes and Ray have labels of their own.
        assert not {*definition.labels} & {"namespace", "node", "pod", "instance", "job"}


# --- a node's endpoint ---

SIZE = 4 * MIB
RAYS_OWN = {"SessionName", "NodeAddress", "WorkerId", "Component", "Version", "le"}


class Endpoint:
    """What a node's Prometheus endpoint has of ours."""

    def __init__(self) -> None:
        (node,) = ray.nodes()
        self._url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def families(self) -> dict[str, Metric]:
        """By name; none before Ray has started the endpoint, which it does after all else."""
        try:
            with urllib.request.urlopen(self._url, timeout=30) as reply:
                text = reply.read().decode()
        except OSError:
            return {}
        return {
            each.name + ("_total" if each.type == "counter" else ""): each
            for each in text_string_to_metric_families(text)
            if each.name.startswith("ray_valkey_spill_")
            # Of older Rays: each counter once more, as a gauge.
            and not each.documentation.startswith("(DEPRECATED")
        }

    def values(self, exported: str, **labels: str) -> list[float]:
        """Of all IO workers."""
        return values(self.families(), exported, **labels)

    def total(self, name: str, **labels: str) -> int:
        return int(sum(self.values(f"ray_valkey_spill_{name}", **labels)))

    def moved(self, operation: str, tier: str) -> tuple[int, int, int]:
        """Objects, logical bytes, stored bytes."""
        families = self.families()
        objects, logical, stored = (
            int(sum(values(families, f"ray_valkey_spill_{name}_total", **labels)))
            for name in ("objects", "logical_bytes", "stored_bytes")
            for labels in [{"operation": operation, "tier": tier}]
        )
        return objects, logical, stored

    def latest(self, name: str) -> float | None:
        return max(self.values(f"ray_valkey_spill_{name}"), default=None)


def values(families: dict[str, Metric], exported: str, **labels: str) -> list[float]:
    """Those of one metric, of all IO workers."""
    family = families.get(exported)
    return [
        sample.value
        for sample in (family.samples if family else ())
        if sample.name == exported
        and all(sample.labels[name] == value for name, value in labels.items())
    ]


@contextlib.contextmanager
def ray_that_reports(url: str, **params: Any) -> Iterator[Endpoint]:
    reporting = {"enable_metrics_collection": True, "metrics_report_interval_ms": 1000}
    with ray_with({**system_config(url, 2, **params), **reporting}):
        yield Endpoint()


def ids_in(overflow: Path) -> set[str]:
    return {path.name.split(".")[0] for path in overflow.rglob("*") if path.is_file()}


def read(refs: Sequence[ray.ObjectRef]) -> None:
    for number, ref in enumerate(refs):
        assert ray.get(ref, timeout=PATIENCE)[0] == number


@pytest.mark.slow
def test_a_nodes_endpoint_tells_what_the_server_and_the_overflow_hold(short_dir: Path) -> None:
    overflow, budget = short_dir / "overflow", 80 * MIB
    with (
        valkey_server(maxmemory="1gb") as server,
        ray_that_reports(server.url, max_bytes=budget, overflow_uri=str(overflow)) as endpoint,
    ):

        def on_server() -> tuple[int, ...]:
            return next(iter(usages(server).values()), (0, 0, 0))

        # Spilled: more than the budget has room for.
        data = np.random.default_rng(1).random(SIZE // 8)
        refs = []
        for number in range(50):
            data[0] = number
            refs.append(ray.put(data))
        read(refs)
        wait_until(lambda: endpoint.moved("spill", "valkey") == on_server() != (0, 0, 0))
        wait_until(lambda: endpoint.moved("spill", "overflow")[0] == len(files(overflow)) > 0)
        of_one = on_server()[1] // on_server()[0]
        in_overflow = files(overflow)
        logical, stored = len(in_overflow) * of_one, sum(in_overflow)
        assert endpoint.moved("spill", "overflow") == (len(in_overflow), logical, stored)

        # Restored, by both tiers; random bytes are stored as they are.
        for tier in ("valkey", "overflow"):
            wait_until(lambda tier=tier: endpoint.moved("restore", tier)[0] > 0)
            objects, logical, stored = endpoint.moved("restore", tier)
            assert logical == stored == objects * of_one

        # What is so.
        wait_until(lambda: endpoint.latest("budget_used_bytes") == on_server()[2])
        assert endpoint.latest("budget_limit_bytes") == budget
        assert endpoint.latest("server_maxmemory_bytes") == 1 << 30
        wait_until(lambda: (endpoint.latest("server_used_memory_bytes") or 0) > on_server()[1])
        wait_until(lambda: endpoint.latest("overflow_used_bytes") is not None)
        assert endpoint.latest("connected") == 1
        ((_, lease),) = server.client.zrange(Keyspace(ROOT).leases, 0, -1, withscores=True)
        wait_until(lambda: (endpoint.latest("lease_renewed_timestamp_seconds") or 0) > lease / 1000)

        # Lost.
        lost = next(ref for ref in refs if ref.hex() in server.spilled_ids())
        server.client.delete(server.header_of(lost.hex()), *server.keys_of(lost.hex()))
        with pytest.raises(ObjectLostError):
            ray.get(lost, timeout=PATIENCE)
        wait_until(lambda: endpoint.total("lost_objects_total", reason="missing") == 1)

        # Failed: a share that is gone for a while.
        away = next(ref for ref in refs if ref.hex() in ids_in(overflow))
        overflow.rename(short_dir / "elsewhere")
        pool = ThreadPoolExecutor(1)
        reader = pool.submit(ray.get, away, timeout=PATIENCE)
        wait_until(
            lambda: endpoint.total("failures_total", operation="restore", reason="overflow") > 0
        )
        (short_dir / "elsewhere").rename(overflow)
        assert reader.result() is not None
        pool.shutdown()

        # Broken connections: they are in use.
        breaks, stop = endpoint.total("connection_breaks_total"), threading.Event()

        def kill() -> None:
            while not stop.wait(0.005):
                server.client.client_kill_filter(_type="normal", skipme=True)

        killer = threading.Thread(target=kill)
        killer.start()
        for ref in refs:
            if ref != lost:
                ray.get(ref, timeout=PATIENCE)
        wait_until(lambda: endpoint.total("connection_breaks_total") > breaks)
        stop.set()
        killer.join()

        # Deleted, all but one.
        last = next(ref for ref in refs if ref != lost and ref.hex() in server.spilled_ids())
        del refs, ref, lost, away, reader
        wait_until(lambda: on_server()[0] == 1 and not files(overflow))

        # Reclaimed: its deletion is lost, as in a failover.
        of_last = [key for key in server.our_keys() if last.hex().encode() in key]
        names = Keyspace(ROOT)
        metadata = [names.index, names.usage, names.totals]
        before = {key: server.client.dump(key) for key in (*of_last, *metadata)}
        del last
        wait_until(lambda: on_server() == (0, 0, 0))
        for key, value in before.items():
            server.client.restore(key, 0, value, replace=True)
        wait_until(lambda: endpoint.total("reclaimed_objects_total", reason="unreferenced") == 1)
        assert endpoint.total("reclaimed_bytes_total", reason="unreferenced") > of_one
        # All that was ever spilled, also while the rest was read, and one of them twice.
        for tier, again in (("valkey", 1), ("overflow", 0)):
            wait_until(
                lambda tier=tier, again=again: (
                    endpoint.moved("delete", tier)[1]
                    == endpoint.moved("delete", tier)[0] * of_one
                    == (endpoint.moved("spill", tier)[0] + again) * of_one
                )
            )
        assert on_server() == (0, 0, 0)
        assert files(overflow) == []

        # All that is defined is there, and nothing else.
        families = endpoint.families()
        for definition in DEFINITIONS:
            family = families.pop(definition.exported)
            assert family.type == definition.kind
            for sample in family.samples:
                ours = {name for name in sample.labels if not name.startswith("otel_")} - RAYS_OWN
                assert ours == {*definition.labels}
                assert sample.labels["WorkerId"]
        assert families == {}
