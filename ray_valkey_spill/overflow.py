"""Where bytes live that Valkey has no room for: a file an object, in a place that all nodes reach.

    <overflow_uri>/<key_prefix><namespace>/<session>/<node>/<object>.<attempt>.<n>.<size>

A file has an object's chunks, one after the other, and then its header's value, as in Valkey. What
is cut off has no header at its end and so never looks whole. In a directory, a file has ".part"
after its name until it is written; in an object store, it is not there before its upload is
completed. An upload whose writer is killed never is, and only the store's own rule for incomplete
uploads removes its parts: `pyarrow` can neither list nor abort it.

The files are their own index: an owner's are in one directory. Nothing of them is on the server,
which is full when they are written. Beside the nodes' directories a session has a signature in its
own, for as long as it has one: `<session>/place.<token>`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
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
# A request to an object store is slow to begin with, so each asks for much, and some go at a time.
_SPAN = 4 * MIB
_SPANS_AHEAD = 3
_TAIL = 16 << 10
_PART = ".part"
_SIGNATURE = "place."
_FILE = re.compile(r"([^/]+)\.([0-9]+)(\.part)?")
# Seconds that a head waits for an overflow to answer; a head start has to fail within five.
_SIGN_TIMEOUT = 4.0
# Of removing a directory: files may come and go that somebody was at when it still had its name.
_DELETE_ATTEMPTS = 5
# Google's client would retry for a quarter of an hour, without a word.
_GCS_RETRY_SECONDS = 10


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
        # What could not be removed after a failure: the place may not have been there.
        self._undiscarded: deque[str] = deque()

    @classmethod
    def of(cls, config: Config) -> OverflowTier | None:
        uri = config.overflow_uri
        return None if uri is None else cls(uri, Keyspace.of(config))

    def __str__(self) -> str:
        """The URI, without what can be secret in it."""
        if "://" not in self._uri:
            return self._uri
        parts = urlsplit(self._uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    # --- objects ---

    def write(self, values: Iterable[Value]) -> Iterator[Entry]:
        """Write `values` in order, and yield each object once all of it is there.

        If that fails, or is given up, nothing is left of the object that it was at; if that cannot
        be removed either, the next `write` does it.
        """
        self._discard_again()
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
                file.close()
                self._discard(file.path)

    def stat(self, place: Place) -> Stat:
        """The header, and how many bytes of chunks there are."""
        with self._errors():
            try:
                with self._fs.open_input_file(self._path(place)) as file:
                    size = file.size()
                    tail = file.read_at(size, 0) if place.name.chunks == 0 else _tail(file, size)
            except FileNotFoundError:
                self._require_signature(place)
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
        with self._errors():
            try:
                file = self._fs.open_input_file(self._path(place))
            except FileNotFoundError:
                self._require_signature(place)
                raise LostObjectError("its file is gone from the overflow") from None
            with file:
                if self._has_directories:
                    yield from _read_chunks(file, offsets, wanted)
                else:
                    yield from _read_spans(file, offsets, wanted)

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

    def sessions(self) -> set[str]:
        """Those that have anything here, if only a signature."""
        return set(self._list_directories(self._directory()))

    def owners(self) -> set[Owner]:
        return {
            Owner(session, node)
            for session in self.sessions()
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
        """Leave a token, which whoever sees the same place finds.

        Without it nothing can be written to a directory, nor is anything there taken for lost. This
        fails within 5 s, if it does.
        """
        signed: Future[None] = Future()

        def sign() -> None:
            try:
                filesystem, root = _open(self._uri, patient=False)
                directory = self._below(root, session)
                if _has_directories(filesystem):
                    filesystem.create_dir(directory)
                with filesystem.open_output_stream(f"{directory}/{_SIGNATURE}{token}") as file:
                    file.write(b"This place is used by a Ray session.\n")
                signed.set_result(None)
            except BaseException as error:
                signed.set_exception(error)

        # A share whose server is away makes its callers wait without end, and some clients retry.
        threading.Thread(target=sign, name="ray-valkey-spill-sign", daemon=True).start()
        with self._errors():
            try:
                signed.result(_SIGN_TIMEOUT)
            except FutureTimeoutError:
                if signed.done():
                    raise  # the file system's own
                raise TimeoutError(f"no answer within {_SIGN_TIMEOUT:.0f} s") from None

    def is_signed(self, session: str, token: str) -> bool:
        with self._errors():
            return self._exists(self._signature(session, token))

    def unsign(self, session: str, token: str) -> None:
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._signature(session, token))
        if self._has_directories:
            self._remove_if_empty(self._directory(session), self._directory())
        elif self._is_empty(session):
            # `pyarrow` leaves an empty object in the name of what a file was in. A session that has
            # no signature is used by nobody, but what is above it may be.
            self._delete_directory(self._directory(session))

    # --- helpers ---

    @property
    def _fs(self) -> Any:
        return self._open_fs()[0]

    def _open_fs(self) -> tuple[Any, str]:
        if self._opened is None:
            with self._errors():
                self._opened = _open(self._uri, patient=True)
        return self._opened

    @property
    def _has_directories(self) -> bool:
        return _has_directories(self._fs)

    def _below(self, root: str, *components: str) -> str:
        # Names of sessions and tokens come from the server, which others may write to.
        for component in components:
            if "/" in component or component in ("", ".", ".."):
                raise OverflowUnavailableError(
                    f"{component!r} cannot be a name in the overflow at {self}, and nothing of the "
                    "kind is touched there",
                    "Look for who else writes to the server's keys",
                )
        return "/".join((root, self._root, *components))

    def _directory(self, *components: str) -> str:
        return self._below(self._open_fs()[1], *components)

    def _path(self, place: Place) -> str:
        session, node, rest = str(place.name).split(":")
        return self._directory(session, node, f"{rest}.{place.size}")

    def _signature(self, session: str, token: str) -> str:
        return self._directory(session, f"{_SIGNATURE}{token}")

    def _create(self, value: Value) -> _NewFile:
        path = self._path(Place(value.name, value.size))
        if not self._has_directories:
            return _NewFile(self._fs, path, "")
        # Not the session's directory, which its signature is in: where that is gone, so is the
        # session, or a share is not mounted, and what is written would be found by nobody.
        self._fs.create_dir(path.rpartition("/")[0], recursive=False)
        return _NewFile(self._fs, path, _PART)

    def _discard(self, path: str) -> None:
        """Remove what was not finished, now or with the next `write`."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(path)
        except (OSError, pa.ArrowException):
            self._undiscarded.append(path)

    def _discard_again(self) -> None:
        for _ in range(len(self._undiscarded)):
            self._discard(self._undiscarded.popleft())

    def _require_signature(self, place: Place) -> None:
        """Tell that a place is gone, such as a share that is not mounted, and not a file of it.

        Raises:
            OverflowUnavailableError
        """
        directory = self._directory(place.name.session)
        names = [path.rpartition("/")[2] for path, _ in self._list(directory)]
        if not any(name.startswith(_SIGNATURE) for name in names):
            raise OverflowUnavailableError(
                f"the overflow at {self} has nothing of session {place.name.session} any more",
                "Mount or bring back what was there; without it what was spilled there is lost",
            )

    def _list(self, directory: str, kind: Any = fs.FileType.File) -> list[tuple[str, int]]:
        """The paths and lengths of what is in a directory; nothing if it is not there."""
        found: list[Any] = []
        # `allow_not_found` does not help where it was not there, and then another made it.
        with self._errors(), contextlib.suppress(FileNotFoundError):
            found = self._fs.get_file_info(fs.FileSelector(directory, allow_not_found=True))
        return [(info.path, info.size or 0) for info in found if info.type == kind]

    def _list_directories(self, directory: str) -> list[str]:
        found = self._list(directory, fs.FileType.Directory)
        return [path.rpartition("/")[2] for path, _ in found]

    def _is_empty(self, session: str) -> bool:
        with self._errors():
            return not self._fs.get_file_info(
                fs.FileSelector(self._directory(session), allow_not_found=True)
            )

    def _exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def _delete_directory(self, path: str) -> None:
        """Remove a directory and all in it, whatever others write or remove there meanwhile."""
        with self._errors():
            if self._has_directories:
                # Under a name that nobody else writes to. If this is killed, a clean-up takes it
                # for that of a node, or of a session, which is dead.
                path, known = f"{path}.{os.urandom(4).hex()}", path
                try:
                    self._fs.move(known, path)
                except FileNotFoundError:
                    return
            for attempts_left in reversed(range(_DELETE_ATTEMPTS)):
                try:
                    self._fs.delete_dir(path)
                    return
                except OSError:
                    if self._fs.get_file_info(path).type == fs.FileType.NotFound:
                        return
                    if not attempts_left:
                        raise

    def _remove_if_empty(self, *paths: str) -> None:
        """Remove directories that have nothing in them."""
        # `pyarrow` removes a directory only with what is in it, which another may just have made.
        with self._errors():
            kind = self._fs.type_name
        for path in paths if kind == "local" else ():
            with contextlib.suppress(OSError):
                os.rmdir(path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the file system raises, in our terms."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            told = (str(error).splitlines() or [type(error).__name__])[0]
            # Where a URI cannot be parsed, all of it is told.
            told = told.replace(self._uri, str(self))
            raise OverflowUnavailableError(
                f"the overflow at {self} {'is full' if full else 'cannot be used'}: {told}",
                "Make room there" if full else "Every node must be able to write and read there",
            ) from error


class _NewFile:
    """A file that is being written at `path`; it has its name once it is whole."""

    def __init__(self, filesystem: Any, name: str, suffix: str) -> None:
        self._fs = filesystem
        self._name = name
        self.path = f"{name}{suffix}"
        self._stream = filesystem.open_output_stream(self.path, compression=None)
        self._size = 0

    def write(self, parts: Iterable[Buffer]) -> None:
        for part in parts:
            self._stream.write(part)
            self._size += len(part)

    def commit(self) -> int:
        """Returns the file's length."""
        self._stream.close()
        if self.path != self._name:
            self._fs.move(self.path, self._name)
        return self._size

    def close(self) -> None:
        """Close it as it is. An object store then has it, cut off, until it is removed."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._stream.close()


def _open(uri: str, *, patient: bool) -> tuple[Any, str]:
    """The file system, and the path in it; the impatient one gives up on S3 in 3 s."""
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_RETRY_SECONDS}"
    filesystem, path = fs.FileSystem.from_uri(uri)
    if filesystem.type_name == "s3":
        # These have no form in a URI. Writes in the background take in all that is given, at once,
        # and so could hold a whole object.
        rebuild, (options,) = filesystem.__reduce__()
        options["background_writes"] = False
        if not patient:
            options |= {"connect_timeout": 1, "request_timeout": 1}
            options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=2)
        filesystem = rebuild(options)
    return filesystem, path.rstrip("/")


def _has_directories(filesystem: Any) -> bool:
    return filesystem.type_name not in _OBJECT_STORES


def _tail(file: Any, size: int) -> bytes:
    """The header's value, from the end of a file that has chunks before it."""
    tail: bytes = file.read_at(min(size, _TAIL), max(0, size - _TAIL))
    wanted = min(size, header_size(tail[-TRAILER_SIZE:]))
    if wanted > len(tail):
        tail = file.read_at(wanted, size - wanted)
    return tail[len(tail) - wanted :]


_Wanted = Iterable[tuple[int, memoryview]]


def _read_chunks(file: Any, offsets: Sequence[int], wanted: _Wanted) -> Iterator[None]:
    """Receive chunks, each from its offset right into its place."""
    for number, into in wanted:
        file.seek(offsets[number])
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])
            if not count:
                raise _ends_in(number)
            done += count
        yield


def _read_spans(file: Any, offsets: Sequence[int], wanted: _Wanted) -> Iterator[None]:
    """Receive chunks by spans of several, some of which are under way at a time."""
    under_way: deque[tuple[list[tuple[int, memoryview]], Future[bytes]]] = deque()

    def received() -> Iterator[None]:
        span, job = under_way.popleft()
        data, start = memoryview(job.result()), offsets[span[0][0]]
        for number, into in span:
            found = data[offsets[number] - start :][: len(into)]
            if len(found) < len(into):
                raise _ends_in(number)
            into[:] = found
            yield

    pool = ThreadPoolExecutor(_SPANS_AHEAD, thread_name_prefix="ray-valkey-spill-read")
    try:
        for span in _spans(offsets, wanted):
            start, end = offsets[span[0][0]], offsets[span[-1][0] + 1]
            under_way.append((span, pool.submit(file.read_at, end - start, start)))
            if len(under_way) > _SPANS_AHEAD:
                yield from received()
        while under_way:
            yield from received()
    finally:
        pool.shutdown(cancel_futures=True)


def _spans(offsets: Sequence[int], wanted: _Wanted) -> Iterator[list[tuple[int, memoryview]]]:
    """Chunks that follow one another, together as far as they have up to `_SPAN` bytes."""
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
