"""Whether a Ray session runs, and which of its nodes are alive: the possible answers of a GCS."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from typing import NamedTuple

__all__ = ["UNKNOWN", "UNREACHABLE", "RunningSession", "has_run_here", "is_loopback"]


class RunningSession(NamedTuple):
    """A running session, and the ids of its nodes that are alive, in hex."""

    name: str
    nodes: frozenset[str]


# A process there does not answer: it may be a GCS of another Ray version, or with another token.
UNKNOWN = RunningSession("?", frozenset())
# The host is unknown or does not answer: it may be gone, paused, or not reachable from here.
UNREACHABLE = RunningSession("", frozenset())


def is_loopback(address: str) -> bool:
    """Whether `address` (host:port) means the asking host itself."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_run_here(session: str) -> bool:
    """Whether a node of the session is known to have run on this host.

    Ray keeps the directory of each session. This looks where Ray creates it without a `--temp-dir`:
    see `get_default_ray_temp_dir` in Ray's `_common/utils.py`.
    """
    # The environment may have changed since the session began.
    directories = {os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"}  # noqa: S108
    # Unlike `Path.is_dir`, it takes what it may not look into for none.
    return any(os.path.isdir(os.path.join(each, "ray", session)) for each in directories if each)
