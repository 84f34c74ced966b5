"""A small process on the host of the head that outlives its session and removes its data.

A head may end without a word: by `ray stop`, by a signal, with its driver. The guardian waits for
the end of the session's GCS, and then runs the module that removes the session's data (`ending`),
again and again until nothing is left, or for an hour. If the GCS keeps its state in a Redis or in
RocksDB, a head that is started again continues the session. Then the guardian has the same module
note the address of the GCS, which may be another one than before, and leaves.

It is started in a session and a process group of its own, as nobody's child, so that it is not
killed together with Ray's processes. It cannot outlive a container or a systemd unit.

While it waits it opens no connection and, to stay small, has loaded next to nothing: standard
library only, and no more of it at the top of this module than is needed to wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal, TextIO

from ray_valkey_spill.plugin import proc, shared_files

__all__ = [
    "GAVE_UP",
    "await_storing",
    "command",
    "is_ended",
    "is_over",
    "is_there",
    "mark_ended",
    "mark_removed",
    "recorded_gcs",
    "storing",
    "withdraw_mark",
]

# Files that the session's processes share. The lock file has the id and identity of the GCS that is
# watched. The mark says that the session is being destroyed, and whether that is complete. The last
# is locked by those who store or delete something.
_LOCK, _MARK, _STORING = "guardian", "destroyed", "storing"
_COMPLETE = "nothing is left\n"

# Exit code of the removal if trying again would not help.
GAVE_UP = 2

# Seconds for which a head that is starting may take until its GCS runs, and between two looks.
_LONGEST_START, _BETWEEN_LOOKS = 120.0, 0.5
# Seconds within which all who ask at the same time whether there is a guardian have their answer.
_LONGEST_QUESTION = 1.0
# Seconds for which a removal waits for what is being stored.
_LONGEST_STORING = 5.0
# Seconds between two attempts to lock a file.
_BETWEEN_LOCKS = 0.02
# Seconds between two looks at the GCS where the kernel does not report its end.
_BETWEEN_POLLS = 2.0
# Seconds from the end of the GCS until the session is over, unless it has another GCS by then.
_GRACE = 5.0
# Seconds between two attempts, and for which they are repeated.
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_TRY = 5.0, 20.0, 3600.0

# The path of the package comes last, so that it hides no module of Python's.
_RUN = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from ray_valkey_spill.plugin.guardian import main; main()"
)


def command(removal: str, directory: str, starter: int) -> list[str]:
    """Return the command that runs the guardian of the session in `directory`.

    It ends at once, and leaves behind a process that is nobody's child.

    Args:
        removal: module that removes the session's data. It is run with `directory` as its argument,
            and with stdin as the guardian had it. It exits with 0 if nothing is left. With the
            address of a GCS as a second argument, it notes that instead.
        directory: of the session; its last component is the session's name.
        starter: process id; the guardian gives up if that process ends before there is a GCS.
    """
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # -I and -S: nothing of what the environment or site-packages add to an interpreter's start.
    return [sys.executable, "-I", "-S", "-c", _RUN, package, removal, directory, str(starter)]


def is_there(directory: str) -> bool:
    """Whether the session has a guardian, or none can be started because no file can be locked."""
    with contextlib.suppress(BlockingIOError):
        # Shared: processes that ask at the same time are no guardians to each other.
        file = _lock(directory, _LOCK, fcntl.LOCK_SH)
        if file is not None:
            os.close(file)
            return False
    return True


def recorded_gcs(directory: str) -> proc.Process | None:
    """Return the GCS with which the session ends, which a guardian has found; None if none has."""
    with contextlib.suppress(OSError, ValueError), _open(directory, _LOCK) as file:
        pid, identity = file.read().split()
        return proc.Process(int(pid), identity)
    return None


@contextlib.contextmanager
def storing(directory: str) -> Iterator[bool]:
    """Hold up the removal of the session's data; yield whether anything may be stored or deleted.

    Without it, what is stored after a look at the mark may arrive when the removal is over.
    """
    file = None
    with contextlib.suppress(BlockingIOError):  # a removal has the lock, so there is a mark
        file = _lock(directory, _STORING, fcntl.LOCK_SH)
    try:
        yield not is_ended(directory)
    finally:
        if file is not None:
            os.close(file)


def mark_ended(directory: str) -> None:
    """Stop the session's IO workers on this host from storing more."""
    with contextlib.suppress(OSError), _open(directory, _MARK, "a"):
        pass


def await_storing(directory: str) -> bool:
    """Wait for those within `storing`, but not for long: they may themselves wait for a server.

    Returns:
        False if some still are within.
    """
    try:
        file = _lock(directory, _STORING, fcntl.LOCK_EX, patience=_LONGEST_STORING)
    except BlockingIOError:
        return False
    if file is not None:
        os.close(file)
    return True


def mark_removed(directory: str) -> None:
    """Report that nothing is left to do for the session."""
    with contextlib.suppress(OSError), _open(directory, _MARK, "a") as file:
        file.write(_COMPLETE)


def withdraw_mark(directory: str) -> None:
    """Take back what `mark_ended` has said: the session goes on."""
    with contextlib.suppress(OSError), shared_files.opened(directory) as files:
        os.unlink(os.path.join(files, _MARK))


def is_ended(directory: str) -> bool:
    """Whether the session's data are being removed, or were."""
    with contextlib.suppress(OSError), shared_files.opened(directory) as files:
        return os.path.exists(os.path.join(files, _MARK))
    return False


def is_over(directory: str) -> bool:
    """Whether nothing is left to do for the session."""
    with contextlib.suppress(OSError), _open(directory, _MARK) as file:
        return file.read() != ""
    return False


def main() -> None:
    """Leave a guardian behind: see `command`."""
    removal, directory, starter = sys.argv[1], sys.argv[2], int(sys.argv[3])
    order = sys.stdin.buffer.read()
    identity = proc.identity_of(starter)
    session = os.path.basename(directory)
    # Found before the starter goes on: what it stores then is removed, however soon the GCS ends.
    gcs = proc.gcs_of(session)
    is_needed = _ends_with(gcs)
    if os.fork():
        os._exit(0)
    file = _become_guardian(directory)
    if file is None:
        return
    if gcs is None and identity is not None:
        gcs = _first_gcs(session, proc.Process(starter, identity))
        is_needed = _ends_with(gcs)
    if gcs is None:
        return
    while gcs is not None:
        if not is_needed:
            os.close(file)  # what follows needs no guardian
            _note_address(removal, directory, order, gcs)
            return
        record = f"{gcs.pid} {gcs.identity}\n".encode()
        with contextlib.suppress(OSError):  # its disk may be full
            os.pwrite(file, record, 0)
            os.ftruncate(file, len(record))
        _wait_for_end(gcs)
        if is_over(directory):
            return
        time.sleep(_GRACE)
        gcs = proc.gcs_of(session)
        is_needed = _ends_with(gcs)
    _remove_all(removal, directory, order)


def _open(directory: str, name: str, mode: Literal["r", "a"] = "r") -> TextIO:
    with shared_files.opened(directory) as files:
        return open(os.path.join(files, name), mode)


def _lock(directory: str, name: str, kind: int, patience: float = 0.0) -> int | None:
    """Return a locked file; None if it cannot be locked.

    Raises:
        BlockingIOError: others hold it for longer than `patience`, in seconds.
    """
    try:
        with shared_files.opened(directory) as files:
            file = os.open(os.path.join(files, name), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(file)
                raise
            time.sleep(_BETWEEN_LOCKS)
        except OSError:
            os.close(file)
            return None
        else:
            return file


def _become_guardian(directory: str) -> int | None:
    """Take the lock; None if there is a guardian. Those who ask `is_there` hold it for a moment."""
    with contextlib.suppress(BlockingIOError):
        return _lock(directory, _LOCK, fcntl.LOCK_EX, patience=_LONGEST_QUESTION)
    return None


def _ends_with(gcs: proc.Process | None) -> bool:
    return bool(gcs and proc.ends_with_gcs(gcs))


def _first_gcs(session: str, starter: proc.Process) -> proc.Process | None:
    deadline = time.monotonic() + _LONGEST_START
    while True:
        is_starting = starter.is_alive and time.monotonic() < deadline
        gcs = proc.gcs_of(session)
        if gcs is not None or not is_starting:
            return gcs
        time.sleep(_BETWEEN_LOOKS)


def _wait_for_end(process: proc.Process) -> None:
    try:
        file = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # an old kernel, or the process has just ended
        file = None
    if file is not None:
        # Its id may have been another process's by the time it was opened.
        if process.is_alive:
            poll = select.poll()
            poll.register(file, select.POLLIN)
            poll.poll()
        os.close(file)
    while process.is_alive:
        time.sleep(_BETWEEN_POLLS)


def _remove_all(removal: str, directory: str, order: bytes) -> None:
    mark_ended(directory)
    if not _repeat(lambda: is_over(directory) or _run(order, removal, directory)):
        _log("the session's data are left: run ray-valkey-spill gc")


def _note_address(removal: str, directory: str, order: bytes, gcs: proc.Process) -> None:
    """Note where a GCS is whose session outlives it."""
    if proc.ends_with_gcs(gcs) is False and (address := proc.address_of(gcs)) is not None:
        _repeat(lambda: not gcs.is_alive or _run(order, removal, directory, address))


def _repeat(attempt: Callable[[], bool]) -> bool:
    """Repeat an attempt until it works, or for an hour; return whether it has worked."""
    deadline, pause = time.monotonic() + _LONGEST_TRY, _FIRST_PAUSE
    while not attempt():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


def _run(order: bytes, module: str, *arguments: str) -> bool:
    """Run the module that knows the server; return whether it need not run again."""
    import subprocess

    from ray_valkey_spill.plugin.interpreter import module_command

    ended = subprocess.run(  # noqa: S603 (our own module)
        module_command(module, *arguments), input=order, check=False
    )
    return ended.returncode in (0, GAVE_UP)


def _log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stderr.flush()
