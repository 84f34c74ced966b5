"""Restores that wait for something that is away, without holding up anything else.

Ray has few restore workers on a node, each of which does one request at a time, so whoever waits
inside a request holds up the restores that could go on. Ray's own retries come after 10 s, then 20,
and ever later (`PullManager::UpdateRetryTimer`), so failing the request is not enough either. So a
restore that has to wait is put off: Ray's request ends without the object, and a thread of the IO
worker puts the object into plasma once it can be read. Ray does not mind who does that: it wakes
whoever waits for the object when plasma seals it.

Each deferred restore is one IO worker's, however often Ray asks the others for it. If that one is
killed, another one of its node that restores takes over what it had.

Ray does not say that nobody waits for an object any more: it only stops asking, when a `ray.get`
has timed out, or when plasma has no room for all that is wanted. A deferred restore ends then too,
because the object would take room in plasma from objects that somebody waits for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ray_valkey_spill.backoff import Backoff
from ray_valkey_spill.errors import SpillError

__all__ = ["DeferredRestores", "Restore", "Restorer"]

logger = logging.getLogger("ray_valkey_spill")

# Seconds between two attempts.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 2.0

# Ray asks for an object again after 10 s (`object_manager_pull_timeout_ms`), and each time waits
# twice as long as before: so the next request comes after about as long as all before it took.
# Nobody waits for the object if it does not come in twice that time, nor in these seconds, which
# leave room for a longer period and a busy node. If that is wrong, Ray's next request restores it.
_UNASKED = 60.0


@dataclass(frozen=True, slots=True)
class Restore:
    """An object that Ray asked for: its id in hex, and the URL that Ray has for it."""

    object_id: str
    url: str


class Restorer(Protocol):
    """Restores objects in one thread, with connections of its own."""

    def restore(self, wanted: Restore) -> None:
        """Put an object, or that it is lost, into plasma, unless plasma has it or refuses it.

        Raises:
            SpillError: what is away still is.
        """

    def close(self) -> None:
        """Drop the connections."""


class _Claim(NamedTuple):
    """A process has a restore: its id, and its identity among all processes with that id.

    `first` is when Ray first asked for it.
    """

    pid: int
    identity: str
    first: float
    url: str


@dataclass(slots=True)
class _Waiting:
    """A restore that waits, and when Ray first and last asked for it, as far as is known here.

    Times are the clock's, in seconds.
    """

    restore: Restore
    first: float
    last: float


class _Claims:
    """Which IO worker of the node has which deferred restore: a file for each, named by the object.

    The file's time of modification is when Ray last asked any IO worker for the object. Where files
    cannot be written, each IO worker has all that Ray asks it for.

    Args:
        directory: returns the directory of shared files, or None if there is none.
        name: of the directory in it that the files are in.
        identity_of: returns the identity of the process with an id, among all that had that id or
            will have it; None if none has it now.
    """

    def __init__(
        self,
        directory: Callable[[], Path | None],
        name: str,
        identity_of: Callable[[int], str | None],
    ) -> None:
        self._session = directory
        self._name = name
        self._identity_of = identity_of
        # Those with a file; the others are this process's as long as it lives.
        self._filed: set[str] = set()

    def take(self, waiting: _Waiting) -> bool:
        """Claim a restore for this process; returns False if another living one has it.

        Either way, the claim is as old as the oldest for that restore, and as new as the newest.
        """
        directory = self._directory()
        if directory is None:
            return True
        object_id = waiting.restore.object_id
        path = directory / object_id
        # A link to what has been written: nobody sees half of it.
        written = path.with_suffix(f".{os.urandom(4).hex()}")
        try:
            directory.mkdir(exist_ok=True)
            pid = os.getpid()
            for _ in range(2):
                claim = _Claim(pid, str(self._identity_of(pid)), waiting.first, waiting.restore.url)
                written.write_text(" ".join(map(str, claim)) + "\n")
                os.utime(written, (waiting.last, waiting.last))
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(written)
                    self._filed.add(object_id)
                    return True
                claim = _read(path)
                if claim.pid != pid and self._stands(claim):
                    os.utime(path, (waiting.last, waiting.last))
                    return False
                waiting.first = min(waiting.first, claim.first)
                # Of those that find it left, the one that moves it away may claim it.
                path.rename(path.with_suffix(f".{os.urandom(4).hex()}")).unlink()
        except (OSError, ValueError):
            return True
        finally:
            with contextlib.suppress(OSError):
                written.unlink()
        return False

    def note_request(self, object_id: str, now: float) -> None:
        """Note that Ray asks for a restore of this process."""
        if object_id in self._filed and (directory := self._directory()) is not None:
            with contextlib.suppress(OSError):
                os.utime(directory / object_id, (now, now))

    def asked(self, waiting: _Waiting) -> float | None:
        """When Ray last asked for a restore of this process; None if its claim stands no more."""
        object_id = waiting.restore.object_id
        directory = self._directory()
        if directory is not None and object_id in self._filed:
            try:
                return max(waiting.last, (directory / object_id).stat().st_mtime)
            except FileNotFoundError:
                return None
            except OSError:
                pass  # only this process knows, then
        return waiting.last

    def drop(self, object_id: str) -> None:
        """Give up the claim to an object, whichever process has it."""
        self._filed.discard(object_id)
        if (directory := self._directory()) is not None:
            with contextlib.suppress(OSError):
                (directory / object_id).unlink()

    def of_the_dead(self) -> list[_Waiting]:
        """What killed processes of the node had deferred."""
        directory = self._directory()
        left = []
        with contextlib.suppress(OSError):
            for path in list(directory.iterdir()) if directory else ():
                with contextlib.suppress(OSError, ValueError):
                    claim, last = _read(path), path.stat().st_mtime
                    if not path.suffix and not self._stands(claim):
                        left.append(_Waiting(Restore(path.name, claim.url), claim.first, last))
        return left

    def _stands(self, claim: _Claim) -> bool:
        return self._identity_of(claim.pid) == claim.identity

    def _directory(self) -> Path | None:
        directory = self._session()
        return directory and directory / self._name


def _read(path: Path) -> _Claim:
    """Raises OSError, or ValueError."""
    pid, identity, first, url = path.read_text(errors="replace").rstrip("\n").split(" ", 3)
    return _Claim(int(pid), identity, float(first), url)


class DeferredRestores:
    """Restores that wait: a thread for each resource that is away, for as long as any waits for it.

    For any number of threads.

    Args:
        directory, name, identity_of: where the IO workers of the node share who has deferred what:
            see `_Claims`.
        new_restorer: makes one for a thread.
        failed: is given a restore that failed, its error, and how many wait for the same; returns
            the resource that the error shows to be away.
        clock: one that all processes of the machine share, as they do `time.monotonic`.
    """

    def __init__(
        self,
        directory: Callable[[], Path | None],
        name: str,
        identity_of: Callable[[int], str | None],
        new_restorer: Callable[[], Restorer],
        failed: Callable[[Restore, SpillError, int], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._claims = _Claims(directory, name, identity_of)
        self._new_restorer = new_restorer
        self._failed = failed
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, _Waiting]] = {}
        self._threads: dict[str, threading.Thread] = {}
        # Objects whose unexpected errors the log has.
        self._complained: set[str] = set()

    def add(self, resource: str, restores: Iterable[Restore]) -> None:
        """Let `restores`, for which Ray asks now, wait for `resource` unless they wait already."""
        now = self._clock()
        new = [
            _Waiting(each, now, now)
            for each in restores
            if not self._note_request(each.object_id, now)
        ]
        self._wait(resource, filter(self._claims.take, new))

    def _note_request(self, object_id: str, now: float) -> bool:
        """Note that Ray asks for a restore; returns whether it waits in this process."""
        with self._lock:
            found = [
                waiting
                for each in self._waiting.values()
                if (waiting := each.get(object_id)) is not None
            ]
            for waiting in found:
                waiting.last = now
        if found:
            self._claims.note_request(object_id, now)
        return bool(found)

    def _wait(self, resource: str, new: Iterable[_Waiting]) -> None:
        claimed = {each.restore.object_id: each for each in new}
        with self._lock:
            waiting = self._waiting.setdefault(resource, {})
            waiting.update(claimed)
            if waiting and resource not in self._threads:
                thread = threading.Thread(
                    target=self._run,
                    args=(resource,),
                    name=f"ray-valkey-spill-deferred ({resource})",
                    daemon=True,
                )
                # Where no thread can be had, the next deferral tries again, and Ray asks again.
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._threads[resource] = thread

    def adopt(self, resource_of: Callable[[str], str]) -> None:
        """Take over what killed IO workers of the node had deferred.

        Args:
            resource_of: what the object of a URL may wait for.
        """
        for waiting in self._claims.of_the_dead():
            if self._claims.take(waiting):
                self._wait(resource_of(waiting.restore.url), [waiting])
        with self._lock:
            without_thread = [each for each in self._waiting if each not in self._threads]
        for resource in without_thread:
            self._wait(resource, [])

    def count(self, resource: str) -> int:
        with self._lock:
            return len(self._waiting.get(resource, ()))

    def forget(self, object_ids: Iterable[str]) -> None:
        """Let objects wait no more, in any IO worker of the node: their last reference is gone."""
        for object_id in object_ids:
            with self._lock:
                for each in self._waiting.values():
                    each.pop(object_id, None)
            self._claims.drop(object_id)

    # --- the threads ---

    def _run(self, resource: str) -> None:
        restorer: Restorer | None = None
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        try:
            while waiting := self._next(resource):
                done = 0
                # The thread must not end: nobody else restores what this process has claimed.
                try:
                    restorer = restorer or self._new_restorer()
                    done = self._attempt_all(restorer, resource, waiting)
                except Exception:
                    logger.exception("what waits for %s cannot be tried now", resource)
                if done == len(waiting):
                    backoff.renew()
                    continue
                time.sleep(backoff.next())
        finally:
            with self._lock:
                # Where it did not end by itself, the next deferral starts another.
                if self._threads.get(resource) is threading.current_thread():
                    del self._threads[resource]
            if restorer is not None:
                restorer.close()

    def _next(self, resource: str) -> list[_Waiting]:
        """What waits for the resource; if nothing does, the thread that asks must end."""
        with self._lock:
            waiting = list(self._waiting.get(resource, {}).values())
            if not waiting:
                self._waiting.pop(resource, None)
                self._threads.pop(resource, None)
            return waiting

    def _attempt_all(self, restorer: Restorer, resource: str, waiting: Sequence[_Waiting]) -> int:
        """Try each until the resource turns out to be away still; returns how many are done."""
        done = 0
        for each in waiting:
            restore = each.restore
            if not self._is_wanted(resource, each):
                self._complained.discard(restore.object_id)
                done += 1
                continue
            try:
                restorer.restore(restore)
            except SpillError as error:
                found = self._failed(restore, error, self.count(resource))
                if found == resource:
                    self._put_last(resource, restore)
                    return done
                self._move(resource, found, each)
            except Exception:
                if restore.object_id not in self._complained:
                    self._complained.add(restore.object_id)
                    logger.exception("object %s cannot be restored yet", restore.object_id)
                continue
            else:
                self._take(resource, restore)
                self._claims.drop(restore.object_id)
            self._complained.discard(restore.object_id)
            done += 1
        return done

    def _is_wanted(self, resource: str, waiting: _Waiting) -> bool:
        """Whether a restore is to be tried; if not, it waits no more."""
        object_id = waiting.restore.object_id
        asked = self._claims.asked(waiting)
        with self._lock:
            of_resource = self._waiting.get(resource, {})
            if of_resource.get(object_id) is not waiting:
                return False
            if asked is None:
                # Ray has had another IO worker delete the object.
                del of_resource[object_id]
                return False
            # Ray may have asked since.
            asked = max(asked, waiting.last)
            if self._clock() - asked <= max(_UNASKED, 2 * (asked - waiting.first)):
                return True
            del of_resource[object_id]
        self._claims.drop(object_id)
        return False

    def _put_last(self, resource: str, restore: Restore) -> None:
        """Try the others before it the next time: it may be the only one that cannot be read."""
        with self._lock:
            waiting = self._waiting.get(resource, {})
            if restore.object_id in waiting:
                waiting[restore.object_id] = waiting.pop(restore.object_id)

    def _move(self, resource: str, found: str, waiting: _Waiting) -> None:
        """Let a restore wait for what was found to be away, unless it waits no more."""
        with self._lock:
            left = self._waiting.get(resource, {}).pop(waiting.restore.object_id, None)
        self._wait(found, [waiting] if left is waiting else [])

    def _take(self, resource: str, restore: Restore) -> None:
        with self._lock:
            self._waiting.get(resource, {}).pop(restore.object_id, None)
