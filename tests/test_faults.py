"""Faults of a real server in the middle of a put and of a fetch, and what comes of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support.faults import (
    PASSING,
    Fault,
    cannot_save,
    delays,
    flips_bits,
    forbids_get,
    forbids_set,
    forbids_unlink,
    has_foreign_values_under_our_keys,
    is_flushed,
    is_full,
    is_restarted_empty,
    loses_some_keys,
    refuses_connections,
    stalls,
    stands_still,
    trickles,
    wants_a_password,
)
from support.rigs import Rig
from support.servers import wait_until
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    LostObjectError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
    SpillError,
    UnconfirmedError,
)
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.protocol import connection

CHUNK = 256 << 10
DATA = np.random.default_rng(0).bytes(24 * CHUNK + 17)
OBJECT_ID = "ab" * 28


@dataclass
class Struck:
    """An object store, and what happens to it in the middle of a put and of a fetch."""

    rig: Rig
    store: Store
    _timers: list[threading.Timer] = field(default_factory=list)

    def close(self) -> None:
        for timer in self._timers:
            timer.join()
        self.store.close()

    def for_a_while(self, fault: Fault) -> Callable[[], None]:
        """What has `fault` strike, and mends it half a second later."""

        def strike() -> None:
            mend = self.struck(fault)
            self._timers.append(threading.Timer(0.5, mend))
            self._timers[-1].start()

        return strike

    def struck(self, fault: Fault) -> Callable[[], None]:
        """Have `fault` strike; returns what mends it."""
        fault_now = contextlib.ExitStack()
        fault_now.enter_context(fault(self.rig))
        return fault_now.close

    def put(self, strike: Callable[[], object] = lambda: None) -> str | SpillError:
        """The URL, or what kept the object from being put; `strike` comes in the middle."""
        with self._before(b"SET", strike):
            source = SourceObject(OBJECT_ID, b"PYTHON", b"owner", memoryview(DATA))
            urls, failure = self.store.put([source])
        assert bool(urls) == (failure is None)
        return failure or urls[0]

    def put_unharmed(self) -> str:
        url = self.put()
        assert isinstance(url, str), url
        return url

    def get(self, url: str, strike: Callable[[], object] = lambda: None) -> None:
        target = bytearray(len(DATA))
        with self._before(b"GET", strike):
            found = self.store.find(url, OBJECT_ID)
            self.store.fill(found, memoryview(target))
        assert target == DATA

    @contextlib.contextmanager
    def _before(self, command: bytes, strike: Callable[[], object]) -> Iterator[None]:
        """Have `strike` come before the eighth such command, and again in what is done anew."""

        def act() -> None:
            strike()
            self.rig.proxy.before(act, command, len(DATA) // CHUNK)

        self.rig.proxy.before(act, command, 8)
        yield
        self.rig.proxy.disarm()


@pytest.fixture
def patience() -> float:
    """`retry_timeout`: enough for what is mended half a second after it struck."""
    return 15


@pytest.fixture
def case(tmp_path: Path, patience: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Struck]:
    # On a busy machine the wire seems long, and a whole object could be under way.
    monkeypatch.setattr(connection, "LARGEST_WINDOW", connection.SMALLEST_WINDOW)
    with contextlib.closing(Rig(tmp_path / "data")) as rig:
        params = {"url": rig.proxy.url, "chunk_size": CHUNK, "retry_timeout": patience}
        store = Store(Config.load(params, {}), "session", "node")
        with contextlib.closing(Struck(rig, store)) as case:
            yield case


# --- what passes goes unnoticed ---


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.__name__)
def test_what_passes_goes_unnoticed(case: Struck, fault: Fault) -> None:
    url = case.put(case.for_a_while(fault))
    assert isinstance(url, str), url
    case.get(url, case.for_a_while(fault))
    case.store.delete([url])
    assert case.rig.our_keys() == []


@pytest.mark.parametrize("fault", [stalls, stands_still], ids=lambda fault: fault.__name__)
def test_a_server_that_stalls_is_noticed_by_a_timeout(
    case: Struck, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT", 0.2)
    url = case.put(case.for_a_while(fault))
    assert isinstance(url, str), url
    assert case.rig.proxy.connections > 1
    case.get(url, case.for_a_while(fault))
    case.store.delete([url])
    wait_until(lambda: case.rig.our_keys() == [])


def test_a_server_that_is_only_slow_is_no_stalled_one(case: Struck) -> None:
    for fault in (delays, trickles):
        with fault(case.rig):
            url = case.put_unharmed()
            case.get(url)
    assert case.rig.proxy.connections == 1


@pytest.mark.parametrize(
    "fault", [stalls, stands_still, refuses_connections], ids=lambda fault: fault.__name__
)
@pytest.mark.parametrize("patience", [1])
def test_a_put_that_was_given_up_leaves_nothing_once_the_server_is_back(
    case: Struck, fault: Fault
) -> None:
    mends: list[Callable[[], object]] = []
    assert isinstance(case.put(lambda: mends.append(case.struck(fault))), ServerUnavailableError)
    mends[0]()
    case.store.recover(is_alive=lambda pid: True)
    assert case.rig.our_keys() == []
    case.get(case.put_unharmed())


# --- what does not is told, and leaves nothing ---


@pytest.mark.parametrize("fault", [is_restarted_empty, is_flushed], ids=lambda f: f.__name__)
def test_data_destroyed_fail_the_put_and_lose_the_object(case: Struck, fault: Fault) -> None:
    # A server that was away meanwhile is tried once more, and strikes once more.
    failure = case.put(lambda: case.struck(fault))
    assert isinstance(failure, LostObjectError | UnconfirmedError)
    assert case.rig.our_keys() == []
    url = case.put_unharmed()
    with pytest.raises(LostObjectError):
        case.get(url, lambda: case.struck(fault))
    case.get(case.put_unharmed())


@pytest.mark.parametrize(
    "fault",
    [loses_some_keys, has_foreign_values_under_our_keys, flips_bits],
    ids=lambda fault: fault.__name__,
)
def test_damaged_objects_are_lost_and_removed_with_what_is_left(case: Struck, fault: Fault) -> None:
    url = case.put_unharmed()
    with pytest.raises(LostObjectError):
        case.get(url, lambda: case.struck(fault))
    case.store.delete([url])
    assert case.rig.our_keys() == []


REFUSALS = [
    (is_full, ServerFullError),
    (forbids_set, ServerRefusedError),
    (wants_a_password, ServerRefusedError),
    (cannot_save, ServerError),
]


@pytest.mark.parametrize(
    ("fault", "error"), REFUSALS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_refusal_fails_the_put_and_nothing_is_left_once_it_is_lifted(
    case: Struck, fault: Fault, error: type[SpillError]
) -> None:
    kept = case.put_unharmed()
    before = case.rig.data_keys()
    mends: list[Callable[[], object]] = []
    assert isinstance(case.put(lambda: mends.append(case.struck(fault))), error)
    mends[0]()
    case.store.recover(is_alive=lambda pid: True)
    assert case.rig.data_keys() == before
    assert case.rig.client.zcard(case.store.keys.pending) == 0
    case.get(kept)
    other = case.put_unharmed()
    case.get(other)
    case.store.delete([kept, other])
    assert case.rig.our_keys() == []


def test_a_refusal_of_reads_is_no_loss(case: Struck) -> None:
    url = case.put_unharmed()
    with forbids_get(case.rig), pytest.raises(ServerRefusedError, match="NOPERM"):
        case.get(url)
    mends: list[Callable[[], object]] = []
    with pytest.raises(ServerRefusedError, match="NOPERM"):
        case.get(url, lambda: mends.append(case.struck(forbids_get)))
    mends[0]()
    case.get(url)


def test_a_refusal_of_deletes_is_made_up_for(case: Struck) -> None:
    url = case.put_unharmed()
    keys = case.rig.our_keys()
    with forbids_unlink(case.rig), pytest.raises(ServerRefusedError, match="NOPERM"):
        case.store.delete([url])
    # Until then the metadata know of it, whoever else is to remove it.
    assert case.rig.our_keys() == keys
    assert case.rig.client.zcard(case.store.keys.index) == 1
    case.store.delete_again([url])
    assert case.rig.our_keys() == []
