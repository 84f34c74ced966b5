"""Restores that wait for something that is away, without holding up anything else.

Ray has few restore workers on a node, each of which does one request at a time, so whoever waits
inside a request holds up the restores that could go on. Ray's own retries come after 10 s, then 20,
and ever later (`PullManager::UpdateRetryTimer`), so failing the request is not enough either. So a
restore that has to wait is put off: Ray's request ends without the object, and a thread of the IO
worker puts the object into plasma once it can be read. Ray does not mind who does that: it wakes
whoever waits for the object when plasma seals it.

Each deferred restore is one IO worker's, however often Ray asks the others for it. If that one is
killed, another one of its node takes over what it had.
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


@dataclass(frozen=True, slots=True)
class Restore:
    """An object that Ray asked for: its id in hex, and the URL that Ray has for it."""

    object_id: str
    url: str


class Restorer(Protocol):
    """Restores objects in one thread, with connections of its own."""

    def restore(self, wanted: Restore) -> bool:
        """Put an object into plasma; returns whether it, or that it is lost, is there now.

        Raises:
            SpillError: what is away still is.
        """

    def close(self) -> None:
        """Drop the connections."""


class _Claim(NamedTuple):
    """That a process, given by its id and what tells it from others of that id, has a restore."""

    pid: int
    identity: str
    url: str


class _Claims:
    """Which IO worker of the node has which deferred restore: a file for each, named by the object.

    Where files cannot be written, each IO worker has all that Ray asks it for.

    Args:
        directory: returns the session's directory, or None if there is none.
        name: of the directory in it that the files are in.
        identity_of: returns what tells a process, given by its id, from others that had that id or
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

    def take(self, restore: Restore) -> bool:
        """Claim a restore for this process; returns False if another living one has it."""
        directory = self._directory()
        if directory is None:
            return True
        path = directory / restore.object_id
        # A link to what has been written: nobody sees half of it.
        written = path.with_suffix(f".{os.urandom(4).hex()}")
        try:
            directory.mkdir(exist_ok=True)
            pid = os.getpid()
            written.write_text(f"{pid} {self._identity_of(pid)} {restore.url}\n")
            for _ in range(2):
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(written)
                    self._filed.add(restore.object_id)
                    return True
                claim = _read(path)
                if claim.pid != pid and self._stands(claim):
                    return False
                # Of those that find it left, the one that moves it away may claim it.
                path.rename(path.with_suffix(f".{os.urandom(4).hex()}")).unlink()
        except (OSError, ValueError):
            return True
        finally:
            with contextlib.suppress(OSError):
                written.unlink()
        return False

    def has(self, restore: Restore) -> bool:
        """Whether a claim of this process still stands."""
        directory = self._directory()
        if directory is None or restore.object_id not in self._filed:
            return True
        try:
            return (directory / restore.object_id).exists()
        except OSError:
            return True

    def drop(self, object_id: str) -> None:
        """Give up the claim to an object, whichever process has it."""
        self._filed.discard(object_id)
        if (directory := self._directory()) is not None:
            with contextlib.suppress(OSError):
                (directory / object_id).unlink()

    def of_the_dead(self) -> list[Restore]:
        """What killed processes of the node had deferred."""
        directory = self._directory()
        left = []
        with contextlib.suppress(OSError):
            for path in list(directory.iterdir()) if directory else ():
                with contextlib.suppress(OSError, ValueError):
                    claim = _read(path)
                    if not path.suffix and not self._stands(claim):
                        left.append(Restore(path.name, claim.url))
        return left

    def _stands(self, claim: _Claim) -> bool:
        return self._identity_of(claim.pid) == claim.identity

    def _directory(self) -> Path | None:
        directory = self._session()
        return directory and directory / self._name


def _read(path: Path) -> _Claim:
    """Raises OSError, or ValueError."""
    pid, identity, url = path.read_text(errors="replace").rstrip("\n").split(" ", 2)
    return _Claim(int(pid), identity, url)


class DeferredRestores:
    """Restores that wait: a thread for each resource that is away, for as long as any waits for it.

    For any number of threads.

    Args:
        directory, name, identity_of: where the IO workers of the node share who has deferred what:
            see `_Claims`.
        new_restorer: makes one for a thread.
        failed: is given a restore that failed, its error, and how many wait for the same; returns
            the resource that the error shows to be away.
    """

    def __init__(
        self,
        directory: Callable[[], Path | None],
        name: str,
        identity_of: Callable[[int], str | None],
        new_restorer: Callable[[], Restorer],
        failed: Callable[[Restore, SpillError, int], str],
    ) -> None:
        self._claims = _Claims(directory, name, identity_of)
        self._new_restorer = new_restorer
        self._failed = failed
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, Restore]] = {}
        self._threads: dict[str, threading.Thread] = {}
        # Objects whose unexpected errors the log has.
        self._complained: set[str] = set()

    def add(self, resource: str, restores: Iterable[Restore]) -> None:
        """Let `restores` wait for `resource`, but for those that wait already."""
        claimed = [each for each in restores if not self._has(each) and self._claims.take(each)]
        with self._lock:
            waiting = self._waiting.setdefault(resource, {})
            waiting.update((each.object_id, each) for each in claimed)
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
        for restore in self._claims.of_the_dead():
            self.add(resource_of(restore.url), [restore])
        with self._lock:
            without_thread = [each for each in self._waiting if each not in self._threads]
        for resource in without_thread:
            self.add(resource, [])

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

    def _has(self, restore: Restore) -> bool:
        with self._lock:
            return any(restore.object_id in each for each in self._waiting.values())

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

    def _next(self, resource: str) -> list[Restore]:
        """What waits for the resource; if nothing does, the thread that asks must end."""
        with self._lock:
            waiting = list(self._waiting.get(resource, {}).values())
            if not waiting:
                self._waiting.pop(resource, None)
                self._threads.pop(resource, None)
            return waiting

    def _attempt_all(self, restorer: Restorer, resource: str, waiting: Sequence[Restore]) -> int:
        """Try each until the resource turns out to be away still; returns how many are done."""
        done = 0
        for restore in waiting:
            if not self._has(restore) or not self._claims.has(restore):
                # Ray has had it deleted, perhaps by another IO worker.
                self._take(resource, restore)
                done += 1
                continue
            try:
                if not restorer.restore(restore):
                    continue
            except SpillError as error:
                found = self._failed(restore, error, self.count(resource))
                if found == resource:
                    self._put_last(resource, restore)
                    return done
                # It waits for something else, then.
                self._take(resource, restore)
                self.add(found, [restore])
            except Exception:
                if restore.object_id not in self._complained:
                    self._complained.add(restore.object_id)
                    logger.exception("object %s cannot be restored yet", restore.object_id)
                continue
            else:
                self._take(resource, restore)
                self._claims.drop(restore.object_id)
            done += 1
        return done

    def _put_last(self, resource: str, restore: Restore) -> None:
        """Try the others before it the next time: it may be the only one that cannot be read."""
        with self._lock:
            waiting = self._waiting.get(resource, {})
            if restore.object_id in waiting:
                waiting[restore.object_id] = waiting.pop(restore.object_id)

    def _take(self, resource: str, restore: Restore) -> None:
        self._complained.discard(restore.object_id)
        with self._lock:
            self._waiting.get(resource, {}).pop(restore.object_id, None)
