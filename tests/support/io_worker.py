"""Stands in for an IO worker of Ray's, without a cluster: its background work is the real one.

python -m support.io_worker <session directory> <node> <parameters, as JSON> [connected]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
SESSION = "session_1"


class IoWorker:
    """A process that runs until it is killed.

    Args:
        directory: of the session.
        node: of the session.
        params: as in a spilling config.
        connected: whether it is connected to its cluster: until then it does no background work.
    """

    def __init__(
        self, directory: Path, node: str, params: Mapping[str, Any], *, connected: bool = True
    ) -> None:
        self._directory = directory
        command = [sys.executable, "-m", "support.io_worker", str(directory), node]
        self.process = subprocess.Popen(
            [*command, json.dumps(params), *["connected"] * connected],
            cwd=TESTS,
            stdin=subprocess.PIPE,
        )

    @property
    def keeps_the_node(self) -> bool:
        """Whether it has the lock of its node: the others close the file again at once."""
        files = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return any(_target(file).endswith(".keeper") for file in files)

    def begin_to_spill(self) -> None:
        """Have it spill an object, which it keeps in place of a plasma store."""
        self._tell(b"spill\n")

    def begin_to_delete(self) -> None:
        """Have it delete what it has spilled."""
        self._tell(b"delete\n")

    def _tell(self, what: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what)
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def io_workers(
    count: int, directory: Path, node: str, params: Mapping[str, Any]
) -> Iterator[list[IoWorker]]:
    """IO workers of one node."""
    workers: list[IoWorker] = []
    try:
        for _ in range(count):
            workers.append(IoWorker(directory, node, params))
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def _target(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:  # it is closed by now
        return ""


def _main(directory: str, node: str, params: str, *connected: str) -> None:
    import ray
    from ray._private.node import Node

    from ray_valkey_spill.plugin.storage import ValkeyStorage

    class HeadNode(Node):
        """Knows the session's directory, as a node of Ray's does."""

        def __init__(self) -> None:
            pass

        @property
        def session_name(self) -> str:
            return SESSION

        def get_session_dir_path(self) -> str:
            return directory

    class Storage(ValkeyStorage):
        def _get_objects_from_store(self, refs: list[Any]) -> list[tuple[bytes, bytes, None]]:
            return [(bytes(1000), b"metadata", None) for _ in refs]

    sys.argv = [sys.argv[0], "--worker-type=SPILL_WORKER"]
    storage = Storage(node, SESSION, **json.loads(params))
    # Ray's IO workers make their storage before they know this.
    ray._private.worker._global_node = HeadNode()
    if connected:
        ray._private.worker.Worker.connected = True
    urls: list[bytes] = []
    for told in sys.stdin:
        if told == "spill\n":
            urls += storage.spill_objects([ray.ObjectRef.from_random()], [b""])
        else:
            storage.delete_spilled_objects(urls)


if __name__ == "__main__":
    _main(*sys.argv[1:])
