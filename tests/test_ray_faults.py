"""A server that is full or away: Ray waits, is told why, and goes on once it is back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from support.clusters import (
    MIB,
    RETRIED_SOON,
    failures,
    io_workers,
    kill,
    local_ray,
    ray_with,
    spill,
    starting_ray,
    system_config,
    talks_to,
)
from support.faults import forbids_unlink
from support.proxy import Proxy, proxy_to
from support.rigs import Rig
from support.servers import INDEX, PATIENCE, ROOT, Server, valkey_server, wait_until

from ray_valkey_spill.format.names import Entry


def take_away(proxy: Proxy) -> None:
    proxy.refusing = True
    proxy.reset()


FILLING = """
import pathlib, threading, time, valkey

def make_room():
    session = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
    while not any('"heard": true' in path.read_text()
                  for path in session.glob("ray_valkey_spill/*.outages")):
        time.sleep(0.1)
    time.sleep(3)  # for more attempts, of which nothing is to be heard
    print("room", flush=True)
    valkey.from_url(sys.argv[1]).config_set("maxmemory", 0)

threading.Thread(target=make_room).start()
data = np.random.default_rng(0)
refs = [ray.put(data.random(1 << 20)) for i in range(40)]
print("all put", flush=True)
data = np.random.default_rng(0)
assert all((ray.get(ref) == data.random(1 << 20)).all() for ref in refs)
print("all equal", flush=True)
ray.shutdown()
"""


STEPS_OF_FILLING = ["room", "all put", "all equal"]


def test_a_full_server_holds_puts_up_tells_why_and_lets_them_go_on() -> None:
    with valkey_server(maxmemory="60mb") as server:
        # As a user has it, to see what is told.
        told_all = {"log_to_driver": True, "logging_level": "INFO"}
        script = starting_ray(system_config(server.url), **told_all) + FILLING
        result = subprocess.run(
            [sys.executable, "-c", script, server.url],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        said = (result.stdout + result.stderr).split("\n")
        assert [s for s in said if s in STEPS_OF_FILLING] == STEPS_OF_FILLING
        (told,) = (line for line in said if "spills wait for room in Valkey" in line)
        assert "OOM" in told
        assert "maxmemory" in told
        assert "Traceback" not in result.stderr
        assert server.our_keys() == []


@pytest.fixture(scope="class")
def _server_and_proxy() -> Iterator[tuple[Server, Proxy]]:
    with valkey_server() as server, proxy_to(server.port) as proxy:
        with local_ray(proxy.url, io_workers=2, retry_timeout=0.5):
            yield server, proxy
        assert server.our_keys() == []


@pytest.fixture
def server(_server_and_proxy: tuple[Server, Proxy]) -> Server:
    # Nothing of the test before is under way or counts.
    wait_until(lambda: _server_and_proxy[0].spilled_keys() == [])
    wait_until(lambda: failures() == 0)
    return _server_and_proxy[0]


@pytest.fixture
def proxy(_server_and_proxy: tuple[Server, Proxy]) -> Iterator[Proxy]:
    yield _server_and_proxy[1]
    _server_and_proxy[1].refusing = False


class TestAway:
    """With a Ray that gives its server half a second to come back."""

    @pytest.mark.parametrize("size", [8 * MIB, 1000], ids=["chunked", "inline"])
    def test_a_server_that_is_away_for_longer_than_retry_timeout_is_waited_for(
        self, server: Server, proxy: Proxy, size: int
    ) -> None:
        refs = [ray.put(np.full(size, i, np.uint8)) for i in range(3)]
        spill(refs, server)

        @ray.remote
        def first(array: np.ndarray) -> int:
            return int(array[0])

        take_away(proxy)
        results = [first.remote(ref) for ref in refs]
        wait_until(lambda: failures() > 5)
        assert ray.wait(results, num_returns=3, timeout=0)[0] == []
        proxy.refusing = False
        # Ray's own retries would be minutes away by now.
        assert ray.get(results, timeout=PATIENCE) == [0, 1, 2]

    def test_what_a_failover_has_made_pending_again_stays(self, server: Server) -> None:
        """It has lost the last command of a spill alone: all values are there."""
        refs = [ray.put(np.full(MIB, i, np.uint8)) for i in range(3)]
        spill(refs, server)
        ids = {ref.hex().encode() for ref in refs}
        members = [m for m in server.client.zrange(INDEX, 0, -1) if m.split(b":")[2][:56] in ids]
        pending, usage, totals = (
            f"{ROOT}{{default}}:{each}" for each in ("pending", "usage", "totals")
        )
        with server.client.pipeline() as together:
            for member in members:
                together.zrem(INDEX, member)
                together.zadd(pending, {str(Entry.parse(member.decode()).name): 0})
            together.delete(usage, totals)
            together.execute()
        wait_until(lambda: {*members} <= {*server.client.zrange(INDEX, 0, -1)})
        wait_until(lambda: not server.client.exists(pending))
        assert [int(ray.get(ref)[0]) for ref in refs] == [0, 1, 2]

    def test_what_could_not_be_deleted_is_deleted_once_the_server_is_back(
        self, server: Server, proxy: Proxy
    ) -> None:
        refs = [ray.put(np.full(MIB, i)) for i in range(20)]
        spill(refs[:5], server)
        take_away(proxy)
        del refs
        wait_until(lambda: failures() > 0)
        proxy.refusing = False
        wait_until(lambda: server.spilled_keys() == [])


def test_deletions_that_failed_outlive_their_io_worker(tmp_path: Path) -> None:
    with contextlib.closing(Rig(tmp_path / "data")) as rig, local_ray(rig.proxy.url, io_workers=2):
        refs = [ray.put(np.full(MIB, i)) for i in range(30)]
        with forbids_unlink(rig):
            del refs
            wait_until(lambda: failures() > 0)
            for worker in io_workers():
                # One that is still starting would cost a minute.
                if talks_to(worker, rig.proxy.port):
                    kill(worker.pid)
        refs = [ray.put(np.full(MIB, i)) for i in range(20)]
        assert [int(ray.get(ref)[0]) for ref in refs] == list(range(20))
        del refs
        wait_until(lambda: rig.spilled_keys() == [])


# Put into IO workers: at each step they are killed, once.
KILLER = """
import os, pathlib, signal, sys

def kill_once(step, note=""):
    try:
        with pathlib.Path(os.environ["KILLED"], step).open("x") as file:
            file.write(note)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

def before_and_after(owner, name):
    method = getattr(owner, name)
    def stepwise(self, *args, **options):
        kill_once(f"before {name}")
        result = method(self, *args, **options)
        # Of a batch: what it has settled, of which Ray will never hear.
        kill_once(f"after {name}", " ".join(map(str, getattr(self, "stored", []))))
        return result
    setattr(owner, name, stepwise)

def in_the_middle(owner, name, after):
    method = getattr(owner, name)
    def stepwise(self, *args, **options):
        for number, item in enumerate(method(self, *args, **options)):
            if number == after:
                kill_once(f"in the middle of {name}")
            yield item
    setattr(owner, name, stepwise)

if any("SPILL_WORKER" in argument or "RESTORE_WORKER" in argument for argument in sys.orig_argv):
    from ray_valkey_spill.store.object_store import ObjectStore
    from ray_valkey_spill.format.packing import Packer
    from ray_valkey_spill.store.spill import Batch
    from ray_valkey_spill.tiers.valkey import ValkeyTier

    before_and_after(Batch, "write")
    in_the_middle(Packer, "pack", 3)
    before_and_after(Batch, "commit")
    before_and_after(ValkeyTier, "remove")
    in_the_middle(ObjectStore, "find_all", 0)
    before_and_after(ValkeyTier, "read")
    before_and_after(ObjectStore, "fill")
"""
STEPS = {
    *(f"{when} {name}" for when in ("before", "after")
      for name in ("write", "commit", "remove", "read", "fill")),
    *(f"in the middle of {name}" for name in ("pack", "find_all")),
}  # fmt: skip


def entries(server: Server) -> set[str]:
    return {member.decode() for member in server.client.zrange(INDEX, 0, -1)}


def settled_by_the_killed(killed: Path) -> set[str]:
    """What IO workers had settled when they were killed before they could answer Ray."""
    note = killed / "after commit"
    return set(note.read_text().split()) if note.exists() else set()


@pytest.mark.slow
def test_io_workers_killed_at_every_step_lose_and_wedge_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("KILLED", str(killed))
    with valkey_server() as server:
        with ray_with({**system_config(server.url, 2), **RETRIED_SOON}):
            unheard_of: set[str] = set()
            while {path.name for path in killed.iterdir()} < STEPS:
                refs = [ray.put(np.full(MIB // 2, i)) for i in range(50)]
                assert [int(ray.get(ref, timeout=PATIENCE)[-1]) for ref in refs] == list(range(50))
                unheard_of |= entries(server) & settled_by_the_killed(killed)
                del refs
            # Ray has spilled those objects again. Of these copies only their owner can tell that
            # nobody needs them, after half a minute, and once more.
            assert unheard_of
            wait_until(lambda: server.spilled_keys() == [])
        assert server.our_keys() == []
