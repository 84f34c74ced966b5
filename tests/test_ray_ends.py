"""However a Ray session ends, its data go, and nobody else's: see `plugin/ending.py`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from support.clusters import MIB, in_turn, kill, local_ray, run_driver, system_config
from support.guardians import end_guardians, guardians, left_of
from support.servers import (
    PATIENCE,
    ROOT,
    SOON,
    Node,
    Server,
    free_port,
    valkey_server,
    wait_until,
)

from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.plugin import proc

pytestmark = pytest.mark.slow

LEASES = Keyspace(ROOT).leases

# As at a terminal, also where the tests run in the background of a shell.
_INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
_RAY = _INTERRUPTIBLE + "from ray.scripts.scripts import main; main()"

# Spills, and goes; an actor keeps what was spilled on each of some nodes.
_SPILLING = """
import os, sys, threading, time, numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="ends")

@ray.remote(num_cpus=0, name="holder", lifetime="detached")
class Holder:
    def __init__(self):
        self.refs = {}

    def put(self, resource):
        # One at a time, for each worker takes more than a second of a processor to start.
        full = ray.remote(np.full).options(num_cpus=0, resources={resource: 60}, max_retries=0)
        refs = [full.remote(1 << 20, i) for i in range(30)]
        ray.wait(refs, num_returns=30, fetch_local=False)
        self.refs |= {ref.hex(): (i, ref) for i, ref in enumerate(refs)}
        return [ref.hex() for ref in refs]

    def check(self, spilled):
        # Of the others, which were in the memory of the head, Ray makes none again.
        kept = [self.refs[each] for each in spilled if each in self.refs]
        read = {i: int(ray.get(ref, timeout=60)[0]) for i, ref in kept}
        return len(read) > 5 and all(i == found for i, found in read.items())

    def drop_later(self, ids, gate):
        def drop():
            while not os.path.exists(gate):
                time.sleep(0.1)
            for each in ids:
                del self.refs[each]
        threading.Thread(target=drop).start()

holder = Holder.options(resources={sys.argv[2]: 1}).remote()
for resource in sys.argv[3:]:
    print("kept", *ray.get(holder.put.remote(resource)))
"""

_CHECKING = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="ends")
holder = ray.get_actor("holder")
print("right:", ray.get(holder.check.remote(json.loads(sys.argv[2])), timeout=300))
if len(sys.argv) > 3:
    ray.get(holder.drop_later.remote(json.loads(sys.argv[3]), sys.argv[4]))
"""

_DRIVER = (
    _INTERRUPTIBLE
    + """
import json, sys, time, numpy as np, ray
ray.init(**json.loads(sys.argv[1]))
refs = [ray.put(np.full(1 << 20, i)) for i in range(30)]
print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
if sys.argv[2] == "stay":
    time.sleep(1000)
"""
)


@dataclass(frozen=True)
class Session:
    """A session, by the process that ends it."""

    process: subprocess.Popen[bytes]
    log: Path
    directory: Path

    def is_gone_from(self, server: Server) -> bool:
        return left_of(server, self.directory.name) == 0 and not guardians(self.directory)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, with all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children(recursive=True):
            kill(each.pid)
    kill(process.pid)
    process.wait()


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """In the end the process has ended, with all that it had started."""
    try:
        yield
    finally:
        kill_all(process)
        end_guardians(process.pid)


def started(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", **environment},
        )


@contextlib.contextmanager
def starting(
    log: Path, settings: dict[str, Any], of_environment: bool, then: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a driver that starts a Ray with these settings and spills."""
    environment = {}
    if of_environment:
        environment["RAY_object_spilling_config"] = settings.pop("object_spilling_config")
    options = {
        "address": "local",
        "num_cpus": 1,
        "object_store_memory": 100 * MIB,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "_system_config": settings,
    }
    process = started([_DRIVER, json.dumps(options), then], log, **environment)
    with ended(process):
        yield process


@contextlib.contextmanager
def driver(
    url: str, directory: Path, of_environment: bool, then: str = "stay", **system: Any
) -> Iterator[Session]:
    """A driver that starts a Ray and spills."""
    log, settings = directory / "driver.log", {**system_config(url), **system}
    with contextlib.ExitStack() as stack:
        with in_turn():
            process = stack.enter_context(starting(log, settings, of_environment, then))
            wait_until(lambda: "session_" in log.read_text() or process.poll() is not None)
        assert "session_" in log.read_text(), log.read_text()
        yield Session(process, log, Path(log.read_text().split()[-1]))


def _head_options(port: int, directory: Path, settings: dict[str, Any]) -> list[str]:
    return [
        *("--head", f"--port={port}", f"--temp-dir={directory}"),
        *(f"--system-config={json.dumps(settings)}", "--no-monitor"),
        *("--include-dashboard=false", '--resources={"first": 100}'),
    ]


def start_node(
    stack: contextlib.ExitStack, arguments: Sequence[str], log: Path, **environment: str
) -> subprocess.Popen[bytes]:
    """`ray start --block`, with all of which it is over when the stack is closed."""
    with in_turn():
        process = started(
            [
                *(_RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000"),
                *("--node-ip-address=127.0.0.1", "--include-log-monitor=false", *arguments),
            ],
            log,
            **environment,
        )
        stack.enter_context(ended(process))
        wait_until(lambda: "--block" in log.read_text() or process.poll() is not None)
    assert process.poll() is None, log.read_text()
    return process


@contextlib.contextmanager
def head(url: str, directory: Path, of_environment: bool) -> Iterator[Session]:
    """A head by `ray start --block`, with an actor that has spilled."""
    settings = system_config(url)
    environment = {}
    if of_environment:
        environment["RAY_object_spilling_config"] = settings.pop("object_spilling_config")
    port, log = free_port(), directory / "head.log"
    with contextlib.ExitStack() as stack:
        options = _head_options(port, directory, settings)
        process = start_node(stack, options, log, **environment)
        run_driver(_SPILLING, f"127.0.0.1:{port}", "first", "first")
        yield Session(process, log, (directory / "session_latest").resolve())


@pytest.fixture(scope="module")
def spilling() -> Iterator[Server]:
    """A server on which a session of the same namespace lives all the time, and keeps its data."""
    with valkey_server() as server:
        server.settle_foreign()
        with local_ray(server.url):
            living = Path(ray._private.worker._global_node.get_session_dir_path())
            refs = [ray.put(np.full(MIB, i)) for i in range(30)]
            yield server
            assert len(guardians(living)) == 1
            assert [int(ray.get(ref, timeout=PATIENCE)[0]) for ref in refs] == list(range(30))
            del refs
        assert server.our_keys() == []
        server.assert_foreign_untouched()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name
)
def test_a_signal_ends_heads_and_drivers_and_their_data_go(
    spilling: Server, short_dir: Path, number: signal.Signals
) -> None:
    is_head_from_environment = number == signal.SIGINT
    with contextlib.ExitStack() as stack:
        (short_dir / "d").mkdir()
        one = stack.enter_context(
            driver(
                spilling.url,
                short_dir / "d",
                number != signal.SIGTERM,
                # Ray then neither validates nor destroys, and spills all the same.
                **(
                    {"automatic_object_spilling_enabled": False} if number == signal.SIGKILL else {}
                ),
            )
        )
        two = stack.enter_context(head(spilling.url, short_dir, is_head_from_environment))
        for session in (one, two):
            assert left_of(spilling, session.directory.name)
            wait_until(lambda: len(guardians(session.directory)) == 1)  # noqa: B023
        for session, other in ((one, two), (two, None)):
            session.process.send_signal(number)
            session.process.wait(timeout=PATIENCE)
            # Those that end in order have done it by themselves.
            if number == signal.SIGTERM or (number == signal.SIGINT and session is one):
                assert left_of(spilling, session.directory.name) == 0, session.log.read_text()
            wait_until(lambda: session.is_gone_from(spilling), SOON)  # noqa: B023
            if other is not None:
                assert left_of(spilling, other.directory.name)


def test_a_driver_whose_ray_destroys_nothing_leaves_nothing(
    spilling: Server, short_dir: Path
) -> None:
    with driver(
        spilling.url, short_dir, True, "leave", automatic_object_spilling_enabled=False
    ) as session:
        session.process.wait(timeout=PATIENCE)
        wait_until(lambda: session.is_gone_from(spilling), SOON)


def test_where_ray_validates_nothing_a_guardian_is_there_before_the_first_object(
    spilling: Server, short_dir: Path
) -> None:
    """However soon the session then ends."""
    settings = system_config(spilling.url, namespace="first")
    settings["automatic_object_spilling_enabled"] = False
    root = "ray:spill:first:"
    with starting(short_dir / "driver.log", settings, True, "leave"):
        wait_until(lambda: spilling.keys(f"{root}session_*"))
        key, *_ = spilling.keys(f"{root}session_*")
        session = key.decode()[len(root) :].partition(":")[0]
        assert any(session in word for each in guardians() for word in each.cmdline())
        wait_until(lambda: left_of(spilling, session, "first") == 0)


def test_processes_of_a_head_that_end_one_by_one(spilling: Server, short_dir: Path) -> None:
    """As `ray stop` ends those of all Rays of the machine: the raylet first, the GCS last."""
    with head(spilling.url, short_dir, False) as session:
        processes = psutil.Process(session.process.pid).children()
        for name in ("raylet", "gcs_server"):
            (process,) = (each for each in processes if each.name() == name)
            process.terminate()
            # A zombie, or gone where its parent ended too.
            wait_until(lambda: not proc.is_alive(process.pid))  # noqa: B023
        wait_until(lambda: session.is_gone_from(spilling), SOON)


@pytest.mark.skipif(not shutil.which("redis-server"), reason="there is no redis-server here")
def test_a_head_that_comes_back_with_its_session_finds_all_that_was_spilled(
    short_dir: Path,
) -> None:
    """The GCS keeps its state in a Redis. Heads are ended by SIGTERM, then by SIGKILL.

    Beside the second one another node is killed, and references to its objects go: until there is a
    GCS again, nothing of it is removed.
    """
    binary = Path(str(shutil.which("redis-server")))
    redis = Node(short_dir / "redis", free_port(), {}, binary=binary)
    port = free_port()
    address = f"127.0.0.1:{port}"
    with valkey_server() as server, contextlib.closing(redis), contextlib.ExitStack() as stack:
        redis.start()
        wait_until(redis.serves)
        # Nodes outlive a GCS that is away for longer than they wait by default.
        settings = {"max_io_workers": 1, "gcs_rpc_server_reconnect_timeout_s": 600}
        options = _head_options(port, short_dir, {**system_config(server.url), **settings})

        def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
            return start_node(stack, arguments, short_dir / name, RAY_REDIS_ADDRESS=redis.url[9:-2])

        def node(resource: str) -> subprocess.Popen[bytes]:
            resources = json.dumps({resource: 100})
            return start(f"{resource}.log", f"--address={address}", f"--resources={resources}")

        first = start("1.log", *options)
        node("second")
        third = node("third")
        # The actor is on another node. What it keeps was made, and spilled, on the head and on the
        # third node.
        printed = run_driver(_SPILLING, address, "second", "first", "third")
        # Ray may have said something after it.
        of_first, of_third = (
            server.spilled_ids() & {*ids.split()}
            for ids in re.findall("^kept (.*)$", printed, re.M)
        )
        assert min(len(of_first), len(of_third)) > 5
        dropped = {*sorted(of_third)[::2]}
        session = (short_dir / "session_latest").resolve()
        gate = short_dir / "gate"
        spilled = of_first | of_third
        for name, number in (("2.log", signal.SIGTERM), ("3.log", signal.SIGKILL)):
            assert guardians(session) == []
            first.send_signal(number)
            first.wait(timeout=PATIENCE)
            # Others that clean up give the session time until then.
            leases = server.client.zrange(LEASES, 0, -1)
            assert any(lease.endswith(b":outlives-gcs") for lease in leases)
            if number == signal.SIGKILL:
                kill_all(third)
                gate.touch()
                _expect_rounds(server, 3)
                assert server.spilled_ids() >= spilled
                spilled -= dropped
            # Or Ray takes the other node, which is on the same host here, for a head that runs.
            (short_dir / "ray_current_cluster").unlink()
            first = start(name, *options)
            assert (short_dir / "session_latest").resolve() == session
            arguments = [] if gate.exists() else [json.dumps([*dropped]), str(gate)]
            printed = run_driver(_CHECKING, address, json.dumps([*spilled]), *arguments)
            assert "right: True" in printed
            assert server.spilled_ids() >= spilled
        # The third node is dead now by the GCS's word.
        wait_until(lambda: not server.spilled_ids() & dropped, SOON)
        assert server.spilled_ids() >= spilled


def _expect_rounds(server: Server, count: int) -> None:
    """Wait until living nodes, all of which look for dead ones, have done so many rounds."""
    for _ in range(count):
        before = server.client.zrange(LEASES, 0, -1, withscores=True)
        wait_until(lambda: server.client.zrange(LEASES, 0, -1, withscores=True) != before)  # noqa: B023
