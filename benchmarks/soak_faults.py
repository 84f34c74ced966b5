"""The faults of a soak: one table of what strikes, and on which kinds of server."""

from __future__ import annotations

import collections
import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support import faults
from support.clusters import add_node, failures, io_workers, kill_node, talks_to
from support.faults import HasStruck
from support.hanging import HangingDirectory
from support.servers import wait_until

from benchmarks.soak_driver import DROPS_OF_ALL, HANG, OWNERS_KILLED
from benchmarks.soak_kinds import ALL, KEYS, ONE_SERVER, TOPOLOGIES, Target
from benchmarks.soak_watch import Driver
from ray_valkey_spill.format.names import ObjectName

# Seconds within which objects are removed that nobody references any more, of dead nodes too; and
# those after which Ray has noticed.
RECLAIMED_WITHIN, NOTICED_WITHIN = 120.0, 10.0
# Seconds within which a node that is at work spills something of each driver, if it ever does.
UNTIL_SPILLED = 40.0


@dataclass
class Scene:
    """A Ray at work, the servers that it spills to, and what was done to them.

    Attributes:
        destroyed: a file with the time of the latest destruction of data.
        operations: what drivers have done that are no more.
        reclaimed: how many objects of dead nodes were removed once nobody referenced them, and how
            many seconds later.
        failures: what had gone wrong with drivers before they were killed.
    """

    target: Target
    nodes: Any
    destroyed: Path
    random: random.Random
    drivers: list[Driver] = field(default_factory=list)
    operations: collections.Counter[str] = field(default_factory=collections.Counter)
    dead_nodes: set[str] = field(default_factory=set)
    reclaimed: list[tuple[int, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add_driver(self) -> None:
        seed = self.random.getrandbits(32)
        self.drivers.append(Driver(self.nodes.address, seed, self.destroyed))

    def a_driver(self) -> Driver:
        return self.random.choice(self.drivers)

    def kill_driver(self, driver: Driver) -> None:
        """Kill it, and start another one."""
        self.drivers.remove(driver)
        self.operations += driver.stop(kill=True)
        if driver.failed is not None:
            self.failures.append(driver.failed)
        self.add_driver()

    def kill_a_node(self) -> None:
        """Another than the head, on which the drivers are."""
        self.dead_nodes.add(self.next_to_die)
        kill_node(self.nodes, 1)

    @property
    def next_to_die(self) -> str:
        """The id of the node that `kill_a_node` would kill."""
        return str(self.nodes.list_all_nodes()[1].node_id)

    def spilled(self, job: str) -> dict[str, str]:
        """What is spilled of the objects that a job owns: by name, the node that has spilled it.

        Without what stays until the session ends.
        """
        names = {entry.name for entry in self.target.entries()} - self._staying()
        return {str(name): name.node for name in names if job_of(name.object_id) == job}

    def left(self) -> list[str]:
        """The keys and files that there should not be once nothing is referenced any more."""
        staying = {KEYS.header(name) for name in self._staying()}
        left = [
            each
            for each in self.target.left()
            if each not in staying and each.rpartition(":")[0] not in staying
        ]
        return [each for each in left if not staying or each not in (KEYS.index, KEYS.usage)]

    def _staying(self) -> set[ObjectName]:
        """What dead nodes have spilled and nobody can be asked for, since its header is damaged."""
        names = (entry.name for entry in self.target.entries())
        return {
            name
            for name in names
            if name.node in self.dead_nodes and self.target.lacks_its_header(name)
        }


def job_of(object_id: str) -> str:
    """The job in an object's id: eight random bytes, twelve of an actor, four of the job, …"""
    return object_id[40:48]


SceneFault = Callable[[Scene], AbstractContextManager[HasStruck]]


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault in the table.

    Attributes:
        name: in the report.
        fault: what happens.
        kinds: those of server on which it makes sense.
        lasts: whether it is held for a while.
        takes: seconds that it may well take; it does not begin later than that before the end.
        times: in each round of all faults.
        destroys: whether data are destroyed. A round has one such fault.
    """

    name: str
    fault: SceneFault
    kinds: frozenset[str]
    lasts: bool = True
    takes: float = 0.0
    times: int = 1
    destroys: bool = False


def strikes(kind: str) -> list[Strike]:
    """The faults that make sense on a kind of server."""
    return [strike for strike in TABLE if kind in strike.kinds]


def a_round(kind: str, choices: random.Random, before: Mapping[str, int]) -> list[Strike]:
    """All faults of a kind, as often as they come in a round; the next one is the last.

    Args:
        kind: of server.
        choices: for their order.
        before: how often each has struck before. Those that have least, for their `times`, come
            first, also of those that destroy data.
    """

    def so_far(strike: Strike) -> float:
        return before.get(strike.name, 0) / strike.times

    possible = strikes(kind)
    drawn = [strike for strike in possible if not strike.destroys for _ in range(strike.times)]
    destroying = [strike for strike in possible if strike.destroys]
    choices.shuffle(destroying)
    drawn.append(min(destroying, key=so_far))
    choices.shuffle(drawn)
    return sorted(drawn, key=so_far, reverse=True)


# --- Ray's processes ---


@contextlib.contextmanager
def _an_io_worker_is_killed(scene: Scene) -> Iterator[HasStruck]:
    """One that is at work, or was: killed before it has registered, it costs Ray a minute."""
    ports = scene.target.rig.ports
    at_work = [each for each in io_workers() if any(talks_to(each, port) for port in ports)]
    killed = False
    if at_work:
        with contextlib.suppress(psutil.Error):
            scene.random.choice(at_work).send_signal(signal.SIGKILL)
            killed = True
    yield lambda: killed


@contextlib.contextmanager
def _a_driver_is_killed(scene: Scene) -> Iterator[HasStruck]:
    scene.kill_driver(scene.a_driver())
    yield lambda: True


@contextlib.contextmanager
def _an_owner_is_killed(scene: Scene) -> Iterator[HasStruck]:
    """An actor that owns objects."""
    driver = scene.a_driver()
    before = driver.operations[OWNERS_KILLED]
    driver.tell("kill owner")
    yield lambda: driver.operations[OWNERS_KILLED] > before


@contextlib.contextmanager
def _a_node_is_killed(scene: Scene) -> Iterator[HasStruck]:
    """And replaced, at once or after a while."""
    scene.kill_a_node()
    yield lambda: True
    add_node(scene.nodes, 1)


@contextlib.contextmanager
def _a_node_joins_and_one_is_killed(scene: Scene) -> Iterator[HasStruck]:
    add_node(scene.nodes, 1)
    yield lambda: True
    scene.kill_a_node()


def _drop_all(scene: Scene, driver: Driver) -> None:
    before = driver.operations[DROPS_OF_ALL]
    driver.tell("drop all")
    wait_until(lambda: driver.operations[DROPS_OF_ALL] > before or driver.failure(), HANG)


def _of_a_dead_node(end: Callable[[Scene, Driver], None]) -> SceneFault:
    """A node is killed, then the references of a driver end: its objects must be removed."""

    @contextlib.contextmanager
    def fault(scene: Scene) -> Iterator[HasStruck]:
        driver = scene.a_driver()
        job = driver.job
        with contextlib.suppress(AssertionError):
            wait_until(lambda: scene.next_to_die in scene.spilled(job).values(), UNTIL_SPILLED)
        scene.kill_a_node()
        add_node(scene.nodes, 1)
        before = scene.spilled(job)
        end(scene, driver)
        start = time.monotonic()
        timeout = RECLAIMED_WITHIN + NOTICED_WITHIN
        wait_until(lambda: not before.keys() & scene.spilled(job).keys(), timeout)
        of_dead = sum(node in scene.dead_nodes for node in before.values())
        if of_dead:
            scene.reclaimed.append((of_dead, time.monotonic() - start))
        yield lambda: of_dead > 0

    return fault


# --- the table ---


def _of_servers(fault: faults.Fault) -> SceneFault:
    return lambda scene: fault(scene.target.rig)


@contextlib.contextmanager
def _the_server_is_full(scene: Scene) -> Iterator[HasStruck]:
    """Ray may hear of it from the package, before the server refuses anything."""
    before = _failures()
    with faults.is_full(scene.target.rig) as has_refused:
        yield lambda: has_refused() or _failures() > before


def _failures() -> int:
    """As `failures`; none where an IO worker is just writing that down."""
    with contextlib.suppress(OSError, ValueError):
        return failures()
    return 0


def _of_the_overflow(
    fault: Callable[[HangingDirectory], AbstractContextManager[HasStruck]],
) -> SceneFault:
    def strikes_it(scene: Scene) -> AbstractContextManager[HasStruck]:
        assert scene.target.share is not None
        return fault(scene.target.share)

    return strikes_it


def _server(fault: faults.Fault, kinds: frozenset[str], **options: Any) -> Strike:
    name = getattr(fault, "__name__", "").replace("_", " ")
    return Strike(name, _of_servers(fault), kinds, **options)


_MOMENT = {"lasts": False}
_DESTROYS = {"lasts": False, "destroys": True}
_WITH_PASSWORD = frozenset({"tls"})
_CLUSTER, _SENTINEL = frozenset({"cluster"}), frozenset({"sentinel"})
_OVERFLOW = frozenset({"overflow"})

TABLE = [
    Strike("an IO worker is killed", _an_io_worker_is_killed, ALL, lasts=False, times=3),
    Strike("a driver is killed", _a_driver_is_killed, ALL, lasts=False),
    Strike("an owner is killed", _an_owner_is_killed, ALL, lasts=False),
    Strike("a node is killed, and another one comes", _a_node_is_killed, ALL, times=2),
    Strike("a node comes, and one is killed", _a_node_joins_and_one_is_killed, ALL),
    Strike(
        "reclaiming: of a killed node, a driver drops all",
        _of_a_dead_node(_drop_all),
        ALL,
        lasts=False,
        takes=60,
    ),
    Strike(
        "reclaiming: of a killed node, a driver is killed",
        _of_a_dead_node(Scene.kill_driver),
        ALL,
        lasts=False,
        takes=60,
    ),
    _server(faults.resets_connections, ONE_SERVER, **_MOMENT),
    _server(faults.resets_after_some_more_bytes, ONE_SERVER, **_MOMENT),
    _server(faults.refuses_connections, ONE_SERVER),
    _server(faults.stalls, ONE_SERVER),
    _server(faults.delays, ONE_SERVER),
    _server(faults.trickles, ONE_SERVER),
    _server(faults.forgets_connections, ONE_SERVER),
    _server(faults.leads_to_a_replica_that_lags, ONE_SERVER),
    _server(faults.stands_still, ONE_SERVER),
    _server(faults.is_killed_and_has_its_append_only_file, ONE_SERVER, **_MOMENT),
    _server(faults.is_restarted_and_has_its_snapshot, ONE_SERVER, **_MOMENT),
    _server(faults.is_away_and_then_loads_its_data, ONE_SERVER),
    _server(faults.kills_our_connections, ALL, **_MOMENT),
    _server(faults.takes_no_more_clients, ONE_SERVER),
    _server(faults.becomes_a_replica, ONE_SERVER),
    _server(faults.lacks_replicas, ALL),
    _server(faults.runs_a_long_script, ONE_SERVER),
    Strike("is full", _the_server_is_full, ALL),
    _server(faults.cannot_save, ONE_SERVER),
    _server(faults.wants_a_password, ONE_SERVER - _WITH_PASSWORD),
    _server(faults.has_another_password_for_the_user, _WITH_PASSWORD),
    _server(faults.forbids_set, ALL),
    _server(faults.forbids_get, ALL),
    _server(faults.forbids_unlink, ALL),
    Strike("the overflow hangs", _of_the_overflow(faults.hangs), _OVERFLOW, times=2),
    Strike("the overflow fails", _of_the_overflow(faults.fails), _OVERFLOW),
    _server(faults.loses_a_primary, TOPOLOGIES, times=2),
    _server(faults.loses_a_replica, TOPOLOGIES),
    _server(faults.has_a_primary_that_stands_still, TOPOLOGIES),
    _server(faults.fails_over_as_asked, TOPOLOGIES, **_MOMENT),
    _server(faults.moves_a_slot_of_data, _CLUSTER, **_MOMENT),
    _server(faults.moves_the_slot_of_the_metadata, _CLUSTER, **_MOMENT),
    _server(faults.loses_a_sentinel, _SENTINEL),
    _server(faults.is_restarted_empty, ONE_SERVER, **_DESTROYS),
    _server(faults.is_flushed, ALL, **_DESTROYS),
    _server(faults.loses_some_keys, ALL, **_DESTROYS),
    _server(faults.has_foreign_values_under_our_keys, ALL, **_DESTROYS),
    _server(faults.flips_bits, ALL, **_DESTROYS),
]
