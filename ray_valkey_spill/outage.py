"""Failures that go on: attempts are paced and told of in measure, by all IO workers of a node.

Ray calls a storage again at once after a spill that failed, from up to four processes, and if it
raised, Ray logs a traceback and prints it at every driver each time. So this package does not raise
where trying again may help. It pauses, and tells of it: the log once a minute, drivers once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_valkey_spill.errors import SpillError

__all__ = ["Outage"]

logger = logging.getLogger("ray_valkey_spill")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 2.0
_BETWEEN_LOG_LINES = 60.0
_BETWEEN_TELLS = 600.0
_NEVER = float("-inf")


@dataclass
class _State:
    """Times are `time.monotonic()`, which all processes of a machine share."""

    since: float | None = None
    failures: int = 0
    logged: float = _NEVER
    told: float = _NEVER


class Outage:
    """Whether, and since when, the server cannot be used from this node.

    Args:
        directory: gives where the IO workers of the node keep what they have to know of each
            other, or None if there is nobody else. It is asked for, and the file is made, when
            something fails. Where it cannot be written, this process counts for itself.
        name: that of the file.
        tell: is given the message that is for users.
    """

    def __init__(
        self, directory: Callable[[], Path | None], name: str, tell: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._name = name
        self._tell = tell
        self._alone = _State()
        self._failing = False
        self._pause = _FIRST_PAUSE

    def failed(self, what: str, error: SpillError) -> None:
        """Tell of a failure, unless that was done lately."""
        self._failing = True
        now = time.monotonic()
        with self._state() as state:
            new = state.since is None
            state.since = now if state.since is None else state.since
            state.failures += 1
            tell = new and now - state.told >= _BETWEEN_TELLS
            log = now - state.logged >= _BETWEEN_LOG_LINES
            state.told = now if tell else state.told
            state.logged = now if log else state.logged
            failures, seconds = state.failures, now - state.since
        count = f"{failures} failures in {seconds:.0f} s so far" if failures > 1 else "for now"
        if log:
            logger.warning("%s, and will be tried again (%s): %s", what, count, error)
        if tell:
            self._tell(f"ray-valkey-spill: {what}, and will be tried again until it works: {error}")

    def pause(self) -> None:
        """Sleep before the next attempt: longer with each in a row, up to two seconds."""
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def over(self) -> None:
        """Note that the server can be used."""
        if not self._failing:
            return
        self._failing, self._pause = False, _FIRST_PAUSE
        with self._state() as state:
            if state.since is not None:
                seconds = time.monotonic() - state.since
                logger.warning("works again, after %d failures in %.0f s", state.failures, seconds)
            state.since, state.failures = None, 0

    @contextlib.contextmanager
    def _state(self) -> Iterator[_State]:
        """What the node's IO workers know together, for this one alone meanwhile."""
        directory = self._directory()
        try:
            # Unbuffered: what a full disk refuses must not come up again at the end.
            file = (directory / self._name).open("ab+", buffering=0) if directory else None
        except OSError:
            file = None
        if file is None:
            yield self._alone
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            try:
                state = _State(**json.loads(file.read()))
            except (ValueError, TypeError):  # a new file
                state = _State()
            yield state
            try:
                file.truncate(0)
                file.write(json.dumps(asdict(state)).encode())
            except OSError:
                self._alone, self._directory = state, lambda: None
