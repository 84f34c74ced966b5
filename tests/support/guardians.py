"""The guardians of Ray sessions, which outlive whoever started them and are nobody's children."""

from __future__ import annotations

import contextlib
import os
import secrets

import psutil

from ray_valkey_spill.format.names import Keyspace
from support.servers import Contents, wait_until

# In the environment of everything that this test process starts.
_RUN = "TEST_RUN"
os.environ[_RUN] = secrets.token_hex(16)


def guardians(of: object = None) -> list[psutil.Process]:
    """Those that this test process, and what it started, have begun.

    Args:
        of: the session's directory, or the id of the process that started it; None for all.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if (
                any("plugin.guardian" in word for word in words)
                and (of is None or str(of) in words[-2:])
                and process.environ().get(_RUN) == os.environ[_RUN]
            ):
                found.append(process)
    return found


def end_guardians(of: object = None) -> None:
    """End them, and the removal that is under way: where a test's server is gone, they wait."""
    for guardian in guardians(of):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [guardian, *guardian.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    # One that nobody has waited for yet has ended all the same.
    wait_until(lambda: not guardians(of))


def left_of(server: Contents, session: str, namespace: str = "default") -> int:
    """How many keys, entries and leases of a session are left."""
    keys = Keyspace(f"ray:spill:{namespace}:")
    start = f"{session}:".encode()
    members = [
        member
        for key in (keys.index, keys.pending, keys.leases)
        for member in server.client.zrange(key, 0, -1)
    ]
    root = f"ray:spill:{namespace}:".encode()
    return sum(member.startswith(start) for member in members) + sum(
        key.startswith(root + start) for key in server.our_keys(root.decode())
    )
