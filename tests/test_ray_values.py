"""Every kind of value that Ray can spill comes back as it was, and leaves nothing behind."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
from support.clusters import MIB, expect_no_keys, local_ray, spill
from support.servers import PATIENCE, Server, valkey_server

from ray_valkey_spill.format.packing import INLINE_LIMIT

CHUNK = 1_000_000


@pytest.fixture(scope="module")
def spilling() -> Iterator[Server]:
    with valkey_server() as server:
        server.settle_foreign()
        with local_ray(server.url, chunk_size=CHUNK):
            yield server
        assert server.our_keys() == []
        server.assert_foreign_untouched()


def roundtrip(server: Server, *values: Any) -> list[Any]:
    refs = [ray.put(value) for value in values]
    spill(refs, server)
    got = ray.get(refs, timeout=PATIENCE)
    del refs
    expect_no_keys(server)
    return got


def test_bytes_around_every_boundary(spilling: Server) -> None:
    sizes = [0, 1, 2, 100_000]
    for boundary in (INLINE_LIMIT, CHUNK, 2 * CHUNK):
        sizes += [boundary - 1, boundary, boundary + 1]
    random = np.random.default_rng(1)
    values = [make(size) for size in sizes for make in (random.bytes, bytes)]
    assert roundtrip(spilling, *values) == values


def test_values_without_data(spilling: Server) -> None:
    assert roundtrip(spilling, None, b"", "", (), {}, np.zeros(0).tobytes()) == [
        *(None, b"", "", (), {}, b"")
    ]


def test_fifty_megabytes(spilling: Server) -> None:
    value = np.random.default_rng(2).random(50 * MIB // 8)
    (got,) = roundtrip(spilling, value)
    assert got.tobytes() == value.tobytes()


ARRAYS: list[Callable[[], np.ndarray]] = [
    lambda: np.arange(300_000) % 2 == 0,
    lambda: np.arange(300_000, dtype=np.int8),
    lambda: np.arange(300_000, dtype=np.uint64),
    lambda: np.random.default_rng(3).random(300_000).astype(np.float16),
    lambda: np.random.default_rng(3).random(300_000),
    lambda: np.random.default_rng(3).random(300_000) * 1j,
    lambda: np.arange(300_000).astype("m8[s]"),
    lambda: np.arange(300_000).astype("M8[us]"),
    lambda: np.array([b"%d" % i for i in range(50_000)]),
    lambda: np.array([f"é{i}" for i in range(50_000)]),
    lambda: np.array([{"a": i} for i in range(50_000)], dtype=object),
    lambda: np.zeros(50_000, dtype=[("a", "i4"), ("b", "f8"), ("c", "S3")]),
    lambda: np.arange(300_000, dtype=">i4"),
    lambda: np.asfortranarray(np.arange(300_000.0).reshape(300, 1000)),
    lambda: np.arange(600_000)[::2],
]


def test_numpy_of_every_kind(spilling: Server) -> None:
    values = [make() for make in ARRAYS]
    assert {value.dtype.kind for value in values} == set("biufcmMSUOV")
    for value, got in zip(values, roundtrip(spilling, *values)):
        assert got.dtype == value.dtype
        assert got.shape == value.shape
        assert (got == value).all()


def test_arrow_and_pandas(spilling: Server) -> None:
    table = pa.table(
        {
            "i": pa.array(range(200_000)),
            "s": pa.array([f"row {i}" if i % 3 else None for i in range(200_000)]),
            "l": pa.array([[i] * (i % 4) for i in range(200_000)]),
            "d": pa.array(["a", "b"] * 100_000).dictionary_encode(),
        }
    )
    frame = pd.DataFrame(
        {
            "x": np.arange(100_000.0),
            "t": pd.date_range("2026-01-01", periods=100_000, freq="s"),
            "c": pd.Categorical(["u", "v"] * 50_000),
            "s": [f"row {i}" for i in range(100_000)],
        }
    )
    got_table, got_frame = roundtrip(spilling, table, frame)
    assert got_table.equals(table)
    pd.testing.assert_frame_equal(got_frame, frame)


def test_python_objects(spilling: Server) -> None:
    value = {
        "deep": [[{"when": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)}]] * 5000,
        "set": set(range(20_000)),
        "text": "ünïcödé" * 50_000,
    }
    assert roundtrip(spilling, value) == [value]


def test_nested_references_stay_alive(spilling: Server) -> None:
    inner = [ray.put(np.full(50_000, i)) for i in range(5)]
    outer = ray.put({"inner": inner, "pad": bytes(200_000)})
    spill([outer, *inner], spilling)
    del inner
    found = ray.get(outer, timeout=PATIENCE)["inner"]
    assert [int(ray.get(ref, timeout=PATIENCE)[0]) for ref in found] == list(range(5))
    del outer, found
    expect_no_keys(spilling)


def test_results_of_tasks_actors_and_generators(spilling: Server) -> None:
    @ray.remote
    def task(i: int) -> np.ndarray:
        return np.full(100_000, i)

    @ray.remote(num_cpus=0)
    class Actor:
        def method(self, i: int) -> np.ndarray:
            return np.full(100_000, i)

    @ray.remote
    def generator() -> Iterator[np.ndarray]:
        for i in range(4):
            yield np.full(100_000, i)

    actor = Actor.remote()
    refs = [task.remote(i) for i in range(4)]
    refs += [actor.method.remote(i) for i in range(4)]
    refs += list(generator.remote())
    spill(refs, spilling)
    assert [int(value[-1]) for value in ray.get(refs, timeout=PATIENCE)] == [0, 1, 2, 3] * 3
    del refs, actor
    expect_no_keys(spilling)


def test_exceptions_as_values_and_as_results(spilling: Server) -> None:
    @ray.remote(max_retries=0)
    def fails() -> None:
        raise ValueError("x" * 200_000)

    raised, returned = fails.remote(), ray.put(ValueError("y" * 200_000))
    spill([raised, returned], spilling)
    with pytest.raises(ValueError, match=r"x{1000}"):
        ray.get(raised, timeout=PATIENCE)
    assert ray.get(returned, timeout=PATIENCE).args == ("y" * 200_000,)
    del raised, returned
    expect_no_keys(spilling)


def test_two_thousand_small_objects(spilling: Server) -> None:
    # 120 MB: more than the store holds, and as many as Ray puts into one batch.
    refs = [ray.put(i.to_bytes(4, "big") * 15_000) for i in range(2000)]
    spill(refs, spilling)
    for i in range(0, 2000, 500):
        values = ray.get(refs[i : i + 500], timeout=PATIENCE)
        assert values == [j.to_bytes(4, "big") * 15_000 for j in range(i, i + 500)]
    del refs
    expect_no_keys(spilling)


def test_spilled_arguments_and_wait(spilling: Server) -> None:
    @ray.remote
    def total(*arrays: np.ndarray) -> int:
        return sum(int(array.sum()) for array in arrays)

    refs = [ray.put(np.full(200_000, i)) for i in range(6)]
    spill(refs, spilling)
    ready, pending = ray.wait(refs, num_returns=6, timeout=PATIENCE)
    assert (len(ready), pending) == (6, [])
    assert ray.get(total.remote(*refs), timeout=PATIENCE) == 200_000 * 15
    del refs, ready
    expect_no_keys(spilling)


def test_an_object_is_spilled_again_after_a_restore(spilling: Server) -> None:
    ref = ray.put(np.arange(1_000_000))
    for _ in range(3):
        spill([ref], spilling)
        assert int(ray.get(ref, timeout=PATIENCE)[-1]) == 999_999
    del ref
    expect_no_keys(spilling)
