"""A journal of an IO worker's pending deletions, in a file that its node shares.

Ray requests a deletion once, whatever its outcome. If the IO worker is killed before it is done,
another IO worker of the node finds the file and deletes the objects.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["DeletionJournal"]

_SUFFIX = ".deletions"
# Lines of what is done that a file may have before it is written anew.
_MOST_DONE = 1000


class DeletionJournal:
    """The URLs of requested deletions that are not done. Thread-safe.

    Args:
        directory: returns the directory of the files, or None if there is none. In that case, or if
            a file cannot be written, only this process knows its pending deletions.
        name: prefix of this node's file names, which no other node has.
    """

    def __init__(self, directory: Callable[[], Path | None], name: str) -> None:
        self._directory = directory
        self._name = name
        # Process ids are reused: the token distinguishes this process from an earlier one.
        self._token = os.urandom(4).hex()
        # By URL: whether its deletion has been given up for now.
        self._left: dict[str, bool] = {}
        self._lines = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def deleting(self, urls: Sequence[str]) -> Iterator[None]:
        """Record `urls` while the body deletes them. If it raises, they are `left` afterwards."""
        with self._lock:
            self._left |= dict.fromkeys(urls, False)
            self._append("+", urls)
        try:
            yield
        except BaseException:
            with self._lock:
                self._left |= dict.fromkeys(urls, True)
            raise
        self.done(urls)

    def put_off(self, urls: Sequence[str]) -> None:
        """Record `urls` for a later deletion."""
        with self._lock:
            self._left |= dict.fromkeys(urls, True)
            self._append("+", urls)

    def done(self, urls: Iterable[str]) -> None:
        """Remove `urls`, which are deleted, from the journal."""
        urls = list(urls)
        with self._lock:
            for url in urls:
                self._left.pop(url, None)
            if self._left:
                self._append("-", urls)
            elif (path := self._path()) is not None:
                self._lines = 0
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def postpone(self, url: str) -> None:
        """Let a URL come last in `left`, because it cannot be deleted now."""
        with self._lock:
            if url in self._left:
                self._left[url] = self._left.pop(url)

    def left(self) -> list[str]:
        """Return the URLs that this process has still to delete and is not deleting now."""
        with self._lock:
            return [url for url, given_up in self._left.items() if given_up]

    def adopt(self, is_alive: Callable[[int], bool]) -> None:
        """Take over the pending deletions of the node's killed processes; `left` then has them.

        Args:
            is_alive: whether the process of this node with that id still runs.
        """
        for path in self._of_the_dead(is_alive):
            # The process that renames the file owns it. If it is killed before the URLs are in its
            # own file, others find the new name.
            taken = path.with_name(f"{self._name}-{os.getpid()}-{os.urandom(4).hex()}{_SUFFIX}")
            with contextlib.suppress(OSError):
                path.rename(taken)
                self.put_off(_read(taken))
                taken.unlink()

    def _of_the_dead(self, is_alive: Callable[[int], bool]) -> list[Path]:
        directory = self._directory()
        own = self._path()
        found = []
        with contextlib.suppress(OSError):
            for path in directory.glob(f"{self._name}-*{_SUFFIX}") if directory else ():
                match = re.search(r"-([0-9]+)-[0-9a-f]+\.", path.name)
                if (
                    path != own
                    and match
                    and (int(match[1]) == os.getpid() or not is_alive(int(match[1])))
                ):
                    found.append(path)
        return found

    def _append(self, sign: str, urls: Sequence[str]) -> None:
        path = self._path()
        if path is None:
            return
        self._lines += len(urls)
        if self._lines > 2 * len(self._left) + _MOST_DONE and self._write_anew(path):
            return
        # The line break comes first, so that a line cut off by a full disk does not spoil the next.
        with contextlib.suppress(OSError), path.open("ab") as file:
            file.write("".join(f"\n{sign}{url}" for url in urls).encode() + b"\n")

    def _write_anew(self, path: Path) -> bool:
        """Replace the file by one without what is done; return whether that worked."""
        new = path.with_suffix(".new")
        try:
            new.write_bytes("".join(f"+{url}\n" for url in self._left).encode())
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            return False
        self._lines = len(self._left)
        return True

    def _path(self) -> Path | None:
        directory = self._directory()
        return directory and directory / f"{self._name}-{os.getpid()}-{self._token}{_SUFFIX}"


def _read(path: Path) -> list[str]:
    """Return the URLs that were added and not done. An unterminated last line does not count."""
    left: dict[str, None] = {}
    for line in path.read_bytes().decode(errors="replace").split("\n")[:-1]:
        if line.startswith("+"):
            left[line[1:]] = None
        else:
            left.pop(line[1:], None)
    return list(left)
