"""The benchmarks run and move the data that they claim to. What they measure is not tested."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.samples import noise, source
from support.servers import Server

from benchmarks import fleet
from benchmarks.churn import KEYS, Left, grown, growth, left
from benchmarks.common import commit_of
from benchmarks.report import document
from ray_valkey_spill.config import Config
from ray_valkey_spill.store.object_store import ObjectStore

ROOT = Path(__file__).parent.parent
SHARDS = ["1 shard", "2 shards", "3 shards"]

pytestmark = pytest.mark.slow


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
    assert found["found_ms"] > 0
    zeros = found["cases"]["tcp, 16 MiB, zeros"]
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


def test_neighbours_are_measured_beside_nobody_and_beside_spilling(another_checkout: Path) -> None:
    found = quick("neighbours", "--against", str(another_checkout))
    (setting,) = found["settings"]
    assert setting["window"] is None  # as the package paces it
    assert setting["spill"]["mb_per_s"] > 0
    assert setting["restore"]["mb_per_s"] > 0
    assert list(found["by_code"]) == ["spill, 1", "restore, 1"]
    for figures in found["by_code"].values():
        assert list(figures) == ["old", "new"]
        assert all(each["mb_per_s"] > 0 and each["of_idle_p99"] > 0 for each in figures.values())
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
            # A pass over eight objects is a slice, a look that finds no more, and a pause.
            assert figures["asked"] == pytest.approx(8 / 3, abs=0.1)
    for several in ("10", "100"):
        for figures in found["beside"][several].values():
            # It looks for dead nodes, too.
            assert figures["first: commands"] > figures["commands"] + 1
    for figures in found["many"].values():
        assert figures["idle"]["asked"] > 8 / 3
        # More than the name of an object has.
        assert figures["metadata_bytes"] > 100
        assert all(figures[tool]["seconds"] for tool in ("stats", "gc", "head start"))


def test_idle_nodes_take_what_the_first_and_all_others_take() -> None:
    figures = {"cpu": 0.5, "first: cpu": 2.0}
    assert fleet.together(figures, 11, "cpu") == pytest.approx((2.0 + 10 * 0.5) / fleet.PERIOD)
    # Results of earlier versions, and one node, have no other figures for the first.
    assert fleet.together({"cpu": 0.5}, 10, "cpu") == pytest.approx(10 * 0.5 / fleet.PERIOD)


def test_churn_counts_values_without_metadata_and_spills_that_have_not_ended(
    server: Server,
) -> None:
    config = Config.load({"url": server.url, "chunk_size": 65536}, {})
    with contextlib.closing(ObjectStore(config, "session", "node")) as store:
        urls, failure = store.put([source(noise(200_000, i), i) for i in range(2)])
        assert failure is None
        assert left(server) == Left(0, 0)
        first, _ = server.client.zrange(KEYS.index, 0, -1)
        pending = first.rsplit(b".", 2)[0]
        server.client.zrem(KEYS.index, first)
        assert left(server) == Left(5, 0)  # a header and four chunks
        server.client.zadd(KEYS.pending, {pending: 0})
        assert left(server) == Left(0, 1)
        server.client.zrem(KEYS.pending, pending)
        server.client.zadd(KEYS.index, {first: 0})
        store.delete(urls)


def test_churn_fails_where_a_median_grows_by_a_quarter_and_by_more_than_its_bound() -> None:
    warm_up = [0.0] * 10

    def failures(name: str, before: float, after: float) -> list[str]:
        # One of ten does not change a median.
        columns = {name: [*warm_up, *[before] * 9, 1e6, *[after] * 9, 1e6]}
        return grown(growth(columns))

    assert failures("server", 400.0, 400.0) == []
    assert failures("server", 400.0, 300.0) == []
    assert failures("server", 1000.0, 1200.0) == []  # less than a quarter
    assert failures("threads", 4, 10) == []  # a few
    assert failures("server", 400.0, 800.0) == ["server grew from 400.00 to 800.00"]
    assert failures("session_files", 40, 80) == ["session_files grew from 40.00 to 80.00"]
    assert failures("sockets", 0, 20) == ["sockets grew from 0.00 to 20.00"]


def test_a_commit_is_marked_if_anything_but_results_has_changed(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name in ("code.py", "benchmarks/wire.py", "benchmarks/RESULTS.md"):
        (tmp_path / name).write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init"], ["add", "."], [*who, "commit", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    commit = commit_of(tmp_path)
    assert len(commit) == 10
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("4 GB/s")
    assert commit_of(tmp_path / "benchmarks") == commit
    (tmp_path / "code.py").write_text("pass")
    assert commit_of(tmp_path / "benchmarks") == f"{commit}-dirty"
    assert commit_of(Path("/")) == "unknown"


@pytest.fixture
def results() -> dict[str, Any]:
    """Those of the repository, as if all were of one commit and one day."""
    found = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    for each in found.values():
        each |= {"date": "2026-01-02", "commit": "abc", "machine": {"cpu": "one"}}
    return found


def test_the_report_is_drawn_from_the_committed_results(tmp_path: Path) -> None:
    for name in ("results.json", "RESULTS.md"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    before = (tmp_path / "RESULTS.md").read_text()
    command = [sys.executable, "-m", "benchmarks.report", "--render", "--into", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    # Without pictures where there is no matplotlib.
    text = re.sub(r"!\[.*\n\n?", "", before).strip()
    assert re.sub(r"!\[.*\n\n?", "", (tmp_path / "RESULTS.md").read_text()).strip() == text


def test_the_report_names_machine_and_commit_once_also_for_several_days(
    results: dict[str, Any],
) -> None:
    assert "\n\n2026-01-02, commit abc; cpu one\n\n" in document(results, {})
    results["wire"]["date"] = "2026-01-05"
    shown = document(results, {})
    assert "\n\n2026-01-02 to 2026-01-05, commit abc; cpu one\n\n" in shown
    assert shown.count("commit abc") == 1
    results["wire"]["commit"] = "def"
    shown = document(results, {})
    assert "## wire\n\n2026-01-05, commit def; cpu one\n\n" in shown
    assert shown.count("2026-01-02, commit abc; cpu one") == len(results) - 1


def test_the_report_has_goals_for_each_size_and_for_what_is_found_and_for_the_default(
    results: dict[str, Any],
) -> None:
    pinned = [each for each in results["neighbours"]["settings"] if each["window"] is not None]
    default = {**pinned[0], "window": None, "chunk_size": Config().chunk_size}
    for way in ("spill", "restore"):
        default[way] = {**default[way], "of_idle_p99": 1.23}
    results["neighbours"]["settings"] = [{**default, "writers": 1, "yielding": False}, *pinned]
    results["wire"]["found_ms"] = 0.2
    shown = document(results, {})
    assert row("`find` of an object of 25 MB, ms", shown) == ["≤ 0.25", "0.20", ""]
    for size in ("4 KiB", "900 KiB"):
        assert f"server's time of a spill of {size} beside" in shown
        assert f"server's time of a restore of {size} beside" in shown
    beside = "a neighbour's GET beside 1 that spill: p99, of that beside nobody"
    assert row(beside, shown) == ["≤ 3", "1.23", ""]

    results["wire"]["found_ms"] = 0.3
    shown = document(results, {})
    *figures, why = row("`find` of an object of 25 MB, ms", shown)
    assert figures == ["≤ 0.25", "0.30"]
    assert why.startswith("missed: ")


def test_the_report_has_a_reason_for_each_goal_that_is_missed() -> None:
    shown = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    goals, _, _ = shown.partition("\n## wire")
    assert "| missed: " in goals
    assert "| missed " not in goals


def test_the_report_can_be_drawn_from_results_that_lack_newer_figures(
    results: dict[str, Any],
) -> None:
    results["wire"].pop("found_ms", None)
    settings = results["neighbours"]["settings"]
    results["neighbours"]["settings"] = [each for each in settings if each["window"] is not None]
    for each in results["fleet"]["many"].values():
        each.pop("idle", None)
    for beside in results["fleet"]["beside"].values():
        for figures in beside.values():
            for key in [key for key in figures if key.startswith("first: ") or key == "asked"]:
                del figures[key]
    shown = document(results, {})
    assert "`find`" not in shown
    assert row("a neighbour's GET beside 1 that spill: p99, of that beside nobody", shown)
    assert "idle nodes, % of the server's core" in shown
    assert "objects each, % of the server's core" not in shown


def row(what: str, shown: str) -> list[str]:
    """The other cells of the row that begins with `what`."""
    (cells,) = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in shown.splitlines()
        if line.startswith(f"| {what} ")
    )
    return cells[1:]
