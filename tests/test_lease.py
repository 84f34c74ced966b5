"""A node's lease is renewed whatever else its background work is at."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray._private.node import Node
from support.servers import Server, wait_until
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace, ObjectName, new_attempt
from ray_valkey_spill.plugin.storage import ValkeyStorage
from ray_valkey_spill.tiers.ledger import Ledger, link_to

pytestmark = pytest.mark.usefixtures("no_thread_left")

SESSION, NODE = "session", "node"
GCS = "127.0.0.1:1"


class Lease:
    """The one lease on a server, past the store."""

    def __init__(self, server: Server, keys: Keyspace) -> None:
        self._client = server.client
        self._key = keys.leases

    def renewed(self) -> float:
        found = self._client.zrange(self._key, 0, -1, withscores=True)
        return max((float(score) for _, score in found), default=0.0)

    def age(self) -> float:
        """Let it have been renewed a minute before; returns when that was."""
        for member in self._client.zrange(self._key, 0, -1):
            self._client.zincrby(self._key, -60_000, member)
        return self.renewed()


def test_the_lease_can_be_renewed_while_half_written_objects_are_removed(server: Server) -> None:
    config = Config.load({"url": server.url}, {})
    names = [ObjectName(SESSION, NODE, f"{i:056x}", new_attempt(), 1) for i in range(1500)]
    renewals = 0
    with (
        contextlib.closing(Store(config, SESSION, NODE)) as store,
        contextlib.closing(link_to(config)) as link,
        ThreadPoolExecutor(1) as third_thread,
    ):
        lease = Lease(server, store.keys)
        store.renew_lease(GCS, lambda: False)
        link.execute(*Ledger(link, store.keys).registrations(names))

        def is_alive(pid: int) -> bool:
            """Every so often, and before the last object is removed."""
            nonlocal asked, renewals
            asked += 1
            if asked % 500 == 0:
                before = lease.age()
                third_thread.submit(store.keep_lease, GCS, lambda: False).result()
                renewals += lease.renewed() > before
            return False

        asked = 0
        assert store.recover(is_alive) == len(names)
        assert renewals == asked // 500 >= 6
        store.destroy(lambda pid: False)
        assert server.our_keys() == []


class HeadNode(Node):
    """Stands in for a node of Ray's, which alone knows the session's directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def session_name(self) -> str:
        return SESSION

    def get_session_dir_path(self) -> str:
        return str(self._directory)

    def validate_external_storage(self, **params: Any) -> ValkeyStorage:
        return ValkeyStorage(NODE, SESSION, **params)


@pytest.mark.slow
def test_the_lease_is_renewed_while_recovery_is_stuck(server: Server, tmp_path: Path) -> None:
    directory = tmp_path
    # What a dead IO worker seems to have left cannot be read before this test writes to it.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    os.mkfifo(directory / f"ray_valkey_spill-{NODE}-{dead.pid}-abcd.deletions")
    storage = HeadNode(directory).validate_external_storage(url=server.url)
    lease = Lease(server, Keyspace.of(Config.load({"url": server.url}, {})))
    try:
        storage.restore_spilled_objects([], [])
        wait_until(lambda: list(directory.glob(f"*-{os.getpid()}-*.deletions")))
        (taken,) = directory.glob("*.deletions")
        for _ in range(2):
            before = lease.age()
            assert before > 0
            wait_until(lambda: lease.renewed() > before)  # noqa: B023
        assert taken.exists()
    finally:
        for fifo in directory.glob("*.deletions"):
            wait_until(lambda: _opened(fifo))  # noqa: B023
        storage.destroy_external_storage()
    assert server.our_keys() == []


def _opened(fifo: Path) -> bool:
    """Let the reader of `fifo`, if there is one, find it empty."""
    with contextlib.suppress(OSError):
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return True
    return not fifo.exists()
