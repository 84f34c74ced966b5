"""Whether a Ray session runs, and which of its nodes live: the answers, and which to believe."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["UNKNOWN", "UNREACHABLE", "RunningSession", "has_run_here", "is_loopback"]


class RunningSession(NamedTuple):
    """A session that runs, and the ids of its nodes that live, in hex."""

    name: str
    nodes: frozenset[str]


# Something runs there that does not tell: it may be another Ray's, with another token.
UNKNOWN = RunningSession("?", frozenset())
# The host does not answer, or is not known: it may be gone, or stopped, or not for us to reach.
UNREACHABLE = RunningSession("", frozenset())


def is_loopback(address: str) -> bool:
    """Whether `address` (host:port) means another host on each host that asks."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_run_here(session: str) -> bool:
    """Whether a node of the session is known to have run on this host.

    Ray keeps the directory of each session. It is looked for where Ray makes it unless it is given
    another `--temp-dir`: see `get_default_ray_temp_dir` in Ray's `_common/utils.py`.
    """
    # What is in the environment now may not have been there when the session began.
    directories = {os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"}  # noqa: S108
    return any(Path(each, "ray", session).is_dir() for each in directories if each)
