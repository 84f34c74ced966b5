"""What an IO worker has still to delete is known to others once it is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_valkey_spill.journal import DeletionJournal

WRITER = """
import os, pathlib, signal, sys
from ray_valkey_spill.journal import DeletionJournal

journal = DeletionJournal(lambda: pathlib.Path(sys.argv[1]), sys.argv[2])
journal.add(["a", "b", "c"])
journal.add(["d", "e"])
journal.done(["b", "e"])
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_writer(directory: Path, name: str) -> int:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(directory), name])
    process.wait()
    return process.pid


def test_what_a_killed_process_had_left_is_found_by_its_node_alone(tmp_path: Path) -> None:
    pid = killed_writer(tmp_path, "node1")
    survivor = DeletionJournal(lambda: tmp_path, "node1")
    survivor.add(["mine"])
    assert list(survivor.of_the_dead(lambda other: True)) == []
    ((path, urls),) = survivor.of_the_dead(lambda other: other != pid)
    assert urls == ["a", "c", "d"]
    path.unlink()
    assert list(survivor.of_the_dead(lambda other: other != pid)) == []
    assert list(DeletionJournal(lambda: tmp_path, "node2").of_the_dead(lambda pid: False)) == []


def test_nothing_is_left_on_disk_when_nothing_is_to_be_done(tmp_path: Path) -> None:
    journal = DeletionJournal(lambda: tmp_path, "node")
    journal.add(["a", "b"])
    journal.add(["c"])
    assert len(list(tmp_path.iterdir())) == 1
    journal.done(["a", "c"])
    assert journal.left() == ["b"]
    journal.done(["b"])
    assert journal.left() == []
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    Path(tmp_path, "node-17.deletions").write_text("whole\nha")
    ((_, urls),) = DeletionJournal(lambda: tmp_path, "node").of_the_dead(lambda pid: False)
    assert urls == ["whole"]


@pytest.mark.parametrize("directory", [None, "missing"])
def test_without_a_place_for_files_the_process_itself_knows(
    tmp_path: Path, directory: str | None
) -> None:
    journal = DeletionJournal(lambda: directory and tmp_path / directory, "node")
    journal.add(["a", "b"])
    journal.done(["a"])
    assert journal.left() == ["b"]
    assert list(journal.of_the_dead(lambda pid: False)) == []
