"""The answer to whether a Ray session runs, and which of its nodes are alive."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["UNKNOWN", "UNREACHABLE", "RunningSession"]


class RunningSession(NamedTuple):
    """A session that runs, and the ids of its nodes that live, in hex."""

    name: str
    nodes: frozenset[str]


# Something runs there that does not tell: it may be another Ray's, with another token.
UNKNOWN = RunningSession("?", frozenset())
# The host does not answer, or is not known: it may be gone, or stopped, or not for us to reach.
UNREACHABLE = RunningSession("", frozenset())
