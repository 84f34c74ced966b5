"""A node's lease is renewed whatever else its background work is at."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.io_worker import io_workers
from support.servers import Server, wait_until
from support.session_files import shared_files
from support.stores import Lease, Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace, ObjectName
from ray_valkey_spill.tiers.ledger import Ledger, link_to

pytestmark = pytest.mark.usefixtures("no_thread_left")

SESSION, NODE = "session", "node"
GCS = "127.0.0.1:1"


def test_the_lease_can_be_renewed_while_half_written_objects_are_removed(server: Server) -> None:
    config = Config.load({"url": server.url}, {})
    # Of another process: this one knows what it has under way.
    attempts = [f"{1:011x}{4711:08x}{i:08x}" for i in range(1500)]
    names = [ObjectName(SESSION, NODE, f"{i:056x}", a, 1) for i, a in enumerate(attempts)]
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


def test_a_lease_that_is_taken_just_after_the_node_was_destroyed_is_ended(server: Server) -> None:
    config = Config.load({"url": server.url}, {})
    looks = iter([False, True, True])
    with contextlib.closing(Store(config, SESSION, NODE)) as store:
        store.renew_lease(GCS, lambda: next(looks))
        assert server.our_keys() == []
        store.renew_lease(GCS, lambda: next(looks))
        assert server.our_keys() == []
    assert next(looks, None) is None


@pytest.mark.slow
def test_the_lease_is_renewed_while_recovery_is_stuck(server: Server, tmp_path: Path) -> None:
    directory = shared_files(tmp_path)
    # What a dead IO worker seems to have left cannot be read before this test writes to it.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    os.mkfifo(directory / f"{NODE}-{dead.pid}-abcd.deletions")
    lease = Lease(server, Keyspace.of(Config.load({"url": server.url}, {})))
    with io_workers(1, tmp_path, NODE, {"url": server.url}) as (worker,):
        wait_until(lambda: list(directory.glob(f"*-{worker.process.pid}-*.deletions")))
        (taken,) = directory.glob("*.deletions")
        for _ in range(2):
            before = lease.age()
            assert before > 0
            wait_until(lambda: lease.renewed() > before)  # noqa: B023
        assert taken.exists()
    lease.remove()
    assert server.our_keys() == []
