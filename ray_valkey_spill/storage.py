"""The Ray adapter: Ray's ExternalStorage on the object store.

What Ray does around a storage decides much here; the behaviour referred to is that of
`python/ray/_private/external_storage.py`, `put_file_like_object` in `python/ray/_raylet.pyx` and
`src/ray/raylet/local_object_manager.cc` of Ray 2.60.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray import ObjectRef
from ray._private.external_storage import ExternalStorage
from ray._private.utils import push_error_to_driver
from ray.core.generated.common_pb2 import ErrorType

from ray_valkey_spill import preflight
from ray_valkey_spill.background import Background
from ray_valkey_spill.cleanup import RENEWAL, CleanUp
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    OverflowUnavailableError,
    SpillError,
)
from ray_valkey_spill.gcs import running_at
from ray_valkey_spill.journal import DeletionJournal
from ray_valkey_spill.metrics import Metrics
from ray_valkey_spill.objects import ObjectStore, StoredObject
from ray_valkey_spill.observer import Operation
from ray_valkey_spill.outage import Outage
from ray_valkey_spill.packing import SourceObject

__all__ = ["ValkeyStorage"]

logger = logging.getLogger("ray_valkey_spill")

# The metadata of an empty object that makes `ray.get` raise ObjectLostError.
_OBJECT_LOST = str(ErrorType.Value("OBJECT_LOST")).encode()

# Seconds that `ray.shutdown()` may wait for a server that no longer answers.
_DESTROY_PATIENCE = 3.0

# Seconds between looks for what failed operations and killed IO workers left, which also renew the
# node's lease, and between attempts to remove it.
_BETWEEN_LOOKS, _BETWEEN_ATTEMPTS = RENEWAL, 2.0
_ATTEMPTS_PER_WARNING = 6
# Until an IO worker that has just been started is connected.
_BETWEEN_STARTS = 0.2

# What this process has checked: see `ValkeyStorage.__init__`.
_checked: set[tuple[str, Config]] = set()


class ValkeyStorage(ExternalStorage):  # type: ignore[misc]
    """Spills Ray objects to Valkey.

    Ray makes one in every IO worker; in the process that starts the head, to validate the config
    before the node has an id; and there again at `ray.shutdown()`, to destroy it.

    Args:
        node_id: hex of the node's id.
        session_name: the Ray session's name.
        **params: see `ray_valkey_spill.config.Config`.

    Raises:
        ConfigError: a parameter is wrong. Not in an IO worker, where the environment of its node
            can be at fault: one that does not come up is started again without end, and nobody is
            told. It fails every operation instead, and drivers are told.
        ServerError, OverflowUnavailableError: the server cannot be used, as found by
            `preflight.run_all`, or the overflow. Only outside of IO workers, and there only the
            first time for a session: that is Ray's validation, whose failure stops the head. An IO
            worker comes up without either and retries, and `ray.shutdown()` must not fail because
            the server went first.
    """

    def __init__(self, node_id: str, session_name: str, **params: Any) -> None:
        super().__init__()
        self._in_io_worker = _in_io_worker()
        self._shared = f"ray_valkey_spill-{node_id}"
        self._session_dir = functools.partial(_session_dir, session_name)
        self._outage = Outage(self._session_dir, f"{self._shared}.outage", _tell_drivers)
        self._journal = DeletionJournal(self._session_dir, self._shared)
        self._metrics = Metrics(lambda: self._in_io_worker and _is_connected())
        self._recovery = Background(self._recover)
        self._failed_recoveries = 0
        try:
            config = Config.load(params)
        except ConfigError as error:
            if not self._in_io_worker:
                raise
            self._store = self._impatient_store = cast(ObjectStore, _Unusable(error))
            return
        self._store = ObjectStore(config, session_name, node_id, self._metrics)
        if self._in_io_worker:
            self._recovery.start()
        if not self._in_io_worker and (session_name, config) not in _checked:
            try:
                preflight.run_all(config)
                self._store.probe_overflow()
            except SpillError as error:
                raise error from None  # Ray prints causes too, and one message is enough
            _checked.add((session_name, config))
            _clean_up(config, params, session_name)
        self._impatient_store = ObjectStore(
            dataclasses.replace(config, retry_timeout=min(config.retry_timeout, _DESTROY_PATIENCE)),
            session_name,
            node_id,
        )

    # --- Ray's interface ---

    def spill_objects(
        self, object_refs: list[ObjectRef], owner_addresses: list[bytes]
    ) -> list[bytes]:
        """Store objects; returns their URLs, in order.

        If not all can be stored, the URLs of those that were are returned, which Ray takes for a
        prefix of `object_refs`, and nothing is left of the rest. If none can be, that comes after a
        pause, because Ray tries again at once. No failure is raised: see `outage`.
        """
        if not object_refs:
            return []
        self._recovery.start()
        urls = self._spill(object_refs, owner_addresses)
        if not urls:
            self._outage.pause()
        return [url.encode() for url in urls]

    def restore_spilled_objects(
        self, object_refs: list[ObjectRef], url_with_offset_list: list[bytes]
    ) -> int:
        """Put spilled objects back into plasma; returns the bytes of data restored.

        For an object that is lost, Ray's ObjectLostError is put in its place: an exception would
        have Ray retry for hours with `ray.get` waiting. A server that cannot be used is waited for,
        because Ray's retries come ten seconds after an exception, then twenty, and ever later.

        Raises:
            SpillError: an object could not be filled, outside of an IO worker; see `_abandon`.
        """
        self._recovery.start()
        wanted = [(_text(url), ref.hex()) for ref, url in zip(object_refs, url_with_offset_list)]
        return sum(map(self._restore, object_refs, self._find(wanted)))

    def delete_spilled_objects(self, urls: list[bytes]) -> None:
        """Remove objects; what is not there is no error.

        What cannot be removed now is removed once it can be: Ray never asks again.
        """
        wanted = [_text(url) for url in urls]
        self._recovery.start()
        try:
            with self._journal.deleting(wanted):
                foreign = self._store.delete(wanted)
        except SpillError as error:
            self._recovery.wake()
            self._failed("delete", "objects cannot be deleted", error)
            return
        for url in foreign:
            logger.warning("not deleted, because it was not spilled here: %s", url)
        self._outage.over()

    def destroy_external_storage(self) -> None:
        """Remove this node's objects, and no others. Never raises: Ray is shutting down."""
        try:
            # After validating too: nothing is anybody's that has the node id of that.
            self._note_destruction()
            self._impatient_store.destroy(_is_alive)
        except SpillError as error:
            logger.warning("spilled objects of this node may be left on the server: %s", error)
        finally:
            self._recovery.stop()
            self._impatient_store.close()
            self._store.close()

    def _recover(self) -> float:
        """Show that this node lives; do what this process and killed ones have left undone."""
        if self._in_io_worker and not _is_connected():
            return _BETWEEN_STARTS
        self._store.close_idle()
        mine = self._journal.left()
        others = self._journal.of_the_dead(_is_alive)
        try:
            self._store.renew_lease(_gcs_address(), self._is_destroyed)
            self._metrics.renewed_lease()
            self._join_overflow()
            self._measure_room()
            self._store.recover(_is_alive, [*mine, *(url for _, urls in others for url in urls)])
        except SpillError as error:
            # Operations that suffer from the same have told of it by then, but there may be none.
            self._metrics.failed("recover", error)
            self._failed_recoveries += 1
            if self._failed_recoveries % _ATTEMPTS_PER_WARNING == 0:
                logger.warning("what failed operations left cannot be removed yet: %s", error)
            return min(self._failed_recoveries * _BETWEEN_ATTEMPTS, _BETWEEN_LOOKS)
        finally:
            self._metrics.looked(self._store.breaks)
        self._failed_recoveries = 0
        self._journal.done(mine)
        for path, _ in others:
            path.unlink(missing_ok=True)
        self._measure_overflow()
        return _BETWEEN_LOOKS

    def _join_overflow(self) -> None:
        """Tell of an overflow that cannot be used before anything is lost to it."""
        try:
            self._store.join_overflow()
        except OverflowUnavailableError as error:
            self._failed("recover", "the overflow cannot be used from a node", error)

    def _measure_room(self) -> None:
        with contextlib.suppress(SpillError):  # another time
            self._metrics.found_room(self._store.room())

    def _measure_overflow(self) -> None:
        with contextlib.suppress(SpillError):
            if (size := self._store.in_overflow()) is not None:
                self._metrics.found_in_overflow(size)

    def _failed(
        self, operation: Operation | Literal["recover"], what: str, error: SpillError
    ) -> None:
        self._metrics.failed(operation, error)
        self._outage.failed(what, error)

    def _note_destruction(self) -> None:
        """Let the node's IO workers know that it needs no lease any more."""
        if (path := self._destruction) is not None:
            with contextlib.suppress(OSError):
                path.touch()

    def _is_destroyed(self) -> bool:
        return (path := self._destruction) is not None and path.exists()

    @property
    def _destruction(self) -> Path | None:
        directory = self._session_dir()
        return directory and directory / f"{self._shared}.destroyed"

    # --- spill ---

    def _spill(self, refs: Sequence[ObjectRef], owner_addresses: Sequence[bytes]) -> list[str]:
        """The URLs of what could be stored. Holds nothing of plasma's once it is over."""
        try:
            self._store.begin_lease(_gcs_address(), self._is_destroyed)
            urls, failure = self._store.put(self._sources(refs, owner_addresses))
        except SpillError as error:
            self._cannot_spill(error)
            return []
        if failure is None:
            self._outage.over()
        else:
            self._cannot_spill(failure)
        return urls

    def _cannot_spill(self, error: SpillError) -> None:
        self._failed("spill", "objects cannot be spilled", error)
        if self._store.has_left_some:
            self._recovery.wake()

    def _sources(
        self, refs: Sequence[ObjectRef], owner_addresses: Sequence[bytes]
    ) -> list[SourceObject]:
        """The objects, read in place from plasma, up to the first that is not there."""
        sources: list[SourceObject] = []
        found = self._get_objects_from_store(refs)
        for ref, (buffer, metadata, *_), owner in zip(refs, found, owner_addresses):
            if buffer is None and not metadata:
                if sources:
                    break
                raise SpillError(f"object {ref.hex()} is not in this node's object store")
            data = memoryview(buffer if buffer is not None else b"").cast("B")
            sources.append(SourceObject(ref.hex(), bytes(metadata), bytes(owner), data))
        return sources

    # --- restore ---

    def _find(self, wanted: Sequence[tuple[str, str]]) -> Iterator[StoredObject | LostObjectError]:
        """What `ObjectStore.find_all` finds, however long that takes."""
        done = 0
        while done < len(wanted):
            try:
                for found in self._store.find_all(wanted[done:]):
                    self._outage.over()
                    done += 1
                    yield found
            except SpillError as error:
                self._failed("restore", "objects cannot be restored", error)
                self._outage.pause()

    def _restore(self, ref: ObjectRef, found: StoredObject | LostObjectError) -> int:
        if isinstance(found, LostObjectError):
            logger.error("ObjectLostError for a reader: %s", found)
            self._put_object_to_store(_OBJECT_LOST, 0, io.BytesIO(), ref, b"")
            return 0
        header = found.header
        source = _Source(self._store, found)
        try:
            self._put_object_to_store(
                header.ray_metadata, header.size, source, ref, header.owner_address
            )
            if not header.size:
                self._store.fill(found, memoryview(b""))  # nobody asked for nothing
        except Exception as error:
            if isinstance(error, SpillError):
                self._metrics.failed("restore", error)
            if source.started:
                self._abandon(found, error)
            raise
        return header.size

    def _abandon(self, found: StoredObject, error: Exception) -> None:
        """End this process, because plasma now has an object that is not filled.

        Plasma keeps such an object for as long as the process that created it lives, takes every
        later restore for done, and lets `ray.get` hang. It drops the object with the process; Ray
        then asks another IO worker. If the data are lost for good, that one must find out before
        it creates anything.
        """
        logger.error("restore given up half way, so this IO worker exits: %s", error)
        if isinstance(error, LostObjectError):
            try:
                self._store.mark_lost(found)
            except SpillError as unmarked:
                logger.error("the lost object could not be marked as such: %s", unmarked)
        if self._in_io_worker:
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)


class _Source:
    """What plasma fills an object from: one `readinto` that takes it all."""

    def __init__(self, store: ObjectStore, found: StoredObject) -> None:
        self._store = store
        self._found = found
        self.started = False

    def readinto(self, view: memoryview) -> int:
        self.started = True
        self._store.fill(self._found, view.cast("B"))
        return len(view)


class _Unusable:
    """Stands in for the store where its config is wrong: any use of it raises that error."""

    has_left_some = False
    breaks = 0

    def __init__(self, error: ConfigError) -> None:
        self._error = error

    def close(self) -> None:
        """There is nothing to close."""

    def close_idle(self) -> None:
        """There is nothing to close."""

    def __getattr__(self, name: str) -> Any:
        raise self._error


def _session_dir(session: str) -> Path | None:
    """Ray's directory for the session, for what IO workers have to know of each other."""
    node = ray._private.worker._global_node
    if node is not None:
        return Path(node.get_session_dir_path())
    # A driver that has shut down may still destroy nodes. Where they are unless Ray was told so:
    directory = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", session)
    return directory if directory.is_dir() else None


def _tell_drivers(message: str) -> None:
    """Print a message at every driver of the cluster."""
    worker = ray._private.worker.global_worker
    if _is_connected():
        push_error_to_driver(worker, "spill_objects_error", message)


def _is_connected() -> bool:
    return bool(ray._private.worker.global_worker.connected)


def _gcs_address() -> str:
    """Where the cluster's GCS is; empty if this process is not connected to it."""
    client = getattr(ray._private.worker.global_worker, "gcs_client", None)
    return "" if client is None else str(client.address)


def _clean_up(config: Config, params: Mapping[str, Any], session: str) -> None:
    """Have a process remove what dead sessions have left, if there are others than `session`.

    It watches for a minute, and `ray start` does not stay for that long.
    """
    look = CleanUp(config, running_at)
    try:
        others = look.sessions() - {session}
    except SpillError as error:
        logger.warning("dead sessions are not cleaned up: %s", error)
        return
    finally:
        look.close()
    if others:
        options = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in params.items()
            if value is not None
        ]
        process = subprocess.Popen(  # noqa: S603 (our own module, and checked parameters)
            [sys.executable, "-m", "ray_valkey_spill", "gc", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=process.wait, daemon=True).start()


def _text(url: bytes) -> str:
    """A URL as text; what is no text is no URL of ours, and will be found not to be."""
    return url.decode(errors="replace")


def _in_io_worker() -> bool:
    """Whether this process is one of Ray's IO workers (`default_worker.py --worker-type=…`)."""
    kinds = ("SPILL_WORKER", "RESTORE_WORKER")
    return any(argument.removeprefix("--worker-type=") in kinds for argument in sys.argv)


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that is dead and not yet reaped does not."""
    try:
        # "pid (command) state …", and the command may have parentheses of its own.
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X")
    except FileNotFoundError:
        return False
    except OSError:
        return True
