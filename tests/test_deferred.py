"""Restores that wait: whose they are, and that none of them waits for another."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.servers import wait_until

from ray_valkey_spill.errors import ServerUnavailableError, SpillError
from ray_valkey_spill.plugin.deferred import DeferredRestores, Restore

AWAY = ServerUnavailableError("the server cannot be reached")
SERVER = "the server"


class World:
    """What can be restored, and what was. A fake: real ones are for `test_ray_away`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.errors: dict[str, Exception] = {}
        self.reports = 0
        self.restored: list[str] = []
        self.tried: list[str] = []
        self.open = 0
        self.now = 1000.0
        self.refused_restorers = self.failing_reports = 0
        self._all: list[DeferredRestores] = []

    def node(self, identity_of: Callable[[int], str | None] = str) -> DeferredRestores:
        it = DeferredRestores(
            lambda: self.directory,
            "restores",
            identity_of,
            self._new_restorer,
            self._failed,
            lambda: self.now,
        )
        self._all.append(it)
        return it

    def _new_restorer(self) -> Restorer:
        if self.refused_restorers:
            self.refused_restorers -= 1
            raise OSError("too many open files")
        self.open += 1
        return Restorer(self)

    def _failed(self, restore: Restore, error: SpillError, waiting: int) -> str:
        self.reports += 1
        if self.failing_reports:
            self.failing_reports -= 1
            raise RuntimeError("the raylet cannot be reached")
        return SERVER

    def wait_for_attempt(self) -> None:
        """Wait for one that begins from now on: what is under way may have failed before."""
        attempts = self.reports
        wait_until(lambda: self.reports > attempts + 1)

    @property
    def claims(self) -> list[str]:
        directory = self.directory / "restores"
        return [path.name for path in directory.iterdir()] if directory.exists() else []

    def end(self) -> None:
        self.errors.clear()
        wait_until(lambda: not threads())
        assert not self.open


class Restorer:
    def __init__(self, world: World) -> None:
        self._world = world

    def restore(self, wanted: Restore) -> None:
        self._world.tried.append(wanted.object_id)
        if (error := self._world.errors.get(wanted.object_id)) is not None:
            raise error
        self._world.restored.append(wanted.object_id)

    def close(self) -> None:
        self._world.open -= 1


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ray-valkey-spill-deferred")]


def restores(*names: str) -> list[Restore]:
    return [Restore(name, f"ray:{name}") for name in names]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.end()


def test_what_waits_is_restored_once_it_can_be(world: World) -> None:
    world.errors = {"aa": AWAY, "bb": AWAY}
    it = world.node()
    it.add(SERVER, restores("aa", "bb"))
    wait_until(lambda: world.reports > 1)
    assert sorted(world.claims) == ["aa", "bb"]
    world.errors.clear()
    wait_until(lambda: sorted(world.restored) == ["aa", "bb"] and not world.claims)
    assert it.count(SERVER) == 0


def test_one_that_fails_again_and_again_does_not_hold_up_those_after_it(world: World) -> None:
    world.errors = {"aa": AWAY}
    it = world.node()
    it.add(SERVER, restores("aa", "bb", "cc"))
    wait_until(lambda: sorted(world.restored) == ["bb", "cc"])
    assert it.count(SERVER) == 1


@pytest.mark.parametrize("what", ["refused_restorers", "failing_reports"])
def test_whatever_else_fails_is_tried_again(world: World, what: str) -> None:
    world.errors = {"aa": AWAY}
    setattr(world, what, 1)
    world.node().add(SERVER, restores("aa"))
    wait_until(lambda: getattr(world, what) == 0)
    world.errors.clear()
    wait_until(lambda: world.restored == ["aa"])


def test_what_another_process_was_asked_to_delete_is_waited_for_no_more(world: World) -> None:
    world.errors = {"aa": AWAY, "bb": AWAY}
    it, another = world.node(), world.node()
    it.add(SERVER, restores("aa", "bb"))
    wait_until(lambda: world.reports > 1)
    another.forget(["aa"])
    wait_until(lambda: it.count(SERVER) == 1)
    world.errors.clear()
    wait_until(lambda: world.restored == ["bb"] and not world.claims)


# Ray asks after 10 s, then after 20, 40, 80, …


def test_what_ray_asks_for_no_more_is_not_restored(world: World) -> None:
    world.errors = {"aa": AWAY, "bb": AWAY}
    it = world.node()
    it.add(SERVER, restores("aa", "bb"))
    world.now += 50
    it.add(SERVER, restores("bb"))
    world.now += 50
    wait_until(lambda: world.claims == ["bb"])
    assert it.count(SERVER) == 1
    world.errors.clear()
    wait_until(lambda: not threads())
    assert world.restored == ["bb"]


def test_what_ray_asks_for_ever_more_rarely_goes_on_waiting(world: World) -> None:
    world.errors = {"aa": AWAY}
    it = world.node()
    it.add(SERVER, restores("aa"))
    for seconds in (10, 20, 40):
        world.now += seconds
        world.wait_for_attempt()
        it.add(SERVER, restores("aa"))
    world.now += 130
    world.wait_for_attempt()
    assert it.count(SERVER) == 1
    world.now += 100
    wait_until(lambda: not it.count(SERVER) and not world.claims)


ANOTHER_PROCESS = """
import sys
from pathlib import Path
from ray_valkey_spill.plugin.deferred import DeferredRestores, Restore
directory, now = sys.argv[1:]
node = DeferredRestores(lambda: Path(directory), "restores", str, None, None, lambda: float(now))
node.add("the server", [Restore("aa", "ray:aa")])
print(node.count("the server"))
"""


def test_what_ray_asks_another_process_for_goes_on_waiting(world: World) -> None:
    world.errors = {"aa": AWAY, "bb": AWAY}
    it = world.node()
    it.add(SERVER, restores("aa", "bb"))
    world.now += 50
    asked = [sys.executable, "-c", ANOTHER_PROCESS, str(world.directory), str(world.now)]
    assert subprocess.run(asked, capture_output=True, check=True).stdout == b"0\n"
    world.now += 50
    wait_until(lambda: world.claims == ["aa"])
    world.errors.clear()
    wait_until(lambda: not threads())
    assert world.restored == ["aa"]


def test_what_ray_asks_for_no_more_ends_where_nothing_can_be_shared(world: World) -> None:
    world.directory = world.directory / "missing"
    world.errors = {"aa": AWAY}
    it = world.node()
    it.add(SERVER, restores("aa"))
    world.now += 50
    it.add(SERVER, restores("aa"))
    world.now += 50
    world.wait_for_attempt()
    assert it.count(SERVER) == 1
    world.now += 100
    wait_until(lambda: not it.count(SERVER))


def test_what_waits_for_something_else_after_all_is_as_old_as_before(world: World) -> None:
    world.errors = {"aa": AWAY}
    it = world.node()
    it.add("another server", restores("aa"))
    wait_until(lambda: it.count(SERVER) == 1)
    assert world.claims == ["aa"]
    world.now += 100
    wait_until(lambda: not it.count(SERVER) and not world.claims)


def test_without_a_directory_nothing_is_taken_for_deleted(world: World) -> None:
    world.directory = world.directory / "missing"
    world.errors = {"aa": AWAY}
    world.node().add(SERVER, restores("aa"))
    wait_until(lambda: world.reports > 1)
    world.errors.clear()
    wait_until(lambda: world.restored == ["aa"])


def leave_claim(world: World, pid: int, started: str) -> None:
    directory = world.directory / "restores"
    directory.mkdir()
    (directory / "aa").write_text(f"{pid} {started} {world.now} ray:aa\n")
    os.utime(directory / "aa", (world.now, world.now))
    world.errors = {"aa": AWAY}


def test_what_a_killed_process_had_is_adopted_by_one(world: World) -> None:
    leave_claim(world, 1, "1000")
    nodes = [world.node(lambda pid: str(pid) if pid == os.getpid() else None) for _ in range(2)]
    nodes[0].adopt(lambda url: SERVER)
    wait_until(lambda: nodes[0].count(SERVER) == 1)
    nodes[1].adopt(lambda url: SERVER)
    assert nodes[1].count(SERVER) == 0
    assert world.claims == ["aa"]


def test_what_a_killed_process_had_is_as_old_as_before(world: World) -> None:
    leave_claim(world, 1, "1000")
    world.now += 1000
    os.utime(world.directory / "restores/aa", (world.now, world.now))
    node = world.node(lambda pid: str(pid) if pid == os.getpid() else None)
    node.adopt(lambda url: SERVER)
    world.now += 1900
    world.wait_for_attempt()
    assert node.count(SERVER) == 1
    world.now += 200
    wait_until(lambda: not node.count(SERVER) and not world.claims)


def test_what_a_killed_process_had_is_not_that_of_another_with_its_id(world: World) -> None:
    leave_claim(world, 1, "1000")
    node = world.node(lambda pid: f"{pid}000" if pid == os.getpid() else "2000")
    node.add(SERVER, restores("aa"))
    assert node.count(SERVER) == 1


def test_what_a_living_process_has_is_left_to_it(world: World) -> None:
    leave_claim(world, 1, "1000")
    node = world.node(lambda pid: "1000")
    node.add(SERVER, restores("aa"))
    node.adopt(lambda url: SERVER)
    assert node.count(SERVER) == 0
