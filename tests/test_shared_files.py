"""Of the files in the session's directory, only those are used that no other user can have made."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.guardians import guardians
from support.io_worker import SESSION, io_workers
from support.samples import object_id, source
from support.servers import Server, wait_until
from support.session_files import shared_files
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ServerUnavailableError
from ray_valkey_spill.plugin import guardian
from ray_valkey_spill.plugin.deletions import DeletionJournal
from ray_valkey_spill.plugin.ending import start_guardian
from ray_valkey_spill.plugin.keeper import NodeLock
from ray_valkey_spill.plugin.outage import VALKEY, Outages
from ray_valkey_spill.plugin.process import SharedDirectory
from ray_valkey_spill.plugin.shared_files import NAME, open_directory

NODE = "ab" * 28
SOMEBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


class NoDrivers:
    def notify(self, message: str, job: str | None = None) -> None:
        pass

    def running(self) -> list[str]:
        return []


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """The directory of a session, as Ray makes it."""
    directory = tmp_path / SESSION
    (directory / "logs").mkdir(parents=True)
    directory.chmod(0o777)
    return directory


def fail(outages: Outages) -> None:
    outages.failed(VALKEY, "spills", ServerUnavailableError("the server cannot be reached"))


# --- the directory ---


def test_all_who_create_it_at_the_same_time_get_the_same_private_directory(tmp_path: Path) -> None:
    sessions = [tmp_path / f"session_{number}" for number in range(50)]
    for session in sessions:
        session.mkdir()
    each_four_times = [str(session) for session in sessions for _ in range(4)]
    before = os.umask(0)
    try:
        with ThreadPoolExecutor(4) as threads:
            opened = [*threads.map(open_directory, each_four_times)]
    finally:
        os.umask(before)
    found = [os.fstat(file) for file in opened]
    for file in opened:
        os.close(file)
    assert {stat.S_IMODE(each.st_mode) for each in found} == {0o700}
    assert len({each.st_ino for each in found}) == len(sessions)


def link(path: Path) -> None:
    path.symlink_to(shared_files(path.parent.parent))


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent.parent / "missing")


def give_away(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, SOMEBODY, SOMEBODY)


def open_to(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)

    return make


UNUSABLE = [
    pytest.param(link, "Not a directory", id="a link"),
    pytest.param(link_to_nothing, "Not a directory", id="a link to nothing"),
    pytest.param(os.mkfifo, "Not a directory", id="a FIFO"),
    pytest.param(Path.touch, "Not a directory", id="a file"),
    pytest.param(open_to(0o770), "other users can write it (mode 0770)", id="a group's"),
    pytest.param(open_to(0o707), "other users can write it (mode 0707)", id="everybody's"),
    pytest.param(give_away, f"its owner is user {SOMEBODY}, not 0", id="somebody's", marks=as_root),
]


@pytest.mark.parametrize(("make", "reason"), UNUSABLE)
def test_one_that_others_may_have_made_or_can_write_is_not_used(
    session: Path, make: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each process is then alone, as without a directory, and one line in its log says why."""
    make(session / NAME)
    with contextlib.suppress(OSError):
        for name in ("destroyed", f"{NODE}-17-abcd.deletions"):
            (session / NAME / name).write_text("\n+live\n")
    before = {path: path.lstat() for path in session.parent.rglob("*") if path.is_file()}
    shared = SharedDirectory(lambda: session)
    assert shared() is None
    locks = [NodeLock(shared, NODE) for _ in range(2)]
    assert all(lock.take() for lock in locks)
    outages = Outages(shared, f"{NODE}.outages", NoDrivers())
    fail(outages)
    journal = DeletionJournal(shared, NODE)
    journal.adopt(lambda pid: False)
    assert journal.left() == []
    guardian.mark_removed(str(session))
    assert not guardian.is_ended(str(session)) and not guardian.is_over(str(session))
    assert guardian.is_there(str(session)), "none can be started"
    assert {path: path.lstat() for path in before} == before
    assert [*session.parent.rglob("*.outages")] == []
    lines = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in lines if "share no files" in line]
    assert line.endswith(f"{reason}: '{session / NAME}'")


@pytest.mark.parametrize(("make", "reason"), UNUSABLE)
def test_a_head_that_cannot_use_it_starts_without_a_guardian_and_says_so(
    session: Path, make: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(session / NAME)
    start_guardian(session, {})
    assert guardians(session) == []
    (record,) = caplog.records
    assert "nobody watches for the end of this session" in record.getMessage()
    assert record.getMessage().endswith(f"{reason}: '{session / NAME}'")


def test_once_it_can_be_used_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known: list[Path] = []
    shared = SharedDirectory(lambda: known[0] if known else None)
    assert shared() is None
    assert caplog.records == []
    known.append(tmp_path / SESSION)
    assert shared() is None and shared() is None
    assert len(caplog.records) == 1
    known[0].mkdir()
    path = shared()
    assert path is not None and path.samefile(known[0] / NAME)
    assert shared() == path
    assert len(caplog.records) == 1


def is_open(directory: Path) -> bool:
    """Whether this process has it open."""
    with os.scandir("/proc/self/fd") as files:
        return any(
            Path(file.path).samefile(directory) for file in files if os.path.exists(file.path)
        )


def test_it_is_open_for_as_long_as_somebody_uses_it(session: Path) -> None:
    shared = SharedDirectory(lambda: session)
    lock = NodeLock(shared, NODE)
    assert shared() is not None
    del shared
    gc.collect()
    lock.note_renewal()
    assert lock.since_renewal() < 60
    assert is_open(session / NAME)
    del lock
    gc.collect()
    assert not guardian.is_there(str(session))
    assert not is_open(session / NAME)


AS_SOMEBODY = """
import os, pathlib, sys
from ray_valkey_spill.plugin import guardian
from ray_valkey_spill.plugin.process import SharedDirectory

os.setuid(int(sys.argv[2]))
session = sys.argv[1]
guardian.mark_ended(session)
print(SharedDirectory(lambda: pathlib.Path(session))(), guardian.is_ended(session))
"""


@as_root
def test_a_process_of_another_user_works_without_it(short_dir: Path) -> None:
    short_dir.chmod(0o777)
    shared_files(short_dir)
    command = [sys.executable, "-c", AS_SOMEBODY, str(short_dir), str(SOMEBODY)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == "None False\n"
    # Ray may say something as well, if its files are of another user.
    (told,) = (line for line in ended.stderr.splitlines() if "share no files" in line)
    assert f"Permission denied: '{short_dir / NAME}'" in told
    assert not guardian.is_ended(str(short_dir))


# --- what others put into the session's directory ---


def test_one_that_replaces_it_later_is_not_used(session: Path) -> None:
    """Whoever can write the session's directory can rename what is in it."""
    victim = session.parent / "victim"
    victim.write_text("precious")
    shared = SharedDirectory(lambda: session)
    outages, journal = Outages(shared, "outages", NoDrivers()), DeletionJournal(shared, NODE)
    fail(outages)
    own = (session / NAME).rename(session / "moved")
    planted = shared_files(session)
    (planted / "outages").symlink_to(victim)
    (planted / f"{NODE}-17-abcd.deletions").write_text("\n+live\n")
    fail(outages)
    fail(Outages(shared, "outages", NoDrivers()))
    journal.adopt(lambda pid: False)
    assert journal.left() == []
    assert victim.read_text() == "precious"
    assert json.loads((own / "outages").read_text())[VALKEY]["failures"] == 3


def test_an_io_worker_follows_no_link_and_adopts_no_journal_that_others_planted(
    server: Server, session: Path
) -> None:
    """Under the names that its files had in the session's directory itself."""
    victim, missing = session.parent / "victim", session.parent / "missing"
    victim.write_text("precious")
    start = session / f"ray_valkey_spill-{NODE}"
    start.with_suffix(".outages").symlink_to(victim)
    start.with_suffix(".keeper").symlink_to(missing)
    with contextlib.closing(Store(Config.load({"url": server.url}, {}), SESSION, NODE)) as store:
        store.begin_lease("127.0.0.1:1", lambda: False)
        (deleted, live), _ = store.put([source(bytes(1000), number) for number in range(2)])
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        name = f"{NODE}-{dead.pid}-abcd.deletions"
        (session / f"ray_valkey_spill-{name}").write_text(f"\n+{live}\n")
        (shared_files(session) / name).write_text(f"\n+{deleted}\n")
        # No directory can be made there, so there is an outage.
        params = {"url": server.url, "overflow_uri": "file:///proc/overflow"}
        with io_workers(1, session, NODE, params):
            wait_until(lambda: len(server.spilled_ids()) < 2)
            wait_until((shared_files(session) / f"{NODE}.outages").exists)
        assert server.spilled_ids() == {object_id(1)}
        assert victim.read_text() == "precious"
        assert not missing.exists()
        store.destroy(lambda pid: False)


def test_no_mark_that_others_planted_ends_the_session(session: Path) -> None:
    for name in ("ray_valkey_spill.destroyed", "destroyed"):
        (session / name).write_text("nothing is left\n")
    assert not guardian.is_ended(str(session)) and not guardian.is_over(str(session))
    guardian.mark_ended(str(session))
    assert guardian.is_ended(str(session))


def test_a_lock_file_that_others_planted_as_a_link_is_not_followed(session: Path) -> None:
    missing = session.parent / "missing"
    (session / "ray_valkey_spill.guardian").symlink_to(missing)
    assert not guardian.is_there(str(session))
    assert not missing.exists()
