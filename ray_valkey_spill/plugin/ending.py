"""The end of a Ray session: who watches for it, and who removes the session's data then.

- A driver that started its own Ray: in `ray.shutdown()`.
- A head that was started by `ray start --block` and is ended by SIGTERM: as its process exits.
- Otherwise the guardian, which runs this module: see `guardian`.

None of them does so if the GCS keeps its state elsewhere (see `proc.ends_with_gcs`): the session
then continues with the next head.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ConfigError, SpillError
from ray_valkey_spill.plugin import guardian, proc, shared_files
from ray_valkey_spill.plugin.gcs import running_at
from ray_valkey_spill.store.cleanup import CleanUp
from ray_valkey_spill.store.session import EndingSession, note_gcs_address

__all__ = ["Guard", "end", "end_at_exit", "session_log", "start_guardian"]

logger = logging.getLogger("ray_valkey_spill")

# Seconds for which the end of a process may wait for a server that does not answer, and for which
# the guardian's attempt does.
_PATIENCE, _PATIENCE_OF_GUARDIAN = 3.0, 30.0
# Seconds until the guardian has taken over and its starter can go on.
_LONGEST_START = 10.0
_LEFT = 1


class Guard:
    """Keeps a guardian running for the session of an IO worker, if its GCS runs on this host.

    Args:
        session: name of the session.
        directory: returns the session's directory, or None if there is none.
        params: as in the spilling config.

    Attributes:
        outlives_gcs: whether the GCS is known to run on this host and not to end the session.
    """

    def __init__(
        self, session: str, directory: Callable[[], Path | None], params: Mapping[str, Any]
    ) -> None:
        self._session = session
        self._directory = directory
        self._params = params
        self._is_needed = True
        self._is_begun = False
        self.outlives_gcs = False
        self._starting = threading.Lock()

    def begin(self) -> None:
        """Start a guardian unless there is one, or this process has done so before.

        On the host of the GCS, what is stored from then on is removed however soon the session
        ends. Where a head validates its storage, its guardian is older than its IO workers.
        """
        if not self._is_begun:
            self.ensure()

    def ensure(self) -> None:
        """Start a guardian unless there is one."""
        with self._starting:
            self._ensure()
            self._is_begun = True

    def _ensure(self) -> None:
        directory = self._directory()
        if not self._is_needed or directory is None or guardian.is_ended(str(directory)):
            return
        if guardian.is_there(str(directory)):
            return
        gcs = proc.gcs_of(self._session)
        # Neither changes while the node runs.
        ends_with_gcs = gcs and proc.ends_with_gcs(gcs)
        self._is_needed = bool(ends_with_gcs)
        self.outlives_gcs = ends_with_gcs is False
        if self._is_needed:
            start_guardian(directory, self._params)


def start_guardian(directory: Path, params: Mapping[str, Any]) -> None:
    """Start the guardian of the session in `directory`, unless there is one.

    A failure is logged.

    Args:
        directory: the session's; its name is that of the session.
        params: as in the spilling config. They reach the guardian through a pipe.
    """
    try:
        # Checked here, because users do not see the guardian's log.
        with shared_files.opened(str(directory)), session_log(directory, "guardian") as log:
            subprocess.run(  # noqa: S603 (our own module)
                guardian.command(__name__, str(directory), os.getpid()),
                input=json.dumps(dict(params)).encode(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                timeout=_LONGEST_START,
                check=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nobody watches for the end of this session: %s", error)


@contextlib.contextmanager
def session_log(directory: Path | None, name: str) -> Iterator[IO[bytes] | int]:
    """Yield one of a session's logs, for a process to append to; if it cannot be opened, nothing.

    Args:
        directory: the session's, if it is known.
        name: what the log is of.
    """
    with contextlib.ExitStack() as stack:
        log: IO[bytes] | int = subprocess.DEVNULL
        if directory is not None:
            with contextlib.suppress(OSError):
                path = directory / "logs" / f"ray_valkey_spill-{name}.log"
                log = stack.enter_context(path.open("ab"))
        yield log


def end(config: Config, directory: Path, node: str = "", patience: float = _PATIENCE) -> bool:
    """Remove the data of the session in `directory`; return whether that is complete.

    It is if nothing of it is left, and nothing more can come.

    Args:
        config: server, namespace and overflow.
        directory: the session's; its name is that of the session.
        node: id of this process's node, if it has one.
        patience: seconds for which to retry an unavailable server.

    Raises:
        SpillError: something is left.
    """
    guardian.mark_ended(str(directory))
    here = {node}
    with contextlib.suppress(OSError), shared_files.opened(str(directory)) as files:
        # Each IO worker makes such a file.
        here |= {path.stem for path in Path(files).glob("*.keeper")}
    session = EndingSession(config, directory.name, patience)
    with contextlib.closing(session):
        session.gcs_addresses()  # if the server is away, there is nothing to wait for
        nothing_comes = guardian.await_storing(str(directory))
        is_complete = session.remove(lambda each: each in here, proc.is_alive) and nothing_comes
    if is_complete:
        guardian.mark_removed(str(directory))
    return is_complete


def end_at_exit(config: Config, directory: Path) -> None:
    """Have this process remove the session's data as it exits, if the session has ended by then.

    So it is for `ray start --head --block`, whose handler of SIGTERM first ends the node.
    """
    atexit.register(_end_if_over, config, directory)


def _end_if_over(config: Config, directory: Path) -> None:
    gcs = guardian.recorded_gcs(str(directory))
    if gcs is None or gcs.is_alive or guardian.is_over(str(directory)):
        return
    try:
        end(config, directory)
    except SpillError as error:
        logger.warning("spilled objects of this session may be left on the server: %s", error)


def _lives(session: EndingSession, name: str) -> bool:
    found = [running_at(address) for address in sorted(session.gcs_addresses())]
    return any(running is not None and running.name == name for running in found)


def _end_patiently(config: Config, directory: Path) -> int:
    """Remove the data of a session whose GCS has ended; return the exit code."""
    name = directory.name
    with contextlib.closing(EndingSession(config, name, _PATIENCE_OF_GUARDIAN)) as session:
        if _lives(session, name):
            logger.warning("%s is kept: its GCS answers", name)
            guardian.withdraw_mark(str(directory))
            return guardian.GAVE_UP
    if end(config, directory, patience=_PATIENCE_OF_GUARDIAN):
        return 0
    # Nodes on other hosts live for a minute or so without their GCS.
    with contextlib.closing(CleanUp(config, running_at)) as look:
        look.remove(look.find(logger.warning, wanted=lambda session: session == name))
    return 0 if end(config, directory, patience=_PATIENCE_OF_GUARDIAN) else _LEFT


def main() -> int:
    """Remove the data of the session in the directory that is the argument.

    With a second argument, note that as the address of the session's GCS instead. Reads the
    parameters, as JSON, from stdin. Exits with 0 if nothing is left to do.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    directory, *addresses = sys.argv[1:]
    left = "the new address of the GCS is not noted" if addresses else "spilled objects are left"
    try:
        config = Config.load(json.load(sys.stdin))
        for address in addresses:
            note_gcs_address(config, Path(directory).name, address, _PATIENCE_OF_GUARDIAN)
        return 0 if addresses else _end_patiently(config, Path(directory))
    except ConfigError as error:
        logger.error("%s on the server: %s", left, error)
        return guardian.GAVE_UP
    except SpillError as error:
        logger.warning("%s on the server: %s", left, error)
        return _LEFT


if __name__ == "__main__":
    sys.exit(main())
