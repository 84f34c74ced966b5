"""Rate-limited reports of lasting failures, shared by all IO workers of a node.

After a failed spill, Ray calls the storage again at once, from up to four processes. If the storage
raises, Ray logs a traceback and prints it at every driver each time. So this package does not raise
where another attempt may help. It pauses or defers the work, and reports: one log line a minute,
one message to each driver once an outage has lasted for some seconds, and one when it is over.

Each resource has its own outage, because a success with one resource proves nothing about another.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray_valkey_spill.backoff import Backoff
from ray_valkey_spill.errors import (
    ConfigError,
    OverflowUnavailableError,
    ServerFullError,
    SpillError,
)
from ray_valkey_spill.format.names import TierName
from ray_valkey_spill.store.observer import Loss

__all__ = [
    "CONFIG",
    "OVERFLOW",
    "ROOM",
    "VALKEY",
    "Drivers",
    "Losses",
    "Outages",
    "resource_of",
]

logger = logging.getLogger("ray_valkey_spill")

# The resources that can be unavailable, as messages name them.
VALKEY, ROOM, OVERFLOW = "Valkey", "room in Valkey", "the overflow"
CONFIG = "the configuration of this node"

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 2.0
_BETWEEN_LOG_LINES = 60.0
# Seconds from the start of an outage to the message to drivers, between two such messages, and
# between two checks for drivers that have joined since.
_BEFORE_REPORT = 5.0
_BETWEEN_REPORTS = 60.0
_BETWEEN_LOOKS_FOR_DRIVERS = 10.0
# Seconds. Work that waits for a resource retries every two seconds. Without a failure for _FRESH,
# nothing waits for it, and its state is too old to defer work. Without one for _FORGOTTEN, the next
# failure begins a new outage.
_FRESH, _FORGOTTEN = 15.0, 120.0
# Seconds from the first loss to its message, which also counts the losses in between.
_BEFORE_LOSS_REPORT = 3.0
# Seconds for which `over` may rely on the latest look at the shared state.
_BETWEEN_GLANCES = 1.0
_NEVER = float("-inf")
# For how long a lock that another process holds is tried, in seconds between attempts.
_LOCK_ATTEMPTS, _LOCK_PAUSE = 50, 0.01

_PREFIX = "ray-valkey-spill: "


class Drivers(Protocol):
    """The drivers of the cluster, which print messages for users."""

    def notify(self, message: str, job: str | None = None) -> None:
        """Print a message at the driver of one job, given by its id, or at all drivers."""

    def running(self) -> Collection[str]:
        """Return the ids of the jobs with a running driver; empty if they are unknown."""


def resource_of(error: SpillError) -> str:
    """Return the resource that `error` shows to be unavailable."""
    kinds = (
        (OverflowUnavailableError, OVERFLOW),
        (ServerFullError, ROOM),
        (ConfigError, CONFIG),
    )
    return next((name for kind, name in kinds if isinstance(error, kind)), VALKEY)


# --- state shared by the IO workers of a node ---


class _SharedState:
    """A small JSON object in a file that the IO workers of a node share.

    Args:
        directory: returns the file's directory, or None to share nothing. The file is created when
            there is something to share. If it cannot be written, this process keeps its own state.
        name: name of the file.
    """

    def __init__(self, directory: Callable[[], Path | None], name: str) -> None:
        self._directory = directory
        self._name = name
        self._known_path: str | None = None
        self._alone: dict[str, Any] = {}
        self._alone_lock = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[dict[str, Any]]:
        """Lock the state against all threads and processes, and save the changes made within."""
        file = self._opened()
        if file is None:
            with self._alone_lock:
                yield self._alone
            return
        with file:
            file.seek(0)
            content = file.read()
            state = _parsed(content)
            yield state
            changed = json.dumps(state).encode()
            if changed == content:
                return
            try:
                file.truncate(0)
                file.write(changed)
            except OSError:
                self._alone, self._directory, self._known_path = state, lambda: None, None

    def glance(self) -> dict[str, Any]:
        """Return a recent copy of the state; empty if nothing was ever shared."""
        path = self._path()
        if path is None:
            return self._alone
        try:
            with open(path, "rb") as file:
                _lock(file, fcntl.LOCK_SH)
                return _parsed(file.read())
        except OSError:
            return self._alone

    def _opened(self) -> Any:
        """Return the file, locked for this thread; None if it cannot be opened or locked."""
        path = self._path()
        if path is None:
            return None
        with contextlib.ExitStack() as stack:
            try:
                # Unbuffered: bytes that a full disk refuses must not be written again on close.
                file = stack.enter_context(open(path, "ab+", buffering=0))
                # Each `open` has its own lock, so this also excludes other threads.
                _lock(file, fcntl.LOCK_EX)
            except OSError:  # another process keeps it; some file systems have no locks
                return None
            stack.pop_all()
            return file

    def _path(self) -> str | None:
        # Kept, because a restore looks at the state of each resource that it needs.
        if self._known_path is None and (directory := self._directory()) is not None:
            self._known_path = str(directory / self._name)
        return self._known_path


def _lock(file: Any, how: int) -> None:
    """Lock an open file, unless another process keeps it locked.

    That one may stand still: while plasma makes room for an object that an IO worker restores, all
    threads of that IO worker wait (Ray's `put_file_like_object` holds the GIL), perhaps for just
    this process to spill.

    Raises:
        OSError: it is locked for longer than anybody needs, or cannot be locked.
    """
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return
        time.sleep(_LOCK_PAUSE)
    raise OSError("it stays locked")


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        state = json.loads(content)
    except ValueError:  # a new file, or one that a full disk has cut off
        return {}
    return state if isinstance(state, dict) else {}


# --- outages ---


@dataclass
class _Outage:
    """The outage of one resource. Times are `time.monotonic()`, one clock for a whole machine.

    Attributes:
        since: its start; None if there is no outage.
        kinds: the kinds of work that wait for it, "spills" or a single object, each with the time
            until which it counts as failing. If a server takes reads but no writes, one kind
            succeeds and another fails.
        failures: number of failed attempts since its start.
        last: time of the latest failure.
        logged: time of the latest log line.
        reported: time of the latest message to drivers, also of an earlier outage.
        heard: whether drivers were notified of this outage.
        jobs: jobs with a notified driver.
        looked: time of the latest check for new drivers.
        waiting: by process id, or by object: the number that waits, and the time of that number.
    """

    since: float | None = None
    kinds: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    last: float = _NEVER
    logged: float = _NEVER
    reported: float = _NEVER
    heard: bool = False
    jobs: list[str] = field(default_factory=list)
    looked: float = _NEVER
    waiting: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any], resource: str) -> _Outage:
        try:
            return cls(**state[resource])
        except (KeyError, TypeError):
            return cls()

    def is_on(self, now: float) -> bool:
        return self.since is not None and now - self.last < _FRESH

    def is_failing(self, now: float) -> bool:
        return any(now < until for until in self.kinds.values())

    def is_forgotten(self, now: float) -> bool:
        """Whether its last failure and its last reports are too old to matter."""
        return now - max(self.last, self.logged, self.reported) > _FORGOTTEN

    def waiters(self, now: float) -> int:
        return int(sum(count for count, at in self.waiting.values() if now - at < _FRESH))


class Outages:
    """Tracks which resources are unavailable on this node, and since when. Thread-safe.

    Args:
        directory, name: the file that the IO workers of a node share: see `_SharedState`.
        drivers: are notified of lasting outages.
        clock: `time.monotonic`; a test may pass its own.
        sleep: `time.sleep`, likewise.
    """

    def __init__(
        self,
        directory: Callable[[], Path | None],
        name: str,
        drivers: Drivers,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = lambda seconds: time.sleep(seconds),
    ) -> None:
        self._state = _SharedState(directory, name)
        self._drivers = drivers
        self._clock = clock
        self._sleep = sleep
        self._backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        # Outages at the latest look at the shared state, and the time of that look.
        self._on: set[str] = set()
        self._noted: set[tuple[str, str]] = set()
        self._glanced = _NEVER

    def failed(
        self,
        resource: str,
        what: str,
        error: SpillError,
        waiting: int = 0,
        each: str | None = None,
    ) -> None:
        """Record that `what` waits for `resource`, and report it if a report is due.

        Args:
            resource: the unavailable resource.
            what: the kind of work that waits for it, in the plural: "spills".
            error: error of the latest attempt.
            waiting: number of operations of that kind that wait in this process.
            each: the operation that failed, if the success of others proves nothing about it.
        """
        self._glanced = _NEVER
        now = self._clock()
        with self._state.locked() as state:
            outage = _Outage.of(state, resource)
            if outage.since is None or now - outage.last > _FORGOTTEN:
                outage = _Outage(since=now, logged=outage.logged, reported=outage.reported)
            assert outage.since is not None
            outage.failures += 1
            outage.last = now
            outage.kinds[each or what] = now + (_FRESH if each is None else _FORGOTTEN)
            outage.waiting[each or str(os.getpid())] = [waiting, now]
            seconds = now - outage.since
            log = now - outage.logged >= _BETWEEN_LOG_LINES
            report = (
                not outage.heard
                and seconds >= _BEFORE_REPORT
                and now - outage.reported >= _BETWEEN_REPORTS
            )
            look = report or (outage.heard and now - outage.looked >= _BETWEEN_LOOKS_FOR_DRIVERS)
            outage.logged = now if log else outage.logged
            outage.looked = now if look else outage.looked
            if report:
                outage.heard, outage.reported = True, now
            failures, waiters = outage.failures, outage.waiters(now)
            for name in [*state]:
                if _Outage.of(state, name).is_forgotten(now):
                    del state[name]
            state[resource] = asdict(outage)
        count = f"{failures} failures in {seconds:.0f} s" if failures > 1 else "for now"
        count += f", {waiters} wait on this node" if waiters else ""
        text = f"{what} wait for {resource}, and are tried again until it works ({count}): {error}"
        if log:
            logger.warning("%s", text)
        if report:
            self._drivers.notify(f"{_PREFIX}{text}")
        if look:
            self._notify_new_drivers(resource, f"{_PREFIX}{text}", all_have_heard=report)

    def over(self, resource: str, each: str) -> None:
        """Record that `each` could use `resource`. Cheap while no resource is unavailable.

        The outage is over once each kind of work that failed has succeeded or is no longer tried.

        Args:
            resource: the resource that can be used.
            each: the work that used it: `each` of `failed`, or `what`.
        """
        self._backoff.renew()
        now = self._clock()
        if now - self._glanced >= _BETWEEN_GLANCES:
            state = self._state.glance()
            self._on = {name for name in state if _Outage.of(state, name).since is not None}
            self._noted.clear()
            self._glanced = now
        if resource not in self._on or (resource, each) in self._noted:
            return
        self._noted.add((resource, each))
        with self._state.locked() as state:
            outage = _Outage.of(state, resource)
            outage.kinds.pop(each, None)
            outage.waiting.pop(each, None)
            if outage.since is None or outage.is_failing(now):
                state[resource] = asdict(outage)
                return
            rested = _Outage(logged=outage.logged, reported=outage.reported)
            state[resource] = asdict(rested)
        seconds = now - outage.since
        text = f"{resource} can be used again, after {outage.failures} failures in {seconds:.0f} s"
        self._report_end(outage, outage.since, text)

    def forget(self) -> None:
        """End the outages of resources that nothing has waited for in the last two minutes."""
        now = self._clock()
        if not self._forgotten(self._state.glance(), now):
            return
        with self._state.locked() as state:
            ended = self._forgotten(state, now)
            for resource, outage in ended.items():
                rested = _Outage(logged=outage.logged, reported=outage.reported)
                state[resource] = asdict(rested)
        for resource, outage in ended.items():
            assert outage.since is not None
            text = f"nothing has waited for {resource} for {now - outage.last:.0f} s"
            self._report_end(outage, outage.since, text)

    @staticmethod
    def _forgotten(state: Mapping[str, Any], now: float) -> dict[str, _Outage]:
        outages = {resource: _Outage.of(state, resource) for resource in state}
        return {
            resource: outage
            for resource, outage in outages.items()
            if outage.since is not None and now - outage.last > _FORGOTTEN
        }

    def _report_end(self, outage: _Outage, since: float, text: str) -> None:
        if outage.logged >= since:
            logger.warning("%s", text)
        if outage.heard:
            self._drivers.notify(f"{_PREFIX}{text}")

    def is_on(self, resource: str) -> bool:
        """Whether an IO worker of the node has recently failed to use `resource`."""
        return _Outage.of(self._state.glance(), resource).is_on(self._clock())

    def pause(self) -> None:
        """Sleep before the next attempt, longer with each failure in a row, up to two seconds."""
        self._sleep(self._backoff.next())

    def _notify_new_drivers(self, resource: str, message: str, *, all_have_heard: bool) -> None:
        """Notify drivers that have joined since the outage was reported."""
        running = {*self._drivers.running()}
        with self._state.locked() as state:
            outage = _Outage.of(state, resource)
            new = running - {*outage.jobs}
            outage.jobs = sorted(running)
            state[resource] = asdict(outage)
        for job in () if all_have_heard else sorted(new):
            self._drivers.notify(message, job)


# --- losses ---

# Singular and plural.
_VERBS: Mapping[Loss, tuple[str, str]] = {
    "missing": ("is missing from", "are missing from"),
    "damaged": ("is damaged in", "are damaged in"),
    "foreign": ("has a URL unknown to", "have URLs unknown to"),
}
_EXPLANATIONS: Mapping[tuple[Loss, TierName], str] = {
    ("missing", "valkey"): "Usually the server was restarted without its data, was flushed "
    "(FLUSHALL), or evicted them (maxmemory-policy allkeys-*): INFO shows uptime_in_seconds and "
    "evicted_keys",
    ("missing", "overflow"): "Usually somebody removed its files",
    ("damaged", "valkey"): "Another program writes to these keys, or memory is faulty",
    ("damaged", "overflow"): "Another program writes to these files, or a disk is faulty",
}


class Losses:
    """Reports the number of lost objects to drivers, at most once a minute per node.

    Ray prints a traceback for each, which names neither the tier nor the cause.

    Args:
        directory, name: as for `Outages`.
        drivers: are notified of losses.
        places: returns the location of a tier, for messages.
        clock: `time.monotonic`; a test may pass its own.
    """

    _REPORTED = "reported"

    def __init__(
        self,
        directory: Callable[[], Path | None],
        name: str,
        drivers: Drivers,
        places: Callable[[TierName], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = _SharedState(directory, name)
        self._drivers = drivers
        self._places = places
        self._clock = clock
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def add(self, reason: Loss, tier: TierName) -> None:
        """Count a lost object, and report it soon, together with those that follow."""
        with self._state.locked() as state:
            kind = f"{reason} {tier}"
            state[kind] = state.get(kind, 0) + 1
            due = max(_BEFORE_LOSS_REPORT, self._wait(state))
        self._start(due)

    def report(self) -> None:
        """Report new losses, unless the latest report was less than a minute ago."""
        with self._state.locked() as state:
            kinds = {kind: count for kind, count in state.items() if kind != self._REPORTED}
            wait = self._wait(state)
            if kinds and wait <= 0:
                state.clear()
                state[self._REPORTED] = self._clock()
        if not kinds:
            return
        if wait > 0:
            self._start(wait)
            return
        self._drivers.notify(_PREFIX + " ".join(self._sentences(kinds)))

    def _wait(self, state: Mapping[str, Any]) -> float:
        return float(state.get(self._REPORTED, _NEVER)) + _BETWEEN_REPORTS - self._clock()

    def _start(self, seconds: float) -> None:
        with self._lock:
            if self._timer is None or not self._timer.is_alive():
                self._timer = threading.Timer(seconds, self._fire)
                self._timer.name = "ray-valkey-spill-losses"
                self._timer.daemon = True
                # If no thread can be started, the next loss tries again.
                with contextlib.suppress(RuntimeError):
                    self._timer.start()

    def _fire(self) -> None:
        with self._lock:
            self._timer = None
        self.report()

    def _sentences(self, kinds: Mapping[str, int]) -> Iterator[str]:
        reason: Loss
        tier: TierName
        for reason, (one, more) in _VERBS.items():
            for tier in ("valkey", "overflow"):
                count = kinds.get(f"{reason} {tier}", 0)
                if not count:
                    continue
                found = f"object {one}" if count == 1 else f"objects {more}"
                explanation = _EXPLANATIONS.get((reason, tier))
                yield (
                    f"{count} spilled {found} {self._places(tier)}: readers get ObjectLostError."
                    + (f" {explanation}." if explanation else "")
                )
