from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_valkey_spill import outage
from ray_valkey_spill.errors import ServerFullError
from ray_valkey_spill.outage import Outage

FULL = ServerFullError("OOM command not allowed", "Raise maxmemory")


@pytest.fixture(params=["with a file", "alone"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "with a file" else None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Time that goes on by as much as it is told."""
    now = 1000.0

    def go_on(seconds: float) -> None:
        nonlocal now
        now += seconds

    with monkeypatch.context() as patch:
        patch.setattr(outage.time, "monotonic", lambda: now)
        yield go_on


def test_an_outage_is_told_once_and_counted(
    directory: Path | None, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    it = Outage(lambda: directory, "outage", told.append)
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            it.failed("objects cannot be spilled", FULL)
        it.over()
    (message,) = told
    assert "objects cannot be spilled" in message
    assert "Raise maxmemory" in message
    first, last = (record.getMessage() for record in caplog.records)
    assert first == f"objects cannot be spilled, and will be tried again (for now): {FULL}"
    assert last.startswith("works again, after 100 failures in ")


def test_the_log_has_a_line_a_minute_with_the_count(
    directory: Path | None, caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]
) -> None:
    told: list[str] = []
    it = Outage(lambda: directory, "outage", told.append)
    for _ in range(121):
        it.failed("objects cannot be spilled", FULL)
        clock(1)
    assert [r.getMessage().partition(")")[0].partition("(")[2] for r in caplog.records] == [
        "for now",
        "61 failures in 60 s so far",
        "121 failures in 120 s so far",
    ]
    assert len(told) == 1


def test_an_outage_that_comes_and_goes_is_no_storm(
    directory: Path | None, caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]
) -> None:
    told: list[str] = []
    it = Outage(lambda: directory, "outage", told.append)
    for _ in range(1000):
        it.failed("objects cannot be spilled", FULL)
        it.over()
        clock(0.1)
    assert len(told) == 1
    assert len([r for r in caplog.records if "cannot be spilled" in r.getMessage()]) == 2
    clock(600)
    it.failed("objects cannot be spilled", FULL)
    assert len(told) == 2


def test_one_process_speaks_for_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    processes = [Outage(lambda: tmp_path, "outage", told.append) for _ in range(4)]
    for _ in range(3):
        for process in processes:
            process.failed("objects cannot be spilled", FULL)
    assert len(told) == 1
    assert len(caplog.records) == 1
    processes[2].over()
    assert "after 12 failures" in caplog.text
    for process in processes:
        process.over()
    assert caplog.text.count("works again") == 1


def test_pauses_grow_to_seconds_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(outage.time, "sleep", slept.append)
    it = Outage(lambda: None, "outage", lambda message: None)
    for _ in range(20):
        it.failed("objects cannot be spilled", FULL)
        it.pause()
    assert 0.25 <= slept[0] <= 0.5
    assert all(1 <= pause <= 2 for pause in slept[2:])
    it.over()
    it.pause()
    assert slept[-1] <= 0.5


@pytest.mark.parametrize("content", ["", "nonsense", "[]", '{"since": "x", "unknown": 1}'])
def test_a_file_that_was_cut_off_is_taken_for_a_new_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "outage").write_text(content)
    told: list[str] = []
    Outage(lambda: tmp_path, "outage", told.append).failed("objects cannot be spilled", FULL)
    assert len(told) == 1


@pytest.mark.parametrize("directory", ["there", "not there"])
def test_a_file_that_cannot_be_written_makes_no_storm(
    tmp_path: Path, directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    told: list[str] = []
    it = Outage(lambda: tmp_path / directory, "outage", told.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a full disk: no file of this process can grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        for _ in range(10):
            it.failed("objects cannot be spilled", FULL)
        it.over()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(told) == 1
    assert "after 10 failures" in caplog.text
