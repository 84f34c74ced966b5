"""The Ray adapter: Ray's ExternalStorage on the object store.

Much here follows from how Ray calls a storage. The comments refer to Ray 2.60:
`python/ray/_private/external_storage.py`, `put_file_like_object` in `python/ray/_raylet.pyx`, and
`src/ray/raylet/local_object_manager.cc`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray import ObjectRef
from ray._private.external_storage import ExternalStorage
from ray.core.generated.common_pb2 import ErrorType

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    ServerFullError,
    SpillError,
)
from ray_valkey_spill.format.names import Keyspace, Place, TierName
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.plugin import logs
from ray_valkey_spill.plugin.deferred import DeferredRestores, Restore
from ray_valkey_spill.plugin.deletions import DeletionJournal
from ray_valkey_spill.plugin.ending import Guard, end, end_at_exit, session_log, start_guardian
from ray_valkey_spill.plugin.gcs import running_at
from ray_valkey_spill.plugin.guardian import is_ended, storing
from ray_valkey_spill.plugin.interpreter import module_command
from ray_valkey_spill.plugin.keeper import Keeper, NodeLock
from ray_valkey_spill.plugin.metrics import Metrics
from ray_valkey_spill.plugin.outage import OVERFLOW, ROOM, VALKEY, Losses, Outages, resource_of
from ray_valkey_spill.plugin.owners import RayOwners
from ray_valkey_spill.plugin.proc import ends_with_gcs, gcs_of, identity_of, is_alive
from ray_valkey_spill.plugin.process import (
    Drivers,
    SharedDirectory,
    gcs_address,
    in_io_worker,
    is_connected,
    session_dir,
)
from ray_valkey_spill.store.cleanup import CleanUp
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import ObjectStore, StoredObject
from ray_valkey_spill.store.observer import Loss, Operation
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.overflow import OverflowTier

__all__ = ["ValkeyStorage"]

logger = logging.getLogger("ray_valkey_spill")

# An empty object with this metadata makes `ray.get` raise ObjectLostError.
_OBJECT_LOST = str(ErrorType.Value("OBJECT_LOST")).encode()

# Seconds for which `ray.shutdown()` may wait for a server that no longer answers.
_DESTROY_PATIENCE = 3.0

# Seconds for which a restore or deletion may hold an IO worker with retries before it is deferred.
# Once plasma has created the object, a restore cannot be deferred: this process exits instead, and
# Ray's next attempt comes about ten seconds later.
_HOLD, _HOLD_HALF_WAY = 2.0, 5.0
# Seconds for an attempt of a deferred restore, which its own thread repeats.
_HOLD_DEFERRED = 1.0

# A resource of one object: its uninterrupted read proves nothing about others, which may be larger.
_WHOLE_READS = "uninterrupted reads"

# The clean-up of dead sessions waits ten minutes for a server: nobody waits for the clean-up.
_CLEAN_UP_TIMEOUT = "--timeout=600"
# Variables that would make it use another config than the head's, or join a cluster.
_NOT_OF_CLEAN_UP = {"RAY_object_spilling_config", "RAY_ADDRESS"}

# The methods of Ray's node that create a storage.
_VALIDATING, _DESTROYING = "validate_external_storage", "destroy_external_storage"

# The configs that this process has checked, by session: see `ValkeyStorage.__init__`.
_checked: dict[str, Config] = {}


class ValkeyStorage(ExternalStorage):  # type: ignore[misc]
    """Spills Ray objects to Valkey.

    Ray creates one in every IO worker. The process that starts the head creates one to validate the
    config, before the node has an id, and another at `ray.shutdown()`, to destroy the node's data.

    Args:
        node_id: the node's id, in hex.
        session_name: name of the Ray session.
        **params: see `ray_valkey_spill.config.Config`.

    Raises:
        ConfigError: a parameter is wrong. Never in an IO worker, where the cause may be its node's
            environment: Ray restarts a worker that does not start, again and again, and reports
            nothing. There every operation fails instead, and drivers are notified.
        ServerError, OverflowUnavailableError: `preflight.run_all` found that the server cannot be
            used, or the overflow cannot be used. Only outside IO workers, and only the first time
            for a session: that is Ray's validation, and its failure stops the head. An IO worker
            starts without either and retries, and `ray.shutdown()` must not fail because the
            server stopped first, or because the environment has changed since `ray.init()`.
    """

    def __init__(self, node_id: str, session_name: str, **params: Any) -> None:
        super().__init__()
        self._in_io_worker = in_io_worker()
        if self._in_io_worker:
            logs.set_default_format()
        self._node_id = node_id
        self._caller = _calling_node(session_name)
        calling_node = None if self._caller is None else self._caller.directory
        self._session_dir = functools.partial(session_dir, session_name, calling_node)
        self._shared = SharedDirectory(self._session_dir)
        self._outages = Outages(self._shared, f"{node_id}.outages", Drivers())
        self._losses = Losses(self._shared, f"{node_id}.losses", Drivers(), self._place_of)
        self._lock = NodeLock(self._shared, node_id)
        self._journal = DeletionJournal(self._shared, node_id)
        self._metrics = _Observer(
            lambda: self._in_io_worker and is_connected(), self._outages, self._losses
        )
        self._deferred = DeferredRestores(
            self._shared,
            f"{node_id}.restores",
            identity_of,
            self._new_restorer,
            self._still_waits,
        )
        self._params = params
        self._guard = Guard(session_name, self._session_dir, params)
        self._keeper: Keeper | None = None
        self._config: Config | None = None
        self._keys: Keyspace | None = None
        is_ending = self._caller is not None and not self._caller.is_validating
        checked = _checked.get(session_name)
        try:
            config = checked if is_ending and checked is not None else Config.load(params)
        except ConfigError as error:
            if not (self._in_io_worker or is_ending):
                raise
            unusable = _Unusable(error)
            self._store, self._node = cast(ObjectStore, unusable), cast(Node, unusable)
            self._new_store: Callable[[], ObjectStore] = lambda: self._store
            return
        self._config = config
        self._keys = Keyspace.of(config)
        self._new_store = functools.partial(
            ObjectStore, config, session_name, node_id, self._metrics
        )
        self._store = self._new_store()
        # Threads that a share holds up are counted by process.
        self._new_store = functools.partial(self._new_store, overflow=self._store.overflow)
        if self._in_io_worker:
            self._node = Node(config, session_name, node_id, self._metrics, beside=self._store)
            self._keeper = self._new_keeper()
            self._keeper.start()
            return
        self._node = Node(config, session_name, node_id, patience=_DESTROY_PATIENCE)
        if config != checked and not is_ending:
            try:
                preflight.run_all(config)
                self._node.probe_overflow()
            except SpillError as error:
                raise error from None  # Ray would print the cause too; one message is enough
            _checked[session_name] = config
            directory = None if self._caller is None else self._caller.directory
            _clean_up(config, params, session_name, directory)
        if self._caller is not None and self._caller.is_validating:
            start_guardian(self._caller.directory, params)
            end_at_exit(config, self._caller.directory)

    def _new_keeper(self) -> Keeper:
        return Keeper(
            self._node,
            self._store,
            self._lock,
            self._guard,
            self._journal,
            self._deferred,
            self._outages,
            self._metrics,
            self._is_destroyed,
            self._storing,
            self._needs,
            RayOwners(),
        )

    # --- Ray's interface ---

    def spill_objects(
        self, object_refs: list[ObjectRef], owner_addresses: list[bytes]
    ) -> list[bytes]:
        """Spill objects; return their URLs, in order.

        If only some objects can be spilled, returns their URLs, which Ray takes for a prefix of
        `object_refs`, and leaves nothing of the others. If none can be, returns after a pause,
        because Ray tries again at once. Raises no failure: see `outage`.
        """
        if not object_refs:
            return []
        self._start_keeper()
        if self._keeper is not None:
            self._guard.begin()
        urls = self._spill(object_refs, owner_addresses)
        if not urls:
            self._outages.pause()
        return [url.encode() for url in urls]

    def restore_spilled_objects(
        self, object_refs: list[ObjectRef], url_with_offset_list: list[bytes]
    ) -> int:
        """Put spilled objects back into plasma; return the bytes of data restored.

        A lost object is replaced by Ray's ObjectLostError: an exception here would make Ray retry
        for hours while `ray.get` waits. An object that cannot be read now is deferred, and comes
        into plasma once it can be read: see `deferred`.

        Raises:
            SpillError: an object could not be filled, outside an IO worker; see `_abandon`.
        """
        self._start_keeper()
        wanted = [
            Restore(ref.hex(), _text(url)) for ref, url in zip(object_refs, url_with_offset_list)
        ]
        now = []
        for restore in wanted:
            away = next(filter(self._outages.is_on, self._needs(restore.url)), None)
            if away is None:
                now.append(restore)
            else:
                self._deferred.add(away, [restore])
        return self._restore_now(now)

    def delete_spilled_objects(self, urls: list[bytes]) -> None:
        """Delete objects; a missing object is not an error.

        An object that cannot be deleted now is deleted later, because Ray never asks again.
        """
        wanted = [_text(url) for url in urls]
        self._start_keeper()
        self._deferred.forget(filter(None, map(self._object_of, wanted)))
        for _, of_tier in itertools.groupby(
            sorted(wanted, key=self._needs), key=lambda url: self._needs(url)[:1]
        ):
            self._delete(list(of_tier))

    def _delete(self, urls: Sequence[str]) -> None:
        """Delete objects of one tier, or defer that."""
        tier = self._needs(urls[0])[:1]
        try:
            with self._storing() as may_delete:  # it must not come between the steps of a removal
                if not may_delete or any(map(self._outages.is_on, tier)):
                    self._journal.put_off(urls)
                    return
                with self._journal.deleting(urls), self._store.hurried(_HOLD):
                    foreign = self._store.delete(urls)
        except SpillError as error:
            self._clean_up_soon()
            self._failed("delete", resource_of(error), "deletions", error)
            return
        for url in foreign:
            logger.warning("not deleted, because this namespace has no such URL: %s", url)
        for resource in tier:
            self._outages.over(resource, "deletions")

    def destroy_external_storage(self) -> None:
        """Delete the objects that end with the calling node of Ray's, and no others.

        With a head, those of its session end, unless its GCS keeps its state elsewhere. With
        another node none do: its objects are restored by others. If it is no node that calls this,
        the objects of this storage's node are deleted. Raises no SpillError: Ray is shutting down.
        """
        try:
            if self._caller is None:
                self._node.destroy(is_alive)
            elif self._caller.ends_session:
                # Without a config, loading it again says what is wrong with it.
                config = Config.load(self._params) if self._config is None else self._config
                end(config, self._caller.directory, self._node_id)
        except SpillError as error:
            logger.warning("spilled objects of this node may be left on the server: %s", error)
        finally:
            if self._keeper is not None:
                self._keeper.stop()
            self._node.close()
            self._store.close()

    def _start_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.start()

    def _clean_up_soon(self) -> None:
        if self._keeper is not None:
            self._keeper.clean_up_soon()

    def _failed(
        self,
        operation: Operation | Literal["recover"],
        resource: str,
        what: str,
        error: SpillError,
        waiting: int = 0,
    ) -> None:
        self._metrics.failed(operation, error)
        self._outages.failed(resource, what, error, waiting)

    def _located(self, url: str) -> Place | None:
        """Return the place that a URL gives; None if it is not a URL of this namespace."""
        if self._keys is None:
            return None
        with contextlib.suppress(LostObjectError):
            return self._keys.parse_url(url)
        return None

    def _object_of(self, url: str) -> str | None:
        place = self._located(url)
        return place and place.name.object_id

    def _needs(self, url: str) -> list[str]:
        """Return the resources needed to read the object of a URL: its tier, and any key."""
        place = self._located(url)
        if place is None:
            return []
        tier = OVERFLOW if place.tier == "overflow" else VALKEY
        return [tier] if place.key_id is None else [tier, _key_named(place.key_id)]

    def _place_of(self, tier: TierName) -> str:
        assert self._config is not None  # a lookup needs one
        if tier == "valkey":
            return f"Valkey at {self._config.address}"
        return f"the overflow at {OverflowTier.of(self._config)}"

    def _is_destroyed(self) -> bool:
        """Whether the session's data are being removed, or were."""
        return (directory := self._session_dir()) is not None and is_ended(str(directory))

    def _storing(self) -> AbstractContextManager[bool]:
        """Hold up the removal of the session's data; see `guardian.storing`."""
        directory = self._session_dir()
        if directory is None:
            return contextlib.nullcontext(True)
        self._lock.announce()
        return storing(str(directory))

    # --- spill ---

    def _spill(self, refs: Sequence[ObjectRef], owner_addresses: Sequence[bytes]) -> list[str]:
        """Spill objects; return the URLs of those spilled. Holds no plasma buffer afterwards."""
        try:
            with self._storing() as may_store:
                if not may_store:
                    return []
                self._store.begin_lease(gcs_address(), self._is_destroyed)
                urls, failure = self._store.put(self._sources(refs, owner_addresses))
                if self._is_destroyed():
                    # Whoever destroyed the node's data may have stopped waiting for this.
                    try:
                        with self._store.hurried(_HOLD):
                            self._store.delete(urls)
                    finally:
                        self._store.give_back()
                    return []
        except SpillError as error:
            self._cannot_spill(error)
            return []
        if not isinstance(failure, ServerFullError):
            self._outages.over(ROOM, "spills")
        # Objects in the overflow come last, so the first and last URL show which tiers worked.
        for resource in {need for url in (*urls[:1], *urls[-1:]) for need in self._needs(url)}:
            self._outages.over(resource, "spills")
        if failure is not None:
            self._cannot_spill(failure)
        return urls

    def _cannot_spill(self, error: SpillError) -> None:
        self._failed("spill", resource_of(error), "spills", error)
        self._clean_up_soon()

    def _sources(
        self, refs: Sequence[ObjectRef], owner_addresses: Sequence[bytes]
    ) -> list[SourceObject]:
        """Return the objects, to be read in place from plasma, up to the first missing one."""
        sources: list[SourceObject] = []
        found = self._get_objects_from_store(refs)
        for ref, (buffer, metadata, *_), owner in zip(refs, found, owner_addresses):
            if buffer is None and not metadata:
                logger.warning("not spilled: object %s is not in plasma", ref.hex())
                break
            data = memoryview(buffer if buffer is not None else b"").cast("B")
            sources.append(SourceObject(ref.hex(), bytes(metadata), bytes(owner), data))
        return sources

    # --- restore ---

    def _restore_now(self, wanted: Sequence[Restore]) -> int:
        """Restore objects, and defer those that cannot be read; return the bytes restored."""
        found: Iterator[StoredObject | LostObjectError] | None = None
        restored = 0
        for number, restore in enumerate(wanted):
            try:
                with self._store.hurried(_HOLD):
                    found = found or self._store.find_all(
                        [(each.url, each.object_id) for each in wanted]
                    )
                    object_ = next(found)
            except SpillError as error:
                # Defers the rest with it: each finds out later which resource it needs itself.
                away = _away(error, self._needs(restore.url))
                self._deferred.add(away, wanted[number:])
                self._still_waits(restore, error, self._deferred.count(away))
                break
            restored += self._restore(self._store, restore, object_)
        return restored

    def _still_waits(self, restore: Restore, error: SpillError, waiting: int) -> str:
        """Report that restores wait; return the resource they wait for."""
        away = _away(error, self._needs(restore.url))
        self._failed("restore", away, "restores", error, waiting)
        return away

    def _restore(
        self, store: ObjectStore, wanted: Restore, found: StoredObject | LostObjectError
    ) -> int:
        """Put an object, or ObjectLostError for it, into plasma; return the bytes put there."""
        ref = ObjectRef(bytes.fromhex(wanted.object_id))
        if isinstance(found, LostObjectError):
            logger.error("ObjectLostError for a reader: %s", found)
            self._put_object_to_store(_OBJECT_LOST, 0, io.BytesIO(), ref, b"")
            return 0
        header = found.header
        source = _Source(store, found)
        try:
            with store.hurried(_HOLD_HALF_WAY):
                self._put_object_to_store(
                    header.ray_metadata, header.size, source, ref, header.owner_address
                )
                if not header.size:
                    store.fill(found, memoryview(b""))  # plasma does not read empty objects
                elif not source.started:
                    store.leave(found)  # plasma has it already
        except Exception as error:
            if isinstance(error, SpillError):
                self._metrics.failed("restore", error)
            if source.started:
                self._abandon(store, found, error)
            raise
        self._metrics.record()
        for resource in self._needs(wanted.url):
            self._outages.over(resource, "restores")
        if source.started:
            self._outages.over(_WHOLE_READS, wanted.object_id)
        return header.size if source.started else 0

    def _abandon(self, store: ObjectStore, found: StoredObject, error: Exception) -> None:
        """End this process, because plasma now has an object that is not filled.

        Plasma keeps such an object while the process that created it lives, treats every later
        restore as done, and lets `ray.get` hang. It drops the object when the process ends; Ray
        then asks another IO worker. If the data are lost for good, that worker must find out before
        it creates the object.
        """
        try:
            logger.error("restore given up half way, so this IO worker exits: %s", error)
            if isinstance(error, LostObjectError):
                self._mark_lost(store, found)
            elif isinstance(error, SpillError):
                object_id = found.header.object_id
                # Ray asks again, at growing intervals: no IO worker may take this over at once.
                self._deferred.forget([object_id])
                self._outages.failed(
                    _WHOLE_READS, "restores", _half_way(object_id, error), 1, object_id
                )
            if self._in_io_worker:
                logging.shutdown()
                sys.stderr.flush()
        finally:
            # Whatever failed: with a full disk, not even a message can be written.
            if self._in_io_worker:
                os._exit(1)

    def _mark_lost(self, store: ObjectStore, found: StoredObject) -> None:
        try:
            with store.hurried(_HOLD_HALF_WAY):
                store.mark_lost(found)
        except SpillError as error:
            logger.error("the object could not be marked as lost: %s", error)

    def _new_restorer(self) -> _Restorer:
        return _Restorer(self)


class _Restorer:
    """Restores deferred objects over separate connections: see `deferred.Restorer`."""

    def __init__(self, storage: ValkeyStorage) -> None:
        self._storage = storage
        self._store = storage._new_store()

    def restore(self, wanted: Restore) -> None:
        with self._store.hurried(_HOLD_DEFERRED):
            (found,) = self._store.find_all([(wanted.url, wanted.object_id)])
        # Plasma takes no data for what it has already: another IO worker was faster, or another
        # node has sent it. It takes none either where its disk is full too, and does not say which
        # it was (`put_file_like_object`). In both cases the rest is Ray's, which asks again for
        # what is not there.
        self._storage._restore(self._store, wanted, found)

    def close(self) -> None:
        self._store.close()


class _Observer(Metrics):
    """Metrics, and messages to drivers about losses and about operations that wait.

    A restored object is counted by `record`, once its reader can have it.
    """

    def __init__(self, is_reporting: Callable[[], bool], outages: Outages, losses: Losses) -> None:
        super().__init__(is_reporting)
        self._outages = outages
        self._losses = losses
        self._restored: deque[tuple[TierName, int, int, int | None, float]] = deque()

    def done(
        self,
        operation: Operation,
        tier: TierName,
        objects: int,
        logical: int,
        stored: int | None,
        seconds: float,
    ) -> None:
        if operation == "restore":
            self._restored.append((tier, objects, logical, stored, seconds))
        else:
            super().done(operation, tier, objects, logical, stored, seconds)

    def record(self) -> None:
        """Count the objects restored so far."""
        with contextlib.suppress(IndexError):
            while True:
                super().done("restore", *self._restored.popleft())

    def lost(self, reason: Loss, tier: TierName) -> None:
        super().lost(reason, tier)
        self._losses.add(reason, tier)

    def waiting(self, error: SpillError) -> None:
        # Only spills wait: restores and deletions are hurried, and deferred instead.
        self._outages.failed(resource_of(error), "spills", error)


def _key_named(key_id: int) -> str:
    return f"encryption key {key_id:016x}"


def _away(error: SpillError, needed: Sequence[str]) -> str:
    """Return the resource that a failed restore waits for."""
    if isinstance(error, ConfigError) and len(needed) > 1:
        return needed[1]
    return resource_of(error)


def _half_way(object_id: str, error: SpillError) -> SpillError:
    return SpillError(
        f"the read of object {object_id} broke off half way: {error.message.rstrip('.')}",
        "If that recurs, the server or a proxy closes connections with much data under way: raise "
        "client-output-buffer-limit normal and maxmemory-clients, or lower chunk_size",
    )


class _Source:
    """The file-like object that plasma reads: one `readinto` gets the whole object."""

    def __init__(self, store: ObjectStore, found: StoredObject) -> None:
        self._store = store
        self._found = found
        self.started = False

    def readinto(self, view: memoryview) -> int:
        self.started = True
        self._store.fill(self._found, view.cast("B"))
        return len(view)


class _Unusable:
    """Replaces the store and the node if the config is wrong: every use raises that error."""

    def __init__(self, error: ConfigError) -> None:
        self._error = error

    def close(self) -> None:
        """There is nothing to close."""

    def __getattr__(self, name: str) -> Any:
        raise self._error


@dataclass(frozen=True, slots=True)
class _Caller:
    """The Ray node that creates a storage.

    Attributes:
        directory: the session's directory.
        is_validating: whether it validates the config, or destroys what was spilled.
        is_head: whether it is the head.
    """

    directory: Path
    is_validating: bool
    is_head: bool

    @property
    def ends_session(self) -> bool:
        """Whether the session is destroyed: its GCS still runs then, and Ray ends it afterwards."""
        if self.is_validating or not self.is_head:
            return False
        gcs = gcs_of(self.directory.name)
        return bool(gcs and ends_with_gcs(gcs))


def _calling_node(session: str) -> _Caller | None:
    """Return the Ray node that is creating a storage now, if any.

    Ray passes a storage neither the directory nor the node. The methods `validate_external_storage`
    and `destroy_external_storage` of the node create it (`python/ray/_private/node.py`), so this
    inspects the calling frames.
    """
    frame = inspect.currentframe()
    while frame is not None:
        # Only these frames: reading a frame's local variables can keep their values alive.
        if (name := frame.f_code.co_name) in (_VALIDATING, _DESTROYING):
            node = frame.f_locals.get("self")
            if isinstance(node, ray._private.node.Node) and node.session_name == session:
                directory = Path(node.get_session_dir_path())
                return _Caller(directory, name == _VALIDATING, node.is_head())
        frame = frame.f_back
    return None


def _clean_up(
    config: Config, params: Mapping[str, Any], session: str, directory: Path | None
) -> None:
    """Start a process that removes the data of dead sessions, if any session but this one has data.

    It watches leases for a minute and more, longer than `ray start` runs, and also if the server is
    away for a while. What it says is in a log in the session's directory.
    """
    look = CleanUp(config, running_at)
    try:
        others = look.sessions() - {session}
    except SpillError as error:
        logger.warning("dead sessions are not cleaned up: %s", error)
        return
    finally:
        look.close()
    if not others:
        return
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in params.items() if value is not None
    ]
    environment = {name: os.environ[name] for name in os.environ.keys() - _NOT_OF_CLEAN_UP}
    try:
        with session_log(directory, "gc") as log:
            process = subprocess.Popen(  # noqa: S603 (our own module, and checked parameters)
                module_command(
                    *("ray_valkey_spill", "gc", _CLEAN_UP_TIMEOUT, f"--except-session={session}"),
                    *options,
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        threading.Thread(target=process.wait, daemon=True).start()
    except (OSError, RuntimeError) as error:
        logger.warning("dead sessions are not cleaned up: %s", error)


def _text(url: bytes) -> str:
    """Decode a URL. Bytes that are not text become a URL that no parser accepts."""
    return url.decode(errors="replace")
