"""What an IO worker has still to delete is known to others once it is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_valkey_spill.plugin.deletions import DeletionJournal

WRITER = """
import os, pathlib, signal, sys
from ray_valkey_spill.plugin.deletions import DeletionJournal

journal = DeletionJournal(lambda: pathlib.Path(sys.argv[1]), sys.argv[2])
with journal.deleting(["a", "b", "c"]), journal.deleting(["d", "e"]):
    journal.done(["b", "e"])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_writer(directory: Path, name: str) -> int:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(directory), name])
    process.wait()
    return process.pid


def give_up(journal: DeletionJournal, *urls: str) -> None:
    with contextlib.suppress(ConnectionError), journal.deleting(urls):
        raise ConnectionError


def test_what_somebody_is_at_is_left_to_nobody_else(tmp_path: Path) -> None:
    journal = DeletionJournal(lambda: tmp_path, "node")
    give_up(journal, "a")
    with journal.deleting(["b"]):
        assert journal.left() == ["a"]
    assert journal.left() == ["a"]


def adopted(directory: Path, is_alive: Callable[[int], bool], name: str = "node") -> list[str]:
    journal = DeletionJournal(lambda: directory, name)
    journal.adopt(is_alive)
    return journal.left()


def test_what_a_killed_process_had_left_is_its_nodes_alone(tmp_path: Path) -> None:
    pid = killed_writer(tmp_path, "node1")
    survivor = DeletionJournal(lambda: tmp_path, "node1")
    give_up(survivor, "mine")
    survivor.adopt(lambda other: True)
    assert survivor.left() == ["mine"]
    assert adopted(tmp_path, lambda pid: False, "node2") == []
    survivor.adopt(lambda other: other != pid)
    assert survivor.left() == ["mine", "a", "c", "d"]


ADOPTER = """
import pathlib, sys
from ray_valkey_spill.plugin.deletions import DeletionJournal

journal = DeletionJournal(lambda: pathlib.Path(sys.argv[1]), "node")
dead = int(sys.argv[2])
journal.adopt(lambda pid: pid != dead)
print(*journal.left(), flush=True)
sys.stdin.read()  # alive for as long as the others look
"""


def test_of_many_processes_one_takes_over_what_a_killed_one_had_left(tmp_path: Path) -> None:
    dead = killed_writer(tmp_path, "node")
    command = [sys.executable, "-c", ADOPTER, str(tmp_path), str(dead)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(4)]
    printed = [process.stdout.readline().split() for process in processes]
    for process in processes:
        process.communicate("")
    assert sorted(printed) == [[], [], [], ["a", "c", "d"]]


def test_what_one_process_is_taking_over_is_found_by_no_other(tmp_path: Path) -> None:
    dead = killed_writer(tmp_path, "node")
    found: list[int] = []
    by_another: list[str] = []

    def directory() -> Path:
        """Let another process look once this one has found the file, and before it is through."""
        if found:
            found.clear()
            command = [sys.executable, "-c", ADOPTER, str(tmp_path), str(dead)]
            by_another.append(
                subprocess.run(command, input="", capture_output=True, text=True).stdout
            )
        return tmp_path

    def is_alive(pid: int) -> bool:
        found.append(pid)
        return False

    journal = DeletionJournal(directory, "node")
    journal.adopt(is_alive)
    assert by_another == ["\n"]
    assert journal.left() == ["a", "c", "d"]


def test_who_takes_over_and_is_killed_leaves_it_to_others(tmp_path: Path) -> None:
    pid = killed_writer(tmp_path, "node")
    adopting = WRITER.partition("with")[0] + (
        f"journal.adopt(lambda other: other != {pid})\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", adopting, str(tmp_path), "node"], check=False)
    assert sorted(adopted(tmp_path, lambda pid: False)) == ["a", "c", "d"]


def test_nothing_is_left_on_disk_when_nothing_is_to_be_done(tmp_path: Path) -> None:
    journal = DeletionJournal(lambda: tmp_path, "node")
    give_up(journal, "a", "b")
    give_up(journal, "c")
    assert len(list(tmp_path.iterdir())) == 1
    journal.done(["a", "c"])
    assert journal.left() == ["b"]
    journal.done(["b"])
    assert journal.left() == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_postponed_comes_last() -> None:
    journal = DeletionJournal(lambda: None, "node")
    give_up(journal, "a", "b", "c")
    journal.postpone("a")
    journal.postpone("x")
    assert journal.left() == ["b", "c", "a"]


def test_the_file_has_little_more_than_what_is_left(tmp_path: Path) -> None:
    """Else one object that cannot be deleted would make it grow for ever."""
    journal = DeletionJournal(lambda: tmp_path, "node")
    give_up(journal, "overflow:a", "overflow:b")
    for number in range(20_000):
        with journal.deleting([f"c{number}"]):
            pass
    (file,) = tmp_path.iterdir()
    assert len(file.read_bytes().split()) < 1010
    journal.done(["overflow:b"])
    assert journal.left() == ["overflow:a"]
    assert adopted(tmp_path, lambda pid: False) == ["overflow:a"]


def test_a_line_that_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    Path(tmp_path, "node-17-abcd.deletions").write_text("\n+whole\n+ha")
    assert adopted(tmp_path, lambda pid: False) == ["whole"]


def test_what_an_earlier_process_of_the_same_id_had_left_is_found(tmp_path: Path) -> None:
    Path(tmp_path, f"node-{os.getpid()}-abcd.deletions").write_text("\n+theirs\n")
    journal = DeletionJournal(lambda: tmp_path, "node")
    give_up(journal, "mine")
    journal.done(["mine"])
    journal.adopt(lambda pid: True)
    assert journal.left() == ["theirs"]


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    for name in ("node-x.deletions", "node-1.deletions", "node-1-abcd.deletions.new"):
        Path(tmp_path, name).write_bytes(b"\xff")
    Path(tmp_path, "node-17-abcd.deletions").write_bytes(b"\n+cut off by a full \xff\n+whole\n")
    assert adopted(tmp_path, lambda pid: False)[-1] == "whole"


@pytest.mark.parametrize("directory", [None, "missing"])
def test_without_a_place_for_files_the_process_itself_knows(
    tmp_path: Path, directory: str | None
) -> None:
    journal = DeletionJournal(lambda: directory and tmp_path / directory, "node")
    give_up(journal, "a", "b")
    journal.done(["a"])
    assert journal.left() == ["b"]
    journal.adopt(lambda pid: False)
    assert journal.left() == ["b"]
