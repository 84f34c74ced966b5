"""What logs and drivers hear of failures that last, and when."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.servers import wait_until

from ray_valkey_spill.errors import (
    ConfigError,
    OverflowUnavailableError,
    ServerFullError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.names import TierName
from ray_valkey_spill.plugin.outage import (
    CONFIG,
    OVERFLOW,
    ROOM,
    VALKEY,
    Losses,
    Outages,
    resource_of,
)

FULL = ServerFullError("OOM command not allowed", "Raise maxmemory")
AWAY = OverflowUnavailableError("the overflow at /mnt/x cannot be used", "Mount it")


class Clock:
    """Time that passes as far as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Drivers:
    """A fake: which drivers a real cluster notifies is for `test_ray_away` to see."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.each: list[tuple[str, str]] = []
        self.jobs = ["01"]

    def notify(self, message: str, job: str | None = None) -> None:
        if job is None:
            self.all.append(message)
        else:
            self.each.append((job, message))

    def running(self) -> list[str]:
        return self.jobs


@pytest.fixture(params=["with a file", "alone"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "with a file" else None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def drivers() -> Drivers:
    return Drivers()


def outages(directory: Path | None, drivers: Drivers, clock: Clock) -> Outages:
    return Outages(lambda: directory, "outages", drivers, clock, clock.sleep)


def fail_for(it: Outages, clock: Clock, seconds: int, what: str = ROOM) -> None:
    """An attempt each second."""
    for _ in range(seconds):
        it.failed(what, "spills", FULL if what == ROOM else AWAY)
        clock.pass_(1)


# --- one outage ---


def test_drivers_hear_of_an_outage_once_after_five_seconds_and_when_it_is_over(
    directory: Path | None, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 5)
    assert drivers.all == []
    fail_for(it, clock, 40)
    (message,) = drivers.all
    assert message == (
        "ray-valkey-spill: spills wait for room in Valkey, and are tried again until it works "
        f"(6 failures in 5 s): {FULL}"
    )
    it.over(ROOM, "spills")
    assert drivers.all[1:] == [
        "ray-valkey-spill: room in Valkey can be used again, after 45 failures in 45 s"
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"spills wait for room in Valkey, and are tried again until it works (for now): {FULL}",
        "room in Valkey can be used again, after 45 failures in 45 s",
    ]


def test_the_log_has_a_line_a_minute_with_the_count(
    directory: Path | None, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 121)
    assert [r.getMessage().partition(")")[0].partition("(")[2] for r in caplog.records] == [
        "for now",
        "61 failures in 60 s",
        "121 failures in 120 s",
    ]
    assert len(drivers.all) == 1


def test_a_blip_is_not_reported(directory: Path | None, drivers: Drivers, clock: Clock) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 4)
    it.over(ROOM, "spills")
    assert drivers.all == []


def test_an_outage_that_comes_and_goes_is_no_storm(
    directory: Path | None, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = outages(directory, drivers, clock)
    for _ in range(1000):
        it.failed(ROOM, "spills", FULL)
        it.over(ROOM, "spills")
        clock.pass_(0.1)
    assert drivers.all == []
    assert len(caplog.records) <= 4


def test_a_second_outage_soon_after_the_first_is_reported_once_a_minute_has_passed(
    directory: Path | None, drivers: Drivers, clock: Clock
) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 10)
    it.over(ROOM, "spills")
    drivers.all.clear()
    fail_for(it, clock, 50)
    assert drivers.all == []
    fail_for(it, clock, 10)
    assert len(drivers.all) == 1


def test_drivers_that_join_during_an_outage_hear_of_it(
    directory: Path | None, drivers: Drivers, clock: Clock
) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 10)
    assert drivers.each == []
    drivers.jobs = ["01", "02"]
    fail_for(it, clock, 30)
    assert [job for job, _ in drivers.each] == ["02"]
    assert "spills wait for room in Valkey" in drivers.each[0][1]
    assert len(drivers.all) == 1


def test_how_many_wait_is_the_sum_over_the_node(
    tmp_path: Path, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = outages(tmp_path, drivers, clock)
    it.failed(OVERFLOW, "restores", AWAY, waiting=40)
    assert "(for now, 40 wait on this node)" in caplog.text


# --- many resources, many processes ---


def test_resources_are_apart(
    directory: Path | None, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = outages(directory, drivers, clock)
    for _ in range(60):
        it.failed(OVERFLOW, "restores", AWAY)
        it.over(VALKEY, "spills")
        it.over(ROOM, "spills")
        clock.pass_(1)
    assert "can be used again" not in caplog.text
    assert len(drivers.all) == 1
    assert it.is_on(OVERFLOW)
    assert not it.is_on(VALKEY)


def test_an_error_shows_what_is_away() -> None:
    assert resource_of(AWAY) == OVERFLOW
    assert resource_of(FULL) == ROOM
    assert resource_of(ServerUnavailableError("x")) == VALKEY
    assert resource_of(ConfigError("x")) == CONFIG


def test_reads_that_work_do_not_end_an_outage_of_writes(
    directory: Path | None, drivers: Drivers, clock: Clock
) -> None:
    it = outages(directory, drivers, clock)
    for _ in range(60):
        it.failed(VALKEY, "spills", FULL)
        it.failed(VALKEY, "restores", FULL)
        it.over(VALKEY, "restores")
        clock.pass_(1)
    assert [message.count("spills wait for Valkey") for message in drivers.all] == [1]
    it.over(VALKEY, "spills")
    assert "can be used again" in drivers.all[1]


def test_what_tries_no_more_does_not_keep_an_outage_going(
    directory: Path | None, drivers: Drivers, clock: Clock
) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 10)
    clock.pass_(5)
    it.over(ROOM, "restores")
    assert len(drivers.all) == 1
    clock.pass_(10)
    it.over(ROOM, "restores")
    assert "can be used again" in drivers.all[1]


def test_what_is_over_for_long_leaves_nothing_behind(
    tmp_path: Path, drivers: Drivers, clock: Clock
) -> None:
    it = outages(tmp_path, drivers, clock)
    for number in range(100):
        it.failed(f"an unbroken read of object {number}", "restores", AWAY)
        it.over(f"an unbroken read of object {number}", "restores")
        clock.pass_(2)
    assert len(json.loads((tmp_path / "outages").read_text())) < 70


def test_what_is_on_is_forgotten_where_nobody_tries(
    directory: Path | None, drivers: Drivers, clock: Clock
) -> None:
    it = outages(directory, drivers, clock)
    it.failed(VALKEY, "restores", FULL)
    assert it.is_on(VALKEY)
    clock.pass_(20)
    assert not it.is_on(VALKEY)


def test_where_the_state_is_shared_is_found_out_once(
    tmp_path: Path, drivers: Drivers, clock: Clock
) -> None:
    found: list[Path | None] = [None, tmp_path]
    it = Outages(lambda: found.pop(0), "outages", drivers, clock)
    it.failed(VALKEY, "restores", FULL)  # the session is not known yet
    other = outages(tmp_path, drivers, clock)
    other.failed(ROOM, "spills", FULL)
    assert it.is_on(ROOM)
    for _ in range(10):
        other.over(ROOM, "spills")
        assert not it.is_on(ROOM)
        other.failed(ROOM, "spills", FULL)
        assert it.is_on(ROOM)
    assert found == []


def test_one_process_reports_for_all(
    tmp_path: Path, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    processes = [outages(tmp_path, drivers, clock) for _ in range(4)]
    for _ in range(10):
        for process in processes:
            process.failed(ROOM, "spills", FULL)
        clock.pass_(1)
    assert len(drivers.all) == 1
    assert len(caplog.records) == 1
    processes[2].over(ROOM, "spills")
    assert "after 40 failures" in caplog.text
    for process in processes:
        process.over(ROOM, "spills")
    assert caplog.text.count("can be used again") == 1
    assert len(drivers.all) == 2


FAILING = """
import os, pathlib, sys
from ray_valkey_spill.errors import ServerFullError
from ray_valkey_spill.plugin.outage import Outages

class Drivers:
    def notify(self, message, job=None): pass
    def running(self): return []

Outages(lambda: pathlib.Path(sys.argv[1]), "outages", Drivers()).failed(
    "room in Valkey", "spills", ServerFullError("OOM"))
os.kill(os.getpid(), 9)
"""


def test_the_success_of_one_process_ends_the_outage_of_one_that_was_killed(
    tmp_path: Path, drivers: Drivers
) -> None:
    subprocess.run([sys.executable, "-c", FAILING, str(tmp_path)], check=False)
    it = Outages(lambda: tmp_path, "outages", drivers)
    assert it.is_on(ROOM)
    it.over(ROOM, "spills")
    assert not it.is_on(ROOM)


def test_an_outage_that_a_killed_process_left_does_not_hide_the_next(
    tmp_path: Path, drivers: Drivers, clock: Clock
) -> None:
    outages(tmp_path, drivers, clock).failed(ROOM, "spills", FULL)
    clock.pass_(86_400)
    it = outages(tmp_path, drivers, clock)
    fail_for(it, clock, 5)
    assert drivers.all == []
    fail_for(it, clock, 2)
    assert "failures in 5 s" in drivers.all[0]


# --- pauses, files ---


def test_pauses_grow_to_seconds_and_start_anew(drivers: Drivers, clock: Clock) -> None:
    it = outages(None, drivers, clock)
    for _ in range(20):
        it.failed(ROOM, "spills", FULL)
        it.pause()
    assert 0.25 <= clock.slept[0] <= 0.5
    assert all(1 <= pause <= 2 for pause in clock.slept[2:])
    it.over(ROOM, "spills")
    it.pause()
    assert clock.slept[-1] <= 0.5


@pytest.mark.parametrize(
    "content",
    ["", "nonsense", "[]", '{"room in Valkey": 1}', '{"room in Valkey": {"since": 1, "other": 1}}'],
)
def test_a_file_that_is_damaged_is_taken_for_a_new_one(
    tmp_path: Path, content: str, drivers: Drivers, clock: Clock
) -> None:
    (tmp_path / "outages").write_text(content)
    fail_for(outages(tmp_path, drivers, clock), clock, 7)
    assert len(drivers.all) == 1


@pytest.mark.parametrize("name", ["there", "not there"])
def test_a_file_that_cannot_be_written_makes_no_storm(
    tmp_path: Path, name: str, drivers: Drivers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    it = outages(tmp_path / name, drivers, clock)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a full disk: no file of this process can grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        fail_for(it, clock, 10)
        it.over(ROOM, "spills")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(drivers.all) == 2
    assert "after 10 failures" in caplog.text


# --- losses ---


def place_of(tier: TierName) -> str:
    return {"valkey": "Valkey at valkey://host:6379/0", "overflow": "the overflow at /mnt/x"}[tier]


def losses(directory: Path | None, drivers: Drivers, clock: Clock) -> Losses:
    return Losses(lambda: directory, "losses", drivers, place_of, clock)


def test_losses_are_counted_in_one_message_a_minute(
    directory: Path | None, drivers: Drivers, clock: Clock
) -> None:
    it = losses(directory, drivers, clock)
    for _ in range(15):
        it.add("missing", "valkey")
    it.add("damaged", "overflow")
    it.report()
    (message,) = drivers.all
    assert "15 spilled objects are missing from Valkey at valkey://host:6379/0" in message
    assert "restarted without its data" in message
    assert "1 spilled object is damaged in the overflow at /mnt/x" in message
    it.report()
    it.add("missing", "valkey")
    it.report()
    assert len(drivers.all) == 1
    clock.pass_(60)
    it.report()
    assert len(drivers.all) == 2
    assert "1 spilled object is missing" in drivers.all[1]


def test_losses_report_themselves(tmp_path: Path, drivers: Drivers) -> None:
    it = Losses(lambda: tmp_path, "losses", drivers, place_of)
    for _ in range(15):
        it.add("missing", "valkey")
    wait_until(lambda: drivers.all)
    assert "15 spilled objects" in drivers.all[0]


def test_one_process_reports_the_losses_of_all(
    tmp_path: Path, drivers: Drivers, clock: Clock
) -> None:
    processes = [losses(tmp_path, drivers, clock) for _ in range(4)]
    for process in processes:
        process.add("missing", "valkey")
    processes[0].report()
    processes[1].report()
    (message,) = drivers.all
    assert "4 spilled objects are missing" in message


# --- what says nothing about others ---


def test_many_that_fail_with_the_same_are_one_outage_that_ends_with_the_last(
    directory: Path | None, clock: Clock, drivers: Drivers
) -> None:
    it = outages(directory, drivers, clock)
    for _ in range(3):
        for number in range(50):
            it.failed("whole reads", "restores", AWAY, 1, f"object {number}")
        clock.pass_(10)
    (message,) = drivers.all
    assert "50 wait on this node" in message
    it.over("whole reads", "another object")
    for number in range(49):
        it.over("whole reads", f"object {number}")
    assert len(drivers.all) == 1
    it.over("whole reads", "object 49")
    (_, message) = drivers.all
    assert "can be used again" in message


def test_an_outage_that_nobody_waits_for_any_more_ends(
    directory: Path | None, clock: Clock, drivers: Drivers
) -> None:
    it = outages(directory, drivers, clock)
    fail_for(it, clock, 10)
    clock.pass_(60)
    it.forget()
    assert len(drivers.all) == 1
    clock.pass_(61)
    it.forget()
    it.forget()
    (_, message) = drivers.all
    assert f"nothing has waited for {ROOM} for" in message
    it.over(ROOM, "spills")
    assert len(drivers.all) == 2
