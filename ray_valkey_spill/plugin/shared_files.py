"""The directory in which processes of a session share files, on one host.

Ray makes the session's directory with mode 0777 and without a sticky bit (`try_to_create_directory`
in `python/ray/_common/utils.py`), so every account of the host can create, replace and rename what
is in it. Files that IO workers and the guardian trust are therefore in a directory below it, which
only this user can write. Others can still rename that directory, and put another one or a symbolic
link in its place. So it is opened first, then checked, and its files are reached only through the
open directory, never by its name.

Standard library only, for the guardian.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

__all__ = ["NAME", "open_directory", "opened", "path_of"]

# In the session's directory.
NAME = "ray_valkey_spill"


def open_directory(session_dir: str) -> int:
    """Open the directory, and create it if it is missing; return the file descriptor.

    Any number of processes may do so at the same time.

    Raises:
        OSError: it cannot be used: it is no directory, or another user can write it. The error has
            its path and the reason.
    """
    path = os.path.join(session_dir, NAME)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(file)
        if found.st_uid != os.geteuid():
            reason = f"its owner is user {found.st_uid}, not {os.geteuid()}"
            raise PermissionError(errno.EPERM, reason, path)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"other users can write it (mode {stat.S_IMODE(found.st_mode):04o})"
            raise PermissionError(errno.EPERM, reason, path)
    except BaseException:
        os.close(file)
        raise
    return file


def path_of(file: int) -> str:
    """Return a path to an open directory, which is valid in this process until it is closed."""
    return f"/proc/self/fd/{file}"


@contextlib.contextmanager
def opened(session_dir: str) -> Iterator[str]:
    """Yield a path to the directory, which is valid in the body.

    Raises:
        OSError: as `open_directory`.
    """
    file = open_directory(session_dir)
    try:
        yield path_of(file)
    finally:
        os.close(file)
