"""The tier for objects that do not fit into Valkey: one file per object, on storage of all nodes.

    <overflow_uri>/<key_prefix><namespace>/<session>/<node>/<object>.<attempt>.<n>.<size>

A file has the object's chunks in order, then the header's value, as in Valkey. A truncated file has
no header at its end, so it never looks whole. In a directory, a file has the suffix ".part" until
it is complete; in an object store, it does not exist before its upload is complete. If the writer
is killed, the upload stays incomplete, and only the store's own rule for incomplete uploads removes
its parts: `pyarrow` can neither list nor abort them.

The files are their own index: those of a node are in one directory. The server has no metadata of
them, because it is full when they are written. Beside the nodes' directories, the session's
directory has a signature while the session uses the overflow: `<session>/place.<token>`. Once the
session's files are being removed, it also has `<session>/ending`.

A share with an unreachable server, or an object store that does not answer, blocks its callers
indefinitely. So the threads of `steps` do all file system calls, and a call fails once it has made
no progress for as long as `Patience` allows.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError, OverflowUnavailableError
from ray_valkey_spill.format.codec import copy_into, scratch
from ray_valkey_spill.format.header import TRAILER_SIZE, header_size, largest_header
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName, Place
from ray_valkey_spill.format.packing import INLINE_LIMIT, Receive
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.steps import Job, StalledError, StepThread, StepThreads, begin_step
from ray_valkey_spill.units import KIB, MIB, Buffer

__all__ = ["OverflowTier", "Patience", "StoredFile"]

_OBJECT_STORES = {"s3", "gcs", "abfs"}
# A request to an object store has a high latency, so each is large, and several are under way.
_SPAN = 4 * MIB
_SPANS_AHEAD = 3
_TAIL = 16 * KIB
# Values are handed to another thread in pieces, several of which are under way at a time.
_PIECE = 512 * KIB
_PIECES_UNDER_WAY = 2
_MOST_AT_ONCE = 1 * MIB  # per read, so that a slow share shows progress
# Bytes per second: the least rate that counts as progress when a file is closed, because a share
# may receive all writes only then.
_SLOWEST = 10e6
_PART = ".part"
_SIGNATURE, _ENDING = "place.", "ending"
_FILE = re.compile(r"([^/]+)\.([0-9]+)(\.part)?")
# The name of a directory that is being removed: see `OverflowTier._delete_directory`.
_BEING_REMOVED = re.compile(r".+\.[0-9a-f]{8}")
# Attempts to remove a directory: others may still add or remove files they opened under its name.
_DELETE_ATTEMPTS = 5
# Google's client would silently retry for a quarter of an hour.
_GCS_RETRY_SECONDS = 10

_T = TypeVar("_T")
_P = ParamSpec("_P")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a step may make no progress before its caller gets an error.

    A false alarm costs little, because callers try again.

    Attributes:
        answer: for a step that moves almost no data, like opening a file. Below five seconds, in
            which a head start must fail.
        data: for a read or write of a piece of data in a directory; the same as for connections.
        request: for a request to an object store that moves or lists much, and shows no progress
            meanwhile: up to 10 MiB, at as little as 1/3 MiB per second.
        retry: while a step hangs, other steps fail at once, except for one in this many seconds.
    """

    answer: float = 4.0
    data: float = 10.0
    request: float = 30.0
    retry: float = 30.0


class StoredFile(NamedTuple):
    """A file of the overflow; `entry.stored` is its length in bytes.

    If it is not whole, it is being written, or its writer was killed.
    """

    entry: Entry
    is_whole: bool
    path: str


_Method = Callable[Concatenate["OverflowTier", _P], _T]


def _reading(method: _Method[_P, _T]) -> _Method[_P, _T]:
    """Run `method` in one of the threads for reads."""

    @functools.wraps(method)
    def bounded(self: OverflowTier, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._run(self._reading, functools.partial(method, self, *args, **kwargs))

    return bounded


def _changing(method: _Method[_P, _T]) -> _Method[_P, _T]:
    """Run `method` in one of the threads for changes."""

    @functools.wraps(method)
    def bounded(self: OverflowTier, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._run(self._changing, functools.partial(method, self, *args, **kwargs))

    return bounded


class OverflowTier:
    """Objects in files. Thread-safe.

    Unless stated otherwise, errors are `OverflowUnavailableError`. No call waits longer than
    `patience` allows. While a read hangs, other reads fail at once; while a change hangs, other
    changes do. The two are separate, because a frozen file system, for example, can be read.

    Args:
        uri: URI of a `pyarrow.fs` file system and a directory in it.
        keyspace: names the namespace's root directory.
        patience: seconds without progress.
    """

    def __init__(self, uri: str, keyspace: Keyspace, patience: Patience = Patience()) -> None:
        self._uri = uri
        self._root = keyspace.root.rstrip(":")
        self._patience = patience
        self._reading = StepThreads("overflow-read", patience.answer, patience.retry)
        self._changing = StepThreads("overflow-write", patience.answer, patience.retry)
        self._opened: tuple[Any, str] | None = None
        # Files that could not be removed after a failure, when the storage may have been away.
        self._undiscarded: deque[str] = deque()
        # Sets of buffers for writes. A set that a hung step may still use is not returned here.
        self._memory: deque[list[memoryview]] = deque()

    @classmethod
    def of(cls, config: Config) -> OverflowTier | None:
        uri = config.overflow_uri
        return None if uri is None else cls(uri, Keyspace.of(config))

    def __str__(self) -> str:
        """The URI without its possible secrets: user, password and options."""
        if "://" not in self._uri:
            return self._uri
        parts = urlsplit(self._uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def close(self) -> None:
        """End the threads that do not hang; the next use starts new ones."""
        self._reading.close()
        self._changing.close()

    # --- objects ---

    def write(self, values: Iterable[Value], token: str | None = None) -> Iterator[Entry]:
        """Write `values` in order, and yield each object once it is complete.

        If this fails or is closed, the unfinished object is removed; if it cannot be removed now,
        the next `write` does it. If a step hangs, the object is removed once that step returns,
        even if the step completed the object. Values are copied, so their memory is free once this
        ends.

        Args:
            values: of one session.
            token: of the session, if it is known: a directory without it is another one.
        """
        with contextlib.ExitStack() as stack:
            with self._errors():
                thread = stack.enter_context(self._changing.thread())
                if self._undiscarded:
                    thread.run(self._discard_again)
            buffers = stack.enter_context(self._buffers(thread))
            file: _Writer | None = None
            try:
                for value in values:
                    with self._errors():
                        if file is None:
                            place = Place(value.name, value.size)
                            create = functools.partial(self._create, place, token)
                            file = _Writer(create, self._discard, thread, buffers)
                        file.write(value.parts)
                        if not value.is_last:
                            continue
                        size = file.commit()
                        file = None
                    yield Entry(value.name, value.size, size)
            finally:
                if file is not None:
                    thread.finish(file.discard)

    @_reading
    def stat(self, place: Place, token: str | None = None) -> Stat:
        """Return the header of an object, and the length of its chunks together.

        A missing object is none only where the session's signature is: with `token`, if the caller
        knows it, else any.
        """
        inline = place.name.chunks == 0
        try:
            with self._open_file(place) as file:
                size = file.size()
                begin_step(self._data_limit)
                tail = _inline(file, size) if inline else _tail(file, size, place.name.chunks)
        except FileNotFoundError:
            self._require_signature(place, token)
            return Stat(None, [])
        return Stat(tail, [], payload=0 if inline else size - len(tail))

    def read(
        self,
        place: Place,
        sizes: Sequence[int],
        use: Callable[[Receive], _T],
        token: str | None = None,
    ) -> _T:
        """As `tiers.base.Tier.read`. For `token` see `stat`.

        Raises:
            LostObjectError: the file is gone, or ends too soon.
            OverflowUnavailableError: if the cause is a hung read, `use` has not returned, and the
                memory it passed may be written to until this process ends. Do not reuse it.
        """
        offsets = list(accumulate(sizes, initial=0))
        with self._errors(), self._reading.thread() as thread:
            file = thread.run(functools.partial(self._open_to_read, place, token))
            try:
                if self._has_directories:
                    return thread.run(lambda: use(functools.partial(self._chunks, file, offsets)))
                return use(functools.partial(self._spans, thread, file, offsets))
            finally:
                # If the thread hangs, it closes the file when its step returns.
                thread.finish(functools.partial(_close, file))

    @_changing
    def remove(self, place: Place, token: str | None = None) -> None:
        """Remove an object; a missing object is not an error, unless the storage is missing.

        For `token` see `stat`.
        """
        try:
            self._fs.delete_file(self._path(place))
        except FileNotFoundError:
            self._require_signature(place, token)

    @contextlib.contextmanager
    def _buffers(self, thread: StepThread) -> Iterator[list[memoryview]]:
        """Lend a set of this tier's buffers for writes by `thread`."""
        try:
            buffers = self._memory.pop()
        except IndexError:
            buffers = [scratch(_PIECE) for _ in range(1 + _PIECES_UNDER_WAY)]
        yield buffers
        if not thread.hangs:
            self._memory.append(buffers)

    def _open_to_read(self, place: Place, token: str | None) -> Any:
        try:
            return self._open_file(place)
        except FileNotFoundError:
            self._require_signature(place, token)
            raise LostObjectError("its file is gone from the overflow") from None

    def _open_file(self, place: Place) -> Any:
        file = self._fs.open_input_file(self._path(place))
        try:
            begin_step(self._patience.answer)
        except StalledError:
            # Nobody waits for the file any more. Its destructor holds the GIL, so a close that
            # hangs there would stop the whole process.
            _close(file)
            raise
        return file

    def _chunks(self, file: Any, offsets: Sequence[int], wanted: _Wanted) -> Iterator[None]:
        """Receive chunks of a file in a directory, each directly into its memory."""
        for number, into in wanted:
            begin_step(self._patience.data)
            file.seek(offsets[number])
            done = 0
            while done < len(into):
                begin_step(self._patience.data)
                count = file.readinto(into[done : done + _MOST_AT_ONCE])
                if not count:
                    raise _ends_in(number)
                done += count
            yield

    def _spans(
        self, thread: StepThread, file: Any, offsets: Sequence[int], wanted: _Wanted
    ) -> Iterator[None]:
        """Receive chunks in spans, several of which are under way at a time."""
        threads = [thread]
        under_way: deque[tuple[list[tuple[int, memoryview]], StepThread, Job[bytes]]] = deque()

        def receive(start: int, end: int) -> bytes:
            begin_step(self._patience.request)
            data: bytes = file.read_at(end - start, start)
            return data

        def received() -> Iterator[None]:
            span, thread, job = under_way.popleft()
            data, start = memoryview(thread.wait(job)), offsets[span[0][0]]
            for number, into in span:
                found = data[offsets[number] - start :][: len(into)]
                if len(found) < len(into):
                    raise _ends_in(number)
                into[:] = found
                yield

        with contextlib.ExitStack() as others:
            for count, span in enumerate(_spans(offsets, wanted)):
                if 0 < count < _SPANS_AHEAD:
                    threads.append(others.enter_context(self._reading.thread()))
                next_thread = threads[count % _SPANS_AHEAD]
                start, end = offsets[span[0][0]], offsets[span[-1][0] + 1]
                job = next_thread.submit(functools.partial(receive, start, end))
                under_way.append((span, next_thread, job))
                if len(under_way) > _SPANS_AHEAD:
                    yield from received()
            while under_way:
                yield from received()

    # --- nodes ---

    @_reading
    def files(self, node_name: NodeName) -> list[StoredFile]:
        """Return the files of a node of a session."""
        directory = self._directory(*node_name)
        found = []
        for path, size in self._list(directory):
            match = _FILE.fullmatch(path.removeprefix(f"{directory}/"))
            with contextlib.suppress(ValueError):  # not one of ours
                if match:
                    name = ObjectName.parse(f"{node_name}:{match[1]}")
                    entry = Entry(name, int(match[2]), size)
                    found.append(StoredFile(entry, not match[3], path))
        return found

    @_reading
    def sessions(self) -> set[str]:
        """Return the sessions that have anything here, even if only a signature."""
        return set(self._list_directories(self._directory()))

    @_reading
    def node_names(self) -> set[NodeName]:
        return {
            NodeName(session, node)
            for session in self.sessions()
            for node in self._list_directories(self._directory(session))
        }

    @_changing
    def remove_parts(self, node_name: NodeName, is_alive: Callable[[int], bool]) -> int:
        """Remove the unfinished files of a node's killed processes.

        Args:
            node_name: the node of a session.
            is_alive: whether the process of the node with that id may still be writing.

        Returns:
            The length of all other files of the node, in bytes.
        """
        size = 0
        for file in self.files(node_name):
            if file.is_whole or is_alive(file.entry.name.writer):
                size += file.entry.stored
                continue
            begin_step(self._patience.answer)
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(file.path)
        return size

    @_changing
    def destroy(self, node_name: NodeName) -> int:
        """Remove everything of a node of a session; return the number of removed objects."""
        count = sum(file.is_whole for file in self.files(node_name))
        self._delete_directory(self._directory(*node_name))
        self._remove_if_empty(self._directory(node_name.session), self._directory())
        return count

    @_changing
    def remove_if_empty(self, node_name: NodeName) -> None:
        """Remove the directory of a node that has no files."""
        self._remove_if_empty(self._directory(*node_name))

    @_changing
    def begin_end(self, session: str) -> None:
        """Mark the files of a session as to be removed, so that a clean-up completes that."""
        names = self._file_names(session)
        if _ENDING in names:
            return
        if names or self._list_directories(self._directory(session)):
            begin_step(self._patience.answer)
            with self._fs.open_output_stream(self._ending(session)) as file:
                file.write(b"What this session has here is being removed.\n")

    @_changing
    def withdraw_end(self, session: str) -> None:
        """Undo `begin_end`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._ending(session))

    @_reading
    def is_ending(self, session: str) -> bool:
        """Whether the removal of a session's files has begun."""
        is_moved = _BEING_REMOVED.fullmatch(session) is not None
        return is_moved or self._exists(self._ending(session))

    @_changing
    def destroy_session(self, session: str) -> None:
        """Remove everything of a session."""
        self._delete_directory(self._directory(session))
        self._remove_if_empty(self._directory())

    # --- the directory of the URI ---

    @_reading
    def missing_directories(self) -> list[str]:
        """Return the directories of the URI that do not exist, the lowest first.

        Empty for a file system that all nodes reach by its URI: no mount can be missing there.
        """
        path = Path(self._open_fs()[1] or "/")
        missing = []
        while self._is_local and not path.exists():
            missing.append(str(path))
            path = path.parent
            begin_step(self._patience.answer)
        return missing

    @_changing
    def remove_directories(self, paths: Sequence[str]) -> None:
        """Remove those of `paths`, in their order, that are empty."""
        self._remove_if_empty(*paths)

    # --- signatures, by which nodes recognise a shared directory ---

    def sign(self, session: str, token: str) -> None:
        """Write a session's token, so that other nodes can find it in the same directory.

        Without a token nothing can be written to a directory, and nothing counts as lost there. A
        failure comes within `Patience.answer`. If the cause is a hung step, the token is removed
        once that step returns.
        """
        with self._errors(), self._changing.thread() as thread:
            try:
                thread.run(functools.partial(self._sign, session, token))
            except StalledError:
                thread.finish(lambda: self.unsign(session, token))
                raise

    def _sign(self, session: str, token: str) -> None:
        filesystem, root = _open(self._uri, patient=False)
        directory = self._below(root, session)
        if _has_directories(filesystem):
            filesystem.create_dir(directory)
        with filesystem.open_output_stream(f"{directory}/{_SIGNATURE}{token}") as file:
            file.write(b"This place is used by a Ray session.\n")

    @_reading
    def is_signed(self, session: str, token: str) -> bool:
        return self._exists(self._signature(session, token))

    @_changing
    def unsign(self, session: str, token: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._signature(session, token))
        begin_step(self._patience.answer)
        if self._has_directories:
            self._remove_if_empty(self._directory(session), self._directory())
        elif self._is_empty(session):
            # `pyarrow` leaves an empty object with the name of a removed file's directory. Nobody
            # uses a session without a signature, but the directory above may be in use.
            self._delete_directory(self._directory(session))

    # --- helpers, in a thread ---

    @property
    def _fs(self) -> Any:
        return self._open_fs()[0]

    def _open_fs(self) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = _open(self._uri, patient=True)
            begin_step(self._patience.answer)
        return self._opened

    @property
    def _has_directories(self) -> bool:
        return _has_directories(self._fs)

    @property
    def _data_limit(self) -> float:
        """Seconds that a read or write of data may take."""
        return self._patience.data if self._has_directories else self._patience.request

    def _below(self, root: str, *components: str) -> str:
        # Names of sessions and tokens come from the server, where others may write.
        for component in components:
            if "/" in component or component in ("", ".", ".."):
                raise OverflowUnavailableError(
                    f"{component!r} cannot be a name in the overflow at {self}, and no such path "
                    "is touched there",
                    "Find the program that also writes to the server's keys",
                )
        return "/".join((root, self._root, *components))

    def _directory(self, *components: str) -> str:
        return self._below(self._open_fs()[1], *components)

    def _path(self, place: Place) -> str:
        session, node, rest = str(place.name).split(":")
        return self._directory(session, node, f"{rest}.{place.size}")

    def _signature(self, session: str, token: str) -> str:
        return self._directory(session, f"{_SIGNATURE}{token}")

    def _ending(self, session: str) -> str:
        return self._directory(session, _ENDING)

    def _create(self, place: Place, token: str | None) -> _NewFile:
        path = self._path(place)
        limits = self._patience.answer, self._data_limit
        if not self._has_directories:
            return _NewFile(self._fs, path, "", *limits)
        # If the signature is missing, the session is gone or a share is not mounted, and nobody
        # would find the file. Not recursive: the signature is in the directory above.
        if token is not None:
            self._require_signature(place, token)
            begin_step(self._patience.answer)
        self._fs.create_dir(path.rpartition("/")[0], recursive=False)
        return _NewFile(self._fs, path, _PART, *limits)

    def _discard(self, *paths: str) -> None:
        """Remove unfinished files, now or with the next `write`."""
        for path in paths:
            begin_step(self._patience.answer)
            try:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.delete_file(path)
            except (OSError, pa.ArrowException):
                self._undiscarded.append(path)

    def _discard_again(self) -> None:
        for _ in range(len(self._undiscarded)):
            self._discard(self._undiscarded.popleft())

    def _require_signature(self, place: Place, token: str | None) -> None:
        """Distinguish a missing file from missing storage, for example a share that is not mounted.

        Raises:
            OverflowUnavailableError: the session's signature is not there; without a token, none.
        """
        session = place.name.session
        if token is not None:
            begin_step(self._patience.answer)
            is_signed = self._exists(self._signature(session, token))
        else:
            is_signed = any(name.startswith(_SIGNATURE) for name in self._file_names(session))
        if not is_signed:
            raise self.nothing_of(session)

    def _file_names(self, session: str) -> set[str]:
        """Return the names of the files beside the directories of a session's nodes."""
        return {path.rpartition("/")[2] for path, _ in self._list(self._directory(session))}

    def nothing_of(self, session: str) -> OverflowUnavailableError:
        """Return the error for a session whose files should be here."""
        return OverflowUnavailableError(
            f"the overflow at {self} has nothing of session {session} any more",
            "Mount the directory again; without its files the objects spilled there are lost",
        )

    def _list(self, directory: str, kind: Any = fs.FileType.File) -> list[tuple[str, int]]:
        """Return the paths and lengths of a directory's entries; empty if it does not exist."""
        if self._is_local:
            return list(self._scan(directory, kind))
        found: list[Any] = []
        begin_step(self._patience.request)
        # `allow_not_found` does not cover a directory that is created during the call.
        with contextlib.suppress(FileNotFoundError):
            found = self._fs.get_file_info(fs.FileSelector(directory, allow_not_found=True))
        begin_step(self._patience.answer)
        return [(info.path, info.size or 0) for info in found if info.type == kind]

    def _scan(self, directory: str, kind: Any) -> Iterator[tuple[str, int]]:
        # `pyarrow` shows no progress, and many files on a slow share take long.
        begin_step(self._patience.answer)
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                begin_step(self._patience.answer)
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat()
                    is_kind = stat.S_ISDIR if kind == fs.FileType.Directory else stat.S_ISREG
                    if is_kind(info.st_mode):
                        yield entry.path, info.st_size

    def _list_directories(self, directory: str) -> list[str]:
        found = self._list(directory, fs.FileType.Directory)
        return [path.rpartition("/")[2] for path, _ in found]

    def _is_empty(self, session: str) -> bool:
        return not self._fs.get_file_info(
            fs.FileSelector(self._directory(session), allow_not_found=True)
        )

    def _exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def _delete_directory(self, path: str) -> None:
        """Remove a directory and its content, even if others write or remove files there."""
        begin_step(self._patience.answer)
        if self._has_directories:
            # Move it to a name that nobody writes to. If this process is killed, a clean-up takes
            # it for the directory of a dead node or session.
            path, known = f"{path}.{os.urandom(4).hex()}", path
            try:
                self._fs.move(known, path)
            except FileNotFoundError:
                return
        for attempts_left in reversed(range(_DELETE_ATTEMPTS)):
            try:
                if self._is_local:
                    _remove_tree(path, None, self._patience.answer)
                else:
                    begin_step(self._patience.request)
                    self._fs.delete_dir(path)
                return
            except OSError:
                begin_step(self._patience.answer)
                if self._fs.get_file_info(path).type == fs.FileType.NotFound:
                    return
                if not attempts_left:
                    raise

    def _remove_if_empty(self, *paths: str) -> None:
        """Remove directories that are empty."""
        # `pyarrow` removes a directory with its content, which another process may just have made.
        for path in paths if self._is_local else ():
            begin_step(self._patience.answer)
            with contextlib.suppress(OSError):
                os.rmdir(path)

    @property
    def _is_local(self) -> bool:
        return bool(self._fs.type_name == "local")

    # --- helpers, in the calling thread ---

    def _run(self, threads: StepThreads, work: Callable[[], _T]) -> _T:
        with self._errors():
            return threads.run(work)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate the errors of the file system."""
        try:
            yield
        except StalledError as error:
            raise OverflowUnavailableError(
                f"the overflow at {self} does not answer: {error}",
                "Repair the file server, mount or object store there; until then nothing can be "
                "spilled to it or restored from it",
            ) from None
        except (OSError, pa.ArrowException) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            told = (str(error).splitlines() or [type(error).__name__])[0]
            # The message about a URI that cannot be parsed contains all of it.
            told = told.replace(self._uri, str(self))
            raise OverflowUnavailableError(
                f"the overflow at {self} {'is full' if full else 'cannot be used'}: {told}",
                "Make room there" if full else "Every node must be able to read and write there",
            ) from error


class _NewFile:
    """A file that is being written at `path`. It gets its final name once it is complete."""

    def __init__(self, filesystem: Any, name: str, suffix: str, answer: float, data: float) -> None:
        self._fs = filesystem
        self._name = name
        self._answer, self._data = answer, data
        self.path = f"{name}{suffix}"
        begin_step(answer)
        self._stream = filesystem.open_output_stream(self.path, compression=None)
        self.size = 0

    @property
    def paths(self) -> set[str]:
        """Paths at which the file, or a part of it, may be."""
        return {self.path, self._name}

    def write(self, data: Buffer) -> None:
        begin_step(self._data)
        self._stream.write(data)
        self.size += len(data)

    def commit(self) -> None:
        begin_step(self._data + self.size / _SLOWEST)
        self._stream.close()
        if self.path != self._name:
            begin_step(self._answer)
            self._fs.move(self.path, self._name)

    def close(self) -> None:
        """Close the file as it is. An object store then has it, truncated, until it is removed."""
        begin_step(self._data + self.size / _SLOWEST)
        _close(self._stream)


class _Writer:
    """Writes a file in a thread that may hang.

    Data are copied first: a hung write refers to its data until it returns, when the caller has
    long reused its memory.

    Args:
        create: opens the file, in the thread.
        discard: removes files, in the thread.
        thread: the thread.
        buffers: this tier's memory for the copies.
    """

    def __init__(
        self,
        create: Callable[[], _NewFile],
        discard: Callable[..., None],
        thread: StepThread,
        buffers: Sequence[memoryview],
    ) -> None:
        self._create = create
        self._discard = discard
        self._thread = thread
        self._buffers = deque(buffers)
        self._used = 0  # bytes of the first buffer
        self._under_way: deque[Job[None]] = deque()
        self._file: _NewFile | None = None  # the thread's

    def write(self, parts: Iterable[Buffer]) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                buffer = self._buffers[0]
                room = buffer[self._used : self._used + len(left)]
                copy_into(left[: len(room)], room)
                self._used += len(room)
                left = left[len(room) :]
                if self._used == len(buffer):
                    self._hand_over(self._append)

    def commit(self) -> int:
        """Complete the file; return its length in bytes."""
        self._hand_over(self._complete)
        while self._under_way:
            self._thread.wait(self._under_way.popleft())
        assert self._file is not None
        return self._file.size

    def _hand_over(self, work: Callable[[memoryview], None]) -> None:
        """Submit `work` on the first buffer's content, and continue with the next buffer."""
        data = self._buffers[0][: self._used]
        self._under_way.append(self._thread.submit(functools.partial(work, data)))
        self._buffers.rotate(-1)
        self._used = 0
        if len(self._under_way) == len(self._buffers):
            self._thread.wait(self._under_way.popleft())

    # --- in the thread ---

    def _append(self, data: memoryview) -> None:
        if self._file is None:
            self._file = self._create()
        self._file.write(data)

    def _complete(self, data: memoryview) -> None:
        self._append(data)
        assert self._file is not None
        self._file.commit()

    def discard(self) -> None:
        """Remove the file, even if it was completed."""
        if self._file is not None:
            self._file.close()
            self._discard(*self._file.paths)


def _open(uri: str, *, patient: bool) -> tuple[Any, str]:
    """Return the file system, and the path in it. Unless `patient`, it gives up on S3 in 3 s."""
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_RETRY_SECONDS}"
    filesystem, path = fs.FileSystem.from_uri(uri)
    if filesystem.type_name == "s3":
        # A URI cannot express these options. Background writes buffer without a limit, so they
        # could hold a whole object.
        rebuild, (options,) = filesystem.__reduce__()
        options["background_writes"] = False
        if not patient:
            options |= {"connect_timeout": 1, "request_timeout": 1}
            options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=2)
        filesystem = rebuild(options)
    return filesystem, path.rstrip("/")


def _has_directories(filesystem: Any) -> bool:
    return filesystem.type_name not in _OBJECT_STORES


def _remove_tree(name: str, parent: int | None, limit: float) -> None:
    """Remove a local directory and its content. Each step may take `limit` seconds.

    Others may write to the overflow, so this follows no symbolic link, even one that replaces a
    directory meanwhile.

    Args:
        name: path of the directory, relative to `parent`.
        parent: file descriptor of a directory; None for the working directory.
        limit: seconds for each step.
    """
    # `pyarrow` and `shutil` show no progress, and many files on a slow share take long.
    begin_step(limit)
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except NotADirectoryError:
        os.unlink(name, dir_fd=parent)
        return
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for below, is_directory in found:
            begin_step(limit)
            with contextlib.suppress(FileNotFoundError):
                if is_directory:
                    _remove_tree(below, directory, limit)
                else:
                    os.unlink(below, dir_fd=directory)
    finally:
        os.close(directory)
    begin_step(limit)
    os.rmdir(name, dir_fd=parent)


def _close(file: Any) -> None:
    with contextlib.suppress(OSError, pa.ArrowException):
        file.close()


def _inline(file: Any, size: int) -> bytes:
    """Return the content of an inline object's file: the header's value with its payload.

    Empty, and so no valid header, if the file is longer than that of any inline object.
    """
    if size > INLINE_LIMIT + largest_header(chunks=0):
        return b""
    value: bytes = file.read_at(size, 0)
    return value


def _tail(file: Any, size: int, chunks: int) -> bytes:
    """Return the header's value from the end of a file with `chunks` chunks before it.

    Empty, and so no valid header, if its trailer claims more than the longest header of so many
    chunks.
    """
    tail: bytes = file.read_at(min(size, _TAIL), max(0, size - _TAIL))
    claimed = header_size(tail[-TRAILER_SIZE:])
    if claimed > largest_header(chunks):
        return b""
    wanted = min(size, claimed)
    if wanted > len(tail):
        tail = file.read_at(wanted, size - wanted)
    return tail[len(tail) - wanted :]


_Wanted = Iterable[tuple[int, memoryview]]


def _spans(offsets: Sequence[int], wanted: _Wanted) -> Iterator[list[tuple[int, memoryview]]]:
    """Group consecutive chunks into spans of up to `_SPAN` bytes."""
    span: list[tuple[int, memoryview]] = []
    for number, into in wanted:
        if span and (
            number != span[-1][0] + 1 or offsets[number + 1] - offsets[span[0][0]] > _SPAN
        ):
            yield span
            span = []
        span.append((number, into))
    if span:
        yield span


def _ends_in(number: int) -> LostObjectError:
    return LostObjectError(f"its file in the overflow ends in chunk {number}")
