"""The soak's table of faults, and its report; `test_benchmarks` runs a soak."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks import soak_kinds
from benchmarks.soak_faults import TABLE, a_round, strikes
from benchmarks.soak_kinds import ALL
from benchmarks.soak_report import report


@pytest.mark.parametrize("kind", sorted(ALL))
def test_a_round_has_each_fault_of_a_kind_and_one_that_destroys(kind: str) -> None:
    drawn = a_round(kind, random.Random(1), {})
    wanted = {strike.name for strike in strikes(kind) if not strike.destroys}
    assert {strike.name for strike in drawn if not strike.destroys} == wanted
    assert sum(strike.destroys for strike in drawn) == 1


def test_what_has_struck_least_comes_first() -> None:
    before = {strike.name: 2 * strike.times for strike in TABLE} | {"is full": 1, "flips bits": 0}
    *others, second, first = a_round("single", random.Random(1), before)
    assert [first.name, second.name] == ["flips bits", "is full"]
    assert not any(strike.destroys for strike in others)


def test_each_fault_has_a_name_of_its_own() -> None:
    names = [strike.name for strike in TABLE]
    assert len({*names}) == len(names)
    assert all(names)


def run(kind: str, **others: Any) -> dict[str, Any]:
    machine = dict.fromkeys(["cpu", "memory", "kernel", "python", "ray"], "?")
    return {
        "seed": 7,
        "kind": kind,
        "seconds": 1800.0,
        "faults": {"is full": 2},
        "missed": {"stalls": 1},
        "operations": {"get": 1000},
        "reclaimed": [[5, 20.5]],
        "io_worker_growth": {"memory": 0, "threads": 0, "files": 0},
        "failures": [],
        "commit": "abc",
        "machine": machine,
        "date": "2026-01-01",
        **others,
    }


def rows_of(shown: str) -> dict[str, list[str]]:
    """The rows of a report's tables, by their first cells."""
    return {
        cells[0]: cells[1:]
        for line in shown.splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("| ").split(" | ")]]
    }


def test_the_report_adds_up_runs_by_fault_and_by_kind_of_server() -> None:
    shown = report([run("single"), run("single"), run("cluster", failures=["lost"])])
    rows = rows_of(shown)
    assert rows["fault"] == ["single", "cluster"]
    assert rows["is full"] == ["4", "2"]
    assert rows["stalls"] == ["0", "-"]
    assert rows["loses a primary"] == ["-", "0"]
    assert rows["minutes"] == ["60", "30"]
    assert "1.50 hours, 6 faults" in shown
    assert "- seed 7 on cluster: lost" in shown
    assert "3 times" in shown
    assert "15 objects" in shown


def test_the_report_has_each_kind_that_was_run_also_where_it_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soak_kinds, "tls_binary", lambda: None)
    monkeypatch.setattr(soak_kinds, "can_hang", lambda: False)
    assert not {"tls", "overflow"} & {*soak_kinds.kinds()}
    rows = rows_of(report([run("single"), run("tls"), run("overflow"), run("of another version")]))
    assert rows["fault"] == ["single", "tls", "overflow", "of another version"]
    assert rows["is full"] == ["2", "2", "2", "-"]
    assert rows["minutes"] == ["30"] * 4
