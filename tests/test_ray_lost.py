"""Data that are gone or damaged are ObjectLostError for every getter, and wedge nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError
from support.clusters import MIB, expect_no_keys, local_ray, spill
from support.servers import PATIENCE, Server, valkey_server

from ray_valkey_spill.format.header import FORMAT_VERSION


@pytest.fixture(scope="module")
def spilling() -> Iterator[Server]:
    with valkey_server() as server:
        server.settle_foreign()
        with local_ray(server.url):
            yield server
            # Once for all tests: Ray takes ten seconds to let go of an object that was lost.
            expect_no_keys(server)


def chunk_deleted(server: Server, object_id: str) -> None:
    server.client.delete(server.keys_of(object_id)[2])


def chunk_truncated(server: Server, object_id: str) -> None:
    key = server.keys_of(object_id)[2]
    server.client.set(key, server.client.get(key)[:-1])


def bit_flipped(server: Server, object_id: str) -> None:
    key = server.keys_of(object_id)[2]
    value = bytearray(server.client.get(key))
    value[1000] ^= 16
    server.client.set(key, bytes(value))


def header_deleted(server: Server, object_id: str) -> None:
    server.client.delete(server.header_of(object_id))


def header_bit_flipped(server: Server, object_id: str) -> None:
    key = server.header_of(object_id)
    value = bytearray(server.client.get(key))
    value[200] ^= 16
    server.client.set(key, bytes(value))


def header_of_a_newer_version(server: Server, object_id: str) -> None:
    key = server.header_of(object_id)
    value = bytearray(server.client.get(key))
    value[-16:-14] = (FORMAT_VERSION + 1).to_bytes(2, "little")
    server.client.set(key, bytes(value))


def everything_flushed(server: Server, object_id: str) -> None:
    server.settle_foreign()


DAMAGES = [
    chunk_deleted,
    chunk_truncated,
    bit_flipped,
    header_deleted,
    header_bit_flipped,
    header_of_a_newer_version,
    everything_flushed,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_data_are_object_lost_error_for_every_getter(
    spilling: Server, damage: Callable[[Server, str], None]
) -> None:
    @ray.remote(max_retries=0)
    def total(array: np.ndarray) -> float:
        return float(array.sum())

    ref = ray.put(np.random.default_rng(1).random(MIB))
    spill([ref], spilling)
    damage(spilling, ref.hex())
    with pytest.raises(ObjectLostError):
        ray.get(total.remote(ref), timeout=PATIENCE)
    for _ in range(2):
        with pytest.raises(ObjectLostError):
            ray.get(ref, timeout=PATIENCE)
    assert ray.wait([ref], timeout=PATIENCE)[0] == [ref]
    # And everything else goes on.
    other = ray.put(np.arange(MIB))
    spill([other], spilling)
    assert int(ray.get(other, timeout=PATIENCE)[-1]) == MIB - 1


def test_a_small_object_that_is_damaged_is_lost_as_well(spilling: Server) -> None:
    ref = ray.put(b"x" * 1000)
    spill([ref], spilling)
    key = spilling.header_of(ref.hex())
    value = bytearray(spilling.client.get(key))
    value[-100] ^= 1  # in the payload, which lies between stream and trailer
    spilling.client.set(key, bytes(value))
    with pytest.raises(ObjectLostError):
        ray.get(ref, timeout=PATIENCE)


def test_lines_in_the_logs_of_io_workers_have_time_level_and_logger(spilling: Server) -> None:
    lost = ray.put(np.full(MIB, 7))
    spill([lost], spilling)
    header_deleted(spilling, lost.hex())
    with pytest.raises(ObjectLostError):
        ray.get(lost, timeout=PATIENCE)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    lines = [
        line
        for file in logs.iterdir()
        if file.is_file()
        for line in file.read_text(errors="replace").splitlines()
        if lost.hex() in line and "ObjectLostError for a reader" in line
    ]
    assert len(lines) == 1
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.match(rf"{time}\tERROR ray_valkey_spill -- ObjectLostError for a reader", lines[0])
