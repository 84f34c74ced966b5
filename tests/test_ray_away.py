"""What is away holds up only what needs it, and drivers hear what waits for what."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from support.clusters import (
    MIB,
    OBJECT_STORE,
    RETRIED_SOON,
    io_workers,
    kill,
    local_ray,
    spill,
    starting_ray,
    system_config,
    title,
)
from support.proxy import Proxy, proxy_to
from support.servers import PATIENCE, Server, valkey_server, wait_until
from support.session_files import shared_files

SIZE = MIB // 4
MANY = 40


def value(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, SIZE, np.uint8)


def put(numbers: range) -> list[Any]:
    return [ray.put(value(number)) for number in numbers]


def assert_equal(refs: list[Any], numbers: range) -> None:
    for ref, number in zip(refs, numbers):
        assert (ray.get(ref, timeout=PATIENCE) == value(number)).all()


@ray.remote(num_cpus=0)
def count(*arrays: np.ndarray) -> int:
    """Waits until all its arguments are in plasma."""
    return len(arrays)


def is_done(result: Any) -> bool:
    return bool(ray.wait([result], timeout=0)[0])


def session_dir() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path())


def restore_workers() -> list[int]:
    return [process.pid for process in io_workers() if "RestoreWorker" in title(process)]


def deferred() -> dict[str, int]:
    """The ids of the objects whose restore is deferred, and the processes that have them."""
    found = {}
    for path in shared_files(session_dir()).glob("*.restores/*"):
        # Others are being written, or given up.
        if not path.suffix:
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = int(path.read_text().split()[0])
    return found


def push_out() -> None:
    """Fill the object store, so that what is spilled is in plasma no more."""
    fill_until(lambda: False)


def fill_until(condition: Callable[[], bool]) -> None:
    """Put objects until `condition` holds, or twice what the object store has room for."""
    filler: list[Any] = []
    for number in range(2 * OBJECT_STORE // (4 * MIB)):
        filler.append(ray.put(np.full(4 * MIB, number, np.uint8)))
        if condition():
            return


def spilled_to(overflow: Path, refs: list[Any]) -> bool:
    names = [path.name for path in overflow.rglob("*") if path.is_file()]
    return all(any(name.startswith(ref.hex()) for name in names) for ref in refs)


class Tiers:
    """A Ray that spills to Valkey through a proxy, and to a directory, and objects in both.

    The refs in `near` are in Valkey, those in `far` in the overflow.
    """

    def __init__(self, server: Server, proxy: Proxy, overflow: Path) -> None:
        self.server, self.proxy, self.overflow = server, proxy, overflow
        self.near = put(range(10))
        spill(self.near, server)
        server.client.config_set("maxmemory", 1)  # full
        self.far = put(range(100, 100 + MANY))
        fill_until(lambda: spilled_to(overflow, self.far))
        assert spilled_to(overflow, self.far)
        server.client.config_set("maxmemory", 0)
        wait_until(lambda: not deferred())


@pytest.fixture(scope="class")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiers]:
    overflow = tmp_path_factory.mktemp("overflow")
    with (
        valkey_server() as server,
        proxy_to(server.port) as proxy,
        local_ray(proxy.url, io_workers=2, overflow_uri=str(overflow)),
    ):
        yield Tiers(server, proxy, overflow)


@contextlib.contextmanager
def unmounted(directory: Path) -> Iterator[None]:
    elsewhere = directory.with_name(f"{directory.name}-elsewhere")
    directory.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(directory)


@contextlib.contextmanager
def refusing(proxy: Proxy) -> Iterator[None]:
    proxy.refusing = True
    proxy.reset()
    try:
        yield
    finally:
        proxy.refusing = False


class TestOneTierIsAway:
    def test_the_overflow(self, tiers: Tiers) -> None:
        push_out()
        with unmounted(tiers.overflow):
            waiting = count.remote(*tiers.far)
            # Far more than there are restore workers; the rest may still be in plasma.
            wait_until(lambda: len(deferred()) > MANY // 2)
            assert_equal(tiers.near, range(10))
            assert not is_done(waiting)
        assert ray.get(waiting, timeout=PATIENCE) == MANY
        assert_equal(tiers.far, range(100, 100 + MANY))
        wait_until(lambda: not deferred())

    def test_valkey(self, tiers: Tiers) -> None:
        push_out()
        with refusing(tiers.proxy):
            waiting = count.remote(*tiers.near)
            wait_until(lambda: len(deferred()) > len(tiers.near) // 2)
            assert_equal(tiers.far, range(100, 100 + MANY))
            assert not is_done(waiting)
        assert ray.get(waiting, timeout=PATIENCE) == len(tiers.near)
        assert_equal(tiers.near, range(10))

    def test_killed_io_workers_leave_what_they_had_deferred_to_others(self, tiers: Tiers) -> None:
        push_out()
        with unmounted(tiers.overflow):
            waiting = count.remote(*tiers.far)
            wait_until(lambda: len(deferred()) > MANY // 2)
            found = deferred()
            killed = {*found.values()}
            for pid in killed:
                kill(pid)
            wait_until(lambda: {*found} <= {*deferred()} and not killed & {*deferred().values()})
            # One that spills could wait for room that only it can make.
            assert {*deferred().values()} <= {*restore_workers()}
        assert ray.get(waiting, timeout=PATIENCE) == MANY
        wait_until(lambda: not deferred())

    def test_an_object_that_is_deleted_is_waited_for_no_more(self, tiers: Tiers) -> None:
        refs = put(range(200, 202))
        spill(refs, tiers.server)
        push_out()
        with refusing(tiers.proxy):
            wait_until(lambda: ray.wait(refs, timeout=0.5) and deferred())
            refs.clear()
        wait_until(lambda: not deferred())

    def test_an_object_that_came_back_another_way_is_waited_for_no_more(self, tiers: Tiers) -> None:
        refs = put(range(300, 301))
        worker = ray._private.worker.global_worker.core_worker
        ((data, metadata, *_),) = worker.get_if_local(refs)
        copy = bytes(data)
        del data
        spill(refs, tiers.server)
        push_out()
        with refusing(tiers.proxy):
            waiting = count.remote(*refs)
            wait_until(lambda: refs[0].hex() in deferred())
            # As if another node had sent it.
            worker.put_file_like_object(metadata, len(copy), io.BytesIO(copy), refs[0], b"")
            assert ray.get(waiting, timeout=PATIENCE) == 1
        wait_until(lambda: not deferred())


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


def test_an_object_that_is_sealed_with_a_key_that_the_node_lacks_holds_up_only_its_own_readers(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    old, new = new_key(), new_key()

    def write(*lines: str) -> None:
        (tmp_path / "new").write_text("\n".join(lines) + "\n")
        (tmp_path / "new").replace(keys)

    write(old)
    with (
        valkey_server() as server,
        local_ray(server.url, io_workers=2, encryption_key_file=str(keys)),
    ):
        before = put(range(MANY))
        spill(before, server)
        write(new)
        after = put(range(100, 110))
        spill(after, server)
        push_out()
        waiting = count.remote(*before)
        wait_until(lambda: len(deferred()) > MANY // 2)
        assert_equal(after, range(100, 110))
        assert not is_done(waiting)
        write(new, old)
        assert ray.get(waiting, timeout=PATIENCE) == MANY
        assert_equal(before, range(MANY))


# --- what drivers hear ---

HEARING = """
refs = [ray.put(np.random.default_rng(i).random(1 << 17)) for i in range(15)]
more = [ray.put(np.full(1 << 18, i, np.uint64)) for i in range(100)]
print("put", flush=True)
for line in sys.stdin:
    try:
        exec(line)
    except Exception as error:
        print("raised", type(error).__name__, flush=True)
    print("done", line, flush=True)
ray.shutdown()
"""


class Driver:
    """A driver in a process of its own, which does what it is sent, and what it prints."""

    def __init__(self, url: str, **params: Any) -> None:
        seen = {"log_to_driver": True, "logging_level": "INFO"}
        script = starting_ray({**system_config(url, **params), **RETRIED_SOON}, **seen) + HEARING
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def heard(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()


def test_lost_objects_give_one_message_that_says_where_they_were_and_why_usually() -> None:
    with valkey_server() as server, Driver(server.url) as driver:
        wait_until(lambda: driver.heard("^put"))
        wait_until(lambda: len(server.spilled_ids()) > 40)
        server.flush()
        for number in range(15):
            driver.send(f"ray.get(refs[{number}])")
        wait_until(lambda: driver.heard("spilled objects? (is|are) missing from Valkey"))
        wait_until(lambda: len(driver.heard("^done")) == 15)
        (message,) = driver.heard("spilled objects? (is|are) missing from")
        assert f"Valkey at {server.url}" in message
        assert "FLUSHALL" in message
        assert driver.heard("^raised ObjectLostError")


def test_a_driver_hears_of_an_outage_before_retry_timeout_and_when_it_is_over() -> None:
    with (
        valkey_server() as server,
        proxy_to(server.port) as proxy,
        Driver(proxy.url, retry_timeout=600) as driver,
    ):
        wait_until(lambda: driver.heard("^put"))
        with refusing(proxy):
            driver.send("more += [ray.put(np.full(1 << 18, i, np.uint64)) for i in range(100)]")
            wait_until(lambda: driver.heard("spills wait for Valkey"))
        wait_until(lambda: driver.heard("Valkey can be used again, after"))
        wait_until(lambda: driver.heard("^done"))
        assert len(driver.heard("wait for Valkey")) == 1
        assert len(driver.heard("can be used again")) == 1


def test_restores_that_break_off_half_way_again_and_again_are_reported() -> None:
    with (
        valkey_server() as server,
        proxy_to(server.port) as proxy,
        Driver(proxy.url, chunk_size=4 * MIB) as driver,
    ):
        wait_until(lambda: driver.heard("^put"))
        driver.send("big = ray.put(np.random.default_rng(1).random(3 << 20))")
        driver.send("more = [ray.put(np.full(1 << 18, i, np.uint64)) for i in range(150)]")
        wait_until(lambda: len(driver.heard("^done")) == 2)
        # Less than a chunk, as the limit of a server or a proxy can be.
        proxy.to_client.most = 1 * MIB
        driver.send("ray.get(big)")
        wait_until(lambda: driver.heard("restores wait for uninterrupted reads"))
        (message,) = driver.heard("restores wait for uninterrupted reads")
        assert "client-output-buffer-limit" in message
        proxy.to_client.most = None
        wait_until(lambda: len(driver.heard("^done")) == 3)
        assert not driver.heard("^raised")
