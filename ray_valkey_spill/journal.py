"""What an IO worker has still to delete, in a file beside those of its node's other IO workers.

Ray asks for a deletion once, whatever comes of it. If the IO worker is killed meanwhile, another
one of the node finds its file and deletes in its place.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
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
        self._left: dict[str, None] = {}
        self._lock = threading.Lock()

    def add(self, urls: Iterable[str]) -> None:
        """Note them, before they are deleted."""
        new = dict.fromkeys(urls)
        with self._lock, contextlib.suppress(OSError):
            self._left |= new
            path = self._path()
            if path is not None:
                with path.open("a") as file:
                    file.writelines(f"{url}\n" for url in new)

    def done(self, urls: Iterable[str]) -> None:
        """Forget them: they are deleted."""
        with self._lock, contextlib.suppress(OSError):
            for url in urls:
                self._left.pop(url, None)
            path = self._path()
            if path is None:
                return
            if not self._left:
                path.unlink(missing_ok=True)
                return
            new = path.with_suffix(".new")
            new.write_text("".join(f"{url}\n" for url in self._left))
            new.replace(path)

    def left(self) -> list[str]:
        """What is still to be deleted by this process."""
        with self._lock:
            return list(self._left)

    def of_the_dead(self, is_alive: Callable[[int], bool]) -> Iterator[tuple[Path, list[str]]]:
        """What killed processes of the node had left; each time a file to be removed, and URLs."""
        directory = self._directory()
        if directory is None:
            return
        for path in directory.glob(f"{self._name}-*{_SUFFIX}"):
            writer = int(path.stem.rpartition("-")[2])
            if not is_alive(writer):
                # The last line may not have been written to its end.
                with contextlib.suppress(OSError):
                    yield path, path.read_text().split("\n")[:-1]

    def _path(self) -> Path | None:
        directory = self._directory()
        return directory and directory / f"{self._name}-{os.getpid()}{_SUFFIX}"
