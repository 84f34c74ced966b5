"""Facts about this process, its Ray session and its neighbours; messages to drivers."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

__all__ = ["gcs_address", "in_io_worker", "is_alive", "is_connected", "session_dir"]


def session_dir(session: str, calling_node: Path | None) -> Path | None:
    """Ray's directory for the session, for what IO workers have to know of each other.

    Args:
        session: its name.
        calling_node: what `_calling_node_dir` returned. A driver that has shut down may still
            destroy nodes, and then knows none but the one that is being destroyed.
    """
    if calling_node is not None:
        return calling_node
    node = ray._private.worker._global_node
    is_it = node is not None and node.session_name == session
    return Path(node.get_session_dir_path()) if is_it else None


def is_connected() -> bool:
    return bool(ray._private.worker.global_worker.connected)


def gcs_address() -> str:
    """Where the cluster's GCS is; empty if this process is not connected to it."""
    client = getattr(ray._private.worker.global_worker, "gcs_client", None)
    return "" if client is None else str(client.address)


def in_io_worker() -> bool:
    """Whether this process is one of Ray's IO workers (`default_worker.py --worker-type=…`)."""
    kinds = ("SPILL_WORKER", "RESTORE_WORKER")
    return any(argument.removeprefix("--worker-type=") in kinds for argument in sys.argv)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that is dead and not yet reaped does not."""
    try:
        # "pid (command) state …", and the command may have parentheses of its own.
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X")
    except FileNotFoundError:
        return False
    except OSError:
        return True
