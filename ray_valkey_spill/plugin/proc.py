"""What `/proc` says about processes of this host. Standard library only, for the guardian."""

from __future__ import annotations

import binascii
import contextlib
import os
from typing import NamedTuple

__all__ = ["Process", "address_of", "ends_with_gcs", "gcs_of", "identity_of", "is_alive"]

_GCS_SERVER = b"gcs_server"


class Process(NamedTuple):
    """A process, distinct from every other one that had or will have its id."""

    pid: int
    identity: str

    @property
    def is_alive(self) -> bool:
        return identity_of(self.pid) == self.identity


def is_alive(pid: int) -> bool:
    """Whether the process with that id runs. A zombie does not.

    Invariant: all Ray processes of a node share one PID namespace. Otherwise an IO worker would
    take a live one for dead, and remove the objects that it is writing.
    """
    try:
        # "pid (command) state …", where the command may contain parentheses.
        state = _read(pid, "stat").rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):  # also one that is gone between open and read
        return False
    except OSError:
        return True


def identity_of(pid: int) -> str | None:
    """Return what distinguishes a process from others with the same id; None if it is dead.

    It is the start time, field 22 of `/proc/<pid>/stat`, in clock ticks since boot
    (proc_pid_stat(5)).
    """
    if not is_alive(pid):
        return None
    with contextlib.suppress(OSError, IndexError):
        return _read(pid, "stat").rpartition(b")")[2].split()[19].decode()
    return None


def gcs_of(session: str) -> Process | None:
    """Return the GCS of a session, if it runs on this host and this user may see it."""
    wanted = b"--session-name=" + os.fsencode(session)
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            program, *arguments = _read(int(name), "cmdline").split(b"\0")
            if os.path.basename(program) == _GCS_SERVER and wanted in arguments:
                identity = identity_of(int(name))
                if identity is not None:
                    return Process(int(name), identity)
    return None


def ends_with_gcs(gcs: Process) -> bool | None:
    """Whether the session of a GCS ends when that process does.

    It does not if the GCS keeps its state elsewhere, in a Redis or in RocksDB: a head that is
    started again then continues the session. Returns None if that cannot be found out.
    """
    try:
        arguments = _read(gcs.pid, "cmdline").split(b"\0")
        environment = _read(gcs.pid, "environ").split(b"\0")
        settings = [
            binascii.a2b_base64(value)
            for name, _, value in (argument.partition(b"=") for argument in arguments)
            if name == b"--config_list"
        ]
    except (OSError, ValueError):
        return None
    variables = dict(variable.partition(b"=")[::2] for variable in environment)
    has_redis = variables.get(b"RAY_REDIS_ADDRESS") or any(
        name.replace(b"-", b"_") == b"__redis_address" and value
        for name, _, value in (argument.partition(b"=") for argument in arguments)
    )
    # As Ray's C++ reads it: the system config, then the environment (`RayConfig::initialize`).
    kept = variables.get(b"RAY_gcs_storage", b"memory") not in (b"", b"memory")
    for setting in settings:
        compact = b"".join(setting.split())
        kept = kept or (b'"gcs_storage":' in compact and b'"gcs_storage":"memory"' not in compact)
    # Of a process that has just ended, there is nothing to read any more.
    return not (has_redis or kept) if gcs.is_alive else None


def address_of(gcs: Process) -> str | None:
    """Return host:port of a GCS that was started with both; else None."""
    with contextlib.suppress(OSError):
        arguments = _read(gcs.pid, "cmdline").split(b"\0")
        given = dict(argument.partition(b"=")[::2] for argument in arguments)
        host = os.fsdecode(given.get(b"--node-ip-address", b""))
        port = os.fsdecode(given.get(b"--gcs_server_port", b""))
        if host and port.isdecimal() and int(port):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return None


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()
