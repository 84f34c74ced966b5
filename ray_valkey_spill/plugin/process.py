"""Facts about this process, its Ray session and its neighbours; messages to drivers."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray._private.utils import push_error_to_driver

from ray_valkey_spill.plugin import shared_files

__all__ = [
    "Drivers",
    "SharedDirectory",
    "gcs_address",
    "in_io_worker",
    "in_spill_worker",
    "is_connected",
    "session_dir",
]

logger = logging.getLogger("ray_valkey_spill")

# Timeout of the GCS for the list of jobs, in seconds.
_JOBS_TIMEOUT = 2.0


def session_dir(session: str, calling_node: Path | None) -> Path | None:
    """Return Ray's directory of the session; None if it is unknown.

    Args:
        session: name of the session.
        calling_node: directory of the node that creates the storage, if any. A driver that has shut
            down may still destroy nodes, and then knows only the node that is being destroyed.
    """
    if calling_node is not None:
        return calling_node
    node = ray._private.worker._global_node
    is_it = node is not None and node.session_name == session
    return Path(node.get_session_dir_path()) if is_it else None


class SharedDirectory:
    """Returns the directory in which the session's processes share files: see `shared_files`.

    Stays open from the first use on, so that nobody can replace it, for as long as this object
    lives. Thread-safe.

    Args:
        find: returns the session's directory, or None if it is unknown.
    """

    def __init__(self, find: Callable[[], Path | None]) -> None:
        self._find = find
        self._path: Path | None = None
        self._is_reported = False
        self._lock = threading.Lock()

    def __call__(self) -> Path | None:
        """Return a path to it; None if it cannot be used, for which one log line has the reason."""
        with self._lock:
            if self._path is None and (session := self._find()) is not None:
                try:
                    self._open(session)
                except OSError as error:  # also a full disk: the next call tries again
                    if not self._is_reported:
                        logger.warning("the IO workers of this node share no files: %s", error)
                    self._is_reported = True
            return self._path

    def _open(self, session: Path) -> None:
        file = shared_files.open_directory(str(session))
        weakref.finalize(self, os.close, file).atexit = False
        self._path = Path(shared_files.path_of(file))


def is_connected() -> bool:
    return bool(ray._private.worker.global_worker.connected)


def gcs_address() -> str:
    """Return the address of the cluster's GCS; empty if this process is not connected to it."""
    client = getattr(ray._private.worker.global_worker, "gcs_client", None)
    return "" if client is None else str(client.address)


def in_io_worker() -> bool:
    """Whether this process is one of Ray's IO workers (`default_worker.py --worker-type=…`)."""
    return _is_of("SPILL_WORKER", "RESTORE_WORKER")


def in_spill_worker() -> bool:
    """Whether Ray has this process spill, which no restore must ever hold up."""
    return _is_of("SPILL_WORKER")


def _is_of(*kinds: str) -> bool:
    return any(argument.removeprefix("--worker-type=") in kinds for argument in sys.argv)


class Drivers:
    """The drivers of the connected cluster: see `outage.Drivers`."""

    def notify(self, message: str, job: str | None = None) -> None:
        if is_connected():
            worker = ray._private.worker.global_worker
            job_id = None if job is None else ray.JobID.from_hex(job)
            try:
                push_error_to_driver(worker, "spill_objects_error", message, job_id)
            except Exception as error:  # an operation must not fail because of it
                logger.warning("drivers cannot be notified: %s", error)

    def running(self) -> list[str]:
        client: Any = getattr(ray._private.worker.global_worker, "gcs_client", None)
        try:
            jobs = client.get_all_job_info(
                skip_submission_job_info_field=True,
                skip_is_running_tasks_field=True,
                timeout=_JOBS_TIMEOUT,
            )
            return [job.hex() for job, info in jobs.items() if not info.is_dead]
        except Exception:  # another version of Ray may not have this call
            return []
