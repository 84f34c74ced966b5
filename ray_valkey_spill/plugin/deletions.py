"""What an IO worker has still to delete, in a file beside those of its node's other IO workers.

Ray asks for a deletion once, whatever comes of it. If the IO worker is killed meanwhile, another
one of the node finds its file and deletes in its place.
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


class DeletionJournal:
    """The URLs whose deletion was asked for and is not done. For any number of threads.

    Args:
        directory: gives where the files are, or None if there is no place for any: then only this
            process knows. Neither does anybody else where a file cannot be written.
        name: what the names of the files of this node begin with, and of no other's.
    """

    def __init__(self, directory: Callable[[], Path | None], name: str) -> None:
        self._directory = directory
        self._name = name
        # Process ids are used again: the file of an earlier process is not to be taken for ours.
        self._token = os.urandom(4).hex()
        # And whether whoever was at it has given up.
        self._left: dict[str, bool] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def deleting(self, urls: Sequence[str]) -> Iterator[None]:
        """Note them while they are deleted; where that fails they are `left` from then on."""
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
        """Leave them for later."""
        with self._lock:
            self._left |= dict.fromkeys(urls, True)
            self._append("+", urls)

    def done(self, urls: Iterable[str]) -> None:
        """Forget them: they are deleted."""
        urls = list(urls)
        with self._lock:
            for url in urls:
                self._left.pop(url, None)
            if self._left:
                self._append("-", urls)
            elif (path := self._path()) is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def left(self) -> list[str]:
        """What this process has still to delete, and is not just at."""
        with self._lock:
            return [url for url, given_up in self._left.items() if given_up]

    def adopt(self, is_alive: Callable[[int], bool]) -> None:
        """Take over what killed processes of the node had left: it is `left` to this one then.

        Args:
            is_alive: whether a process of this node, given by its id, still runs.
        """
        for path in self._of_the_dead(is_alive):
            # Of all that find it, the one that renames it has it. If that one is killed before the
            # URLs are in its own file, others find the new name.
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

    def _append(self, sign: str, urls: Iterable[str]) -> None:
        path = self._path()
        if path is None:
            return
        # The line break comes first: what a full disk has cut off must not spoil what follows.
        with contextlib.suppress(OSError), path.open("ab") as file:
            file.write("".join(f"\n{sign}{url}" for url in urls).encode() + b"\n")

    def _path(self) -> Path | None:
        directory = self._directory()
        return directory and directory / f"{self._name}-{os.getpid()}-{self._token}{_SUFFIX}"


def _read(path: Path) -> list[str]:
    """The URLs that were added and not done; a last line without its end does not count."""
    left: dict[str, None] = {}
    for line in path.read_bytes().decode(errors="replace").split("\n")[:-1]:
        if line.startswith("+"):
            left[line[1:]] = None
        else:
            left.pop(line[1:], None)
    return list(left)
