"""One object that is many times larger than what an IO worker may take for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import ray
from support.clusters import MIB, expect_no_keys, io_workers, local_ray
from support.servers import PATIENCE, Server, valkey_server

# What an IO worker may grow by, whatever the object's size.
ALLOWANCE = 64 * MIB


@pytest.fixture(scope="module")
def spilling() -> Iterator[tuple[Server, dict[int, int]]]:
    """A server, and what each IO worker takes that has moved small objects, by process id."""
    with valkey_server() as server, local_ray(server.url, object_store=950 * MIB, io_workers=2):
        server.settle_foreign()
        data = np.random.default_rng(4).random(20 * MIB // 8)
        refs = [ray.put(data) for _ in range(50)]
        ray.get(refs[0])
        idle = {process.pid: private_memory(process) for process in io_workers()}
        assert idle
        del refs
        expect_no_keys(server)
        yield server, idle


@pytest.mark.slow
@pytest.mark.parametrize("compressible", [False, True])
def test_three_quarters_of_a_gibibyte_in_bounded_memory(
    spilling: tuple[Server, dict[int, int]], compressible: bool
) -> None:
    server, idle = spilling
    random = np.random.default_rng(4)
    count = 768 * MIB // 8
    value = random.integers(0, 1000, count) if compressible else random.random(count)
    with most_memory([*idle]) as most:
        ref = ray.put(value)
        second = ray.put(np.zeros(500 * MIB, np.uint8))  # there is no room for both
        assert ref.hex() in server.spilled_ids()
        del second
        got = ray.get(ref, timeout=PATIENCE)
    assert np.array_equal(got, value)
    assert most.keys() == idle.keys()
    for pid, memory in most.items():
        assert memory - idle[pid] <= ALLOWANCE
    del ref, got
    expect_no_keys(server)


@contextlib.contextmanager
def most_memory(pids: list[int]) -> Iterator[dict[int, int]]:
    """The most that each process has of its own in the meantime, by process id."""
    processes = [psutil.Process(pid) for pid in pids]
    most: dict[int, int] = {}
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.01):
            for process in processes:
                most[process.pid] = max(private_memory(process), most.get(process.pid, 0))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield most
        finally:
            is_over.set()
            looking.result()


def private_memory(process: psutil.Process) -> int:
    """Bytes that are the process's own; plasma's shared pages are not."""
    info = process.memory_info()
    return int(info.rss - info.shared)
