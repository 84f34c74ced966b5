"""The benchmarks run and move the data that they claim to. What they measure is not tested."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHARDS = ["1 shard", "2 shards", "3 shards"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def benchmark(name: str, *options: str) -> Any:
    """What it prints. Those that find failures of ours end with 1."""
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--json", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=800,
        check=False,
    )
    found = json.loads(result.stdout)
    failures = [failure for run in found.get("runs", []) for failure in run["failures"]]
    assert result.returncode == bool(failures)
    return found


def quick(name: str, *options: str) -> Any:
    return benchmark(name, "--quick", *options)


@pytest.fixture
def another_checkout(tmp_path: Path) -> Path:
    """A copy of the package, as another checkout of the repository has it."""
    shutil.copytree(ROOT / "ray_valkey_spill", tmp_path / "ray_valkey_spill")
    return tmp_path


def test_half_a_minute_of_faults_loses_and_wedges_and_leaves_nothing() -> None:
    seed = random.getrandbits(32)
    # More than the shorter times after which spills and restores are given up, to begin with.
    how = ["--minutes=0.5", "--longest=6", f"--seeds={seed}"]
    (run,) = benchmark("soak", *how)["runs"]
    assert run["failures"] == [], how
    # There is time for one or two, and one may end before it has hit anybody.
    assert run["faults"] or run["missed"]
    assert {"put", "get"} <= set(run["operations"])


def test_wire_compares_all_contenders_by_the_same_measures() -> None:
    found = quick("wire")
    assert found["machine"]["ray-valkey-spill"]
    assert len(found["cases"]) == 6
    for case in found["cases"].values():
        assert {"raw limit", "auto"} < set(case["spill"])
        assert set(case["spill"]) == set(case["restore"])
        for contender in (*case["spill"].values(), *case["restore"].values()):
            assert contender["gb_per_s_min"] <= contender["gb_per_s"] <= contender["gb_per_s_max"]
    zeros = found["cases"]["tcp, 64 MiB, zeros"]
    assert zeros["spill"]["auto"]["server_bytes"] < zeros["bytes"] / 50


def test_scaling_destroys_its_objects_and_nothing_else() -> None:
    found = quick("scaling")
    destroyed = found["live_objects"]["destroy"]
    assert destroyed["objects"] == 10_000
    assert destroyed["foreign_keys"] == 100_000
    for server in found["chunk_sizes"].values():
        # The allocator's next size class costs a quarter, and the default stays below it.
        assert server["524160"]["memory"] < 1.02


def test_every_kind_of_server_moves_the_same_data() -> None:
    found = quick("kinds")
    assert {"plain", "sealed"} <= set(found["protection"]["random floats"])
    assert list(found["shards"]["random floats"]) == ["no cluster", *SHARDS]
    for cases in (found["protection"], found["shards"]):
        for kinds in cases.values():
            for figures in kinds.values():
                assert all(figures[way]["gb_per_s"] > 0 for way in ("spill", "restore"))


def test_neighbours_are_measured_beside_nobody_and_beside_spilling() -> None:
    found = quick("neighbours")
    (setting,) = found["settings"]
    assert setting["spill"]["mb_per_s"] > 0
    assert setting["restore"]["mb_per_s"] > 0
    for run in found["tenants"].values():
        assert all(tally["operations"] > 0 for tally in run["tenants"].values())
        assert not any(tally["wrong"] for tally in run["tenants"].values())
    alone, by_itself, permitted = (
        found["tenants"][name] for name in ("alone", "with Ray", "max_bytes")
    )
    assert alone["evicted_keys"] == by_itself["evicted_keys"] == 0
    assert permitted["evicted_keys"] > 0
    assert by_itself["tenants"]["session:"]["misses"] == 0


def test_a_working_set_many_times_the_servers_memory_comes_back_from_the_overflow() -> None:
    (run,) = benchmark("overflow", "--gib=0.6")["runs"]
    assert run["failures"] == []
    assert run["peaks"]["overflow_bytes"] > run["peaks"]["valkey_bytes"]


def test_distance_has_the_round_trips_of_each_operation() -> None:
    found = quick("distance")
    assert len(found["contenders"]) == 1
    assert {len(kind["batches"]) for kind in found["round_trips"].values()} <= {2, 3}
    for kind in found["round_trips"].values():
        for figures in kind["batches"].values():
            for when in ("first", "steady"):
                assert list(figures[when]) == found["contenders"]
                for trips in figures[when].values():
                    assert set(trips) == {"spill", "restore", "delete"}
                    assert all(trips.values())
    through = found["throughput"]
    assert bool(through["unavailable"]) == (not through["cases"])
    for case in through["cases"]:
        assert {*found["contenders"]} < set(case["steady"])


def test_fleet_counts_what_both_checkouts_cost(another_checkout: Path) -> None:
    found = quick("fleet", "--against", str(another_checkout))
    assert found["contenders"] == ["old", "new"]
    assert list(found["beside"]) == ["1", "10", "100"]
    for beside in found["beside"].values():
        for figures in beside.values():
            of_object = figures["operations"]["900 KiB"]
            for operation in ("spill", "restore", "delete"):
                assert of_object[f"{operation}: commands"] >= 1
            assert of_object["spill: bytes"] > 900 << 10
            assert of_object["restore: bytes"] > 900 << 10
            assert figures["commands"] > 0
            assert figures["connections"] >= 8
    for figures in found["many"].values():
        # More than the name of an object has.
        assert figures["metadata_bytes"] > 100
        assert all(figures[tool]["seconds"] for tool in ("stats", "gc", "head start"))
