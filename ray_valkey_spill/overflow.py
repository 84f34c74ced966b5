"""Where bytes live that Valkey has no room for: a file an object, in a place that all nodes reach.

    <overflow_uri>/<key_prefix><namespace>/<session>/<node>/<object>.<attempt>.<n>.<size>

A file has an object's chunks, one after the other, and then its header's value, as in Valkey. What
is cut off has no header at its end and so never looks whole. In a directory, a file has ".part"
after its name until it is written; in an object store, it is not there before.

The files are their own index: an owner's are in one directory. Nothing of them is on the server,
which is full when they are written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from ray_valkey_spill.config import MIB, Config
from ray_valkey_spill.errors import LostObjectError, OverflowUnavailableError
from ray_valkey_spill.format import TRAILER_SIZE, Buffer, header_size
from ray_valkey_spill.keys import Entry, Keyspace, ObjectName, Place
from ray_valkey_spill.ledger import Owner
from ray_valkey_spill.tiers import Stat, Value

__all__ = ["OverflowTier", "StoredFile"]

_OBJECT_STORES = {"s3", "gcs", "abfs"}
_READ_AHEAD = 8 * MIB
_TAIL = 16 << 10
_PART = ".part"
_FILE = re.compile(r"([^/]+)\.([0-9]+)(\.part)?")


class StoredFile(NamedTuple):
    """A file of the overflow; `entry.stored` is its length in bytes.

    One that is not whole is being written, or was when its writer was killed.
    """

    entry: Entry
    is_whole: bool
    path: str


class OverflowTier:
    """Objects in files. For any number of threads.

    Errors are `OverflowUnavailableError`, unless something else is said.

    Args:
        uri: of a `pyarrow.fs` file system and a directory in it.
        keyspace: whose objects.
    """

    def __init__(self, uri: str, keyspace: Keyspace) -> None:
        self._uri = uri
        self._root = keyspace.root.rstrip(":")
        self._opened: tuple[Any, str] | None = None

    @classmethod
    def of(cls, config: Config) -> OverflowTier | None:
        uri = config.overflow_uri
        return None if uri is None else cls(uri, Keyspace.of(config))

    def __str__(self) -> str:
        """The URI, without what can be secret in it."""
        parts = urlsplit(self._uri)
        scheme = f"{parts.scheme}://" if parts.scheme else ""
        return f"{scheme}{parts.netloc.rpartition('@')[2]}{parts.path}"

    # --- objects ---

    def write(self, values: Iterable[Value]) -> Iterator[Entry]:
        """Write `values` in order, and yield each object once all of it is there.

        If that fails, or is given up, nothing is left of the object that it was at.
        """
        file: _NewFile | None = None
        try:
            for value in values:
                with self._errors():
                    file = file or self._create(value)
                    file.write(value.parts)
                    if value.completes is None:
                        continue
                    size = file.commit()
                    file = None
                yield value.completes._replace(stored=size)
        finally:
            if file is not None:
                file.discard()

    def stat(self, place: Place) -> Stat:
        """The header, and how many bytes of chunks there are."""
        path = self._path(place)
        with self._errors():
            try:
                with self._fs.open_input_file(path) as file:
                    size = file.size()
                    tail = file.read_at(size, 0) if place.name.chunks == 0 else _tail(file, size)
            except FileNotFoundError:
                return Stat(None, [])
        return Stat(tail, [], payload=0 if place.name.chunks == 0 else size - len(tail))

    def read(
        self, place: Place, sizes: Sequence[int], wanted: Iterable[tuple[int, memoryview]]
    ) -> Iterator[None]:
        """Receive chunks, which have `sizes`, into memoryviews; yields as each is there, in order.

        Raises:
            LostObjectError: if the file is gone, or ends too soon.
        """
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        with self._errors(), contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._open(self._path(place)))
            except FileNotFoundError:
                raise LostObjectError("its file is gone from the overflow") from None
            position = 0
            for number, into in wanted:
                file.read(offsets[number] - position)
                if _read_into(file, into) != len(into):
                    raise LostObjectError(f"its file in the overflow ends in chunk {number}")
                position = offsets[number + 1]
                yield

    def remove(self, place: Place) -> None:
        """Remove an object; it is no error if it is not there."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(place))

    # --- owners ---

    def files(self, owner: Owner) -> Iterator[StoredFile]:
        """What is there of a node of a session."""
        directory = self._directory(*owner)
        for path, size in self._list(directory):
            match = _FILE.fullmatch(path.removeprefix(f"{directory}/"))
            with contextlib.suppress(ValueError):  # not one of ours
                if match:
                    name = ObjectName.parse(f"{owner}:{match[1]}")
                    yield StoredFile(Entry(name, int(match[2]), size), not match[3], path)

    def owners(self) -> set[Owner]:
        return {
            Owner(session, node)
            for session in self._list_directories(self._directory())
            for node in self._list_directories(self._directory(session))
        }

    def remove_parts(self, owner: Owner, is_alive: Callable[[int], bool]) -> None:
        """Remove what killed processes of a node were writing.

        Args:
            owner: the node, of a session.
            is_alive: whether a process of the node, given by its id, may still be writing.
        """
        for file in self.files(owner):
            if not file.is_whole and not is_alive(file.entry.name.writer):
                with self._errors(), contextlib.suppress(FileNotFoundError):
                    self._fs.delete_file(file.path)

    def destroy(self, owner: Owner) -> int:
        """Remove everything of a node of a session; returns how many objects that were."""
        count = sum(file.is_whole for file in self.files(owner))
        self._delete_directory(self._directory(*owner))
        self._remove_if_empty(self._directory(owner.session), self._directory())
        return count

    def destroy_session(self, session: str) -> None:
        """Remove everything of a session."""
        self._delete_directory(self._directory(session))
        self._remove_if_empty(self._directory())

    # --- whether all nodes mean the same place ---

    def sign(self, session: str, token: str) -> None:
        """Leave a token, which whoever sees the same place finds."""
        with self._errors():
            self._make_directory(self._directory(session))
            with self._fs.open_output_stream(self._signature(session, token)) as file:
                file.write(b"This place is used by a Ray session.\n")

    def is_signed(self, session: str, token: str) -> bool:
        with self._errors():
            return self._exists(self._signature(session, token))

    def unsign(self, session: str, token: str) -> None:
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._signature(session, token))
        self._remove_if_empty(self._directory(session), self._directory())

    # --- helpers ---

    @property
    def _fs(self) -> Any:
        return self._open_fs()[0]

    def _open_fs(self) -> tuple[Any, str]:
        if self._opened is None:
            filesystem, path = fs.FileSystem.from_uri(self._uri)
            self._opened = filesystem, path.rstrip("/")
        return self._opened

    @property
    def _has_directories(self) -> bool:
        return self._fs.type_name not in _OBJECT_STORES

    def _directory(self, *components: str) -> str:
        return "/".join((self._open_fs()[1], self._root, *components))

    def _path(self, place: Place) -> str:
        session, node, rest = str(place.name).split(":")
        return self._directory(session, node, f"{rest}.{place.size}")

    def _signature(self, session: str, token: str) -> str:
        return self._directory(session, f"place.{token}")

    def _create(self, value: Value) -> _NewFile:
        path = self._path(Place(value.name, value.size))
        self._make_directory(path.rpartition("/")[0])
        return _NewFile(self._fs, path, _PART if self._has_directories else "")

    def _open(self, path: str) -> Any:
        ahead = 0 if self._has_directories else _READ_AHEAD
        return self._fs.open_input_stream(path, compression=None, buffer_size=ahead)

    def _list(self, directory: str, kind: Any = fs.FileType.File) -> list[tuple[str, int]]:
        """The paths and lengths of what is in a directory; nothing if it is not there."""
        with self._errors():
            found = self._fs.get_file_info(fs.FileSelector(directory, allow_not_found=True))
        return [(info.path, info.size or 0) for info in found if info.type == kind]

    def _list_directories(self, directory: str) -> list[str]:
        found = self._list(directory, fs.FileType.Directory)
        return [path.rpartition("/")[2] for path, _ in found]

    def _exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def _make_directory(self, path: str) -> None:
        if self._has_directories:
            self._fs.create_dir(path)

    def _delete_directory(self, path: str) -> None:
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._fs.delete_dir(path)

    def _remove_if_empty(self, *paths: str) -> None:
        """Remove directories that have nothing in them; object stores have none to be removed."""
        with self._errors():
            local = self._fs.type_name == "local"
        for path in paths if local else ():
            with contextlib.suppress(OSError):
                os.rmdir(path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the file system raises, in our terms."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OverflowUnavailableError(
                f"the overflow at {self} {'is full' if full else 'cannot be used'}: {error}",
                "Make room there" if full else "Every node must be able to write and read there",
            ) from error


class _NewFile:
    """A file that is being written; it has its name once it is whole."""

    def __init__(self, filesystem: Any, path: str, suffix: str) -> None:
        self._fs = filesystem
        self._path = path
        self._written_as = f"{path}{suffix}"
        self._stream = filesystem.open_output_stream(self._written_as, compression=None)
        self._size = 0

    def write(self, parts: Iterable[Buffer]) -> None:
        for part in parts:
            self._stream.write(part)
            self._size += len(part)

    def commit(self) -> int:
        """Returns the file's length."""
        self._stream.close()
        if self._written_as != self._path:
            self._fs.move(self._written_as, self._path)
        return self._size

    def discard(self) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):
            self._stream.close()
        with contextlib.suppress(OSError, pa.ArrowException):
            self._fs.delete_file(self._written_as)


def _tail(file: Any, size: int) -> bytes:
    """The header's value, from the end of a file that has chunks before it."""
    tail: bytes = file.read_at(min(size, _TAIL), max(0, size - _TAIL))
    wanted = min(size, header_size(tail[-TRAILER_SIZE:]))
    if wanted > len(tail):
        tail = file.read_at(wanted, size - wanted)
    return tail[len(tail) - wanted :]


def _read_into(file: Any, into: memoryview) -> int:
    """Fill `into`; returns how many bytes there were for it."""
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            break
        done += count
    return done
