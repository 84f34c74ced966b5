"""Real Ray clusters for the tests, small enough to spill at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

import ray_valkey_spill
from ray_valkey_spill.cli.demo import shut_down
from support.guardians import end_guardians
from support.servers import PATIENCE, Server, wait_until
from support.session_files import shared_files

MIB = 1 << 20
OBJECT_STORE = 100 * MIB

OF_TESTS = {
    # So that small values too live in plasma and can be spilled.
    "max_direct_call_object_size": 0,
    # Most tests run no task: workers are started when there is one.
    "prestart_worker_first_driver": False,
    # Ray would else end workers that are idle, and start others with the next task.
    "num_workers_soft_limit": 4,
    # Only the tests of metrics read any, and turn this on.
    "enable_metrics_collection": False,
    # A node is dead after five checks that found nobody. One that is only slow has longer.
    "health_check_period_ms": 500,
}
# Ray asks again for what was not restored after a second, two, four, …: ten times as soon as else.
RETRIED_SOON = {"object_manager_pull_timeout_ms": 1000}
# Nobody reads a test's logs, and none of its clusters grows by itself.
_NODE_OPTIONS = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


def system_config(url: str | None, io_workers: int = 1, **params: Any) -> dict[str, Any]:
    """A cluster's settings, with which it spills to `url`.

    Args:
        io_workers: how many spill, and how many restore. Each takes more than a second of a
            processor to start. The demo and the walk-through have Ray's four. If the only one is
            killed while a request waits for it, Ray 2.60 starts no other.
    """
    spilling = ray_valkey_spill.system_config(url=url, **params)
    return {**spilling, **OF_TESTS, "max_io_workers": io_workers}


@contextlib.contextmanager
def local_ray(url: str | None, object_store: int = OBJECT_STORE, **params: Any) -> Iterator[None]:
    """`ray.init` with a small object store that spills to `url`."""
    with ray_with(system_config(url, **params), object_store):
        yield


def starting_ray(system_config: dict[str, Any] | None = None, **options: Any) -> str:
    """The first lines of a script for `run_driver`: they start such a Ray as `ray_with` does.

    Args:
        options: of `ray.init`, in the place of what tests have.
    """
    options = {**_init_options(system_config), **options}
    return f"""
import fcntl, os, sys
import numpy as np, psutil, ray
with open({_turn()!r}) as turn:
    fcntl.flock(turn, fcntl.LOCK_EX)
    ray.init(**{options!r})
"""


def _turn() -> str:
    """The path of a file that whoever starts a node locks; tests that run at once share two.

    Ray gives itself half a minute for a node. If each of many tests starts one, it takes as long.
    Any two files do that are there anyway: nothing is written to them, and none is left.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return str(Path(__file__).with_name(("clusters.py", "servers.py")[number % 2]))


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """In the meantime few others start a node."""
    with open(_turn()) as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def _init_options(
    system_config: dict[str, Any] | None, object_store: int = OBJECT_STORE, num_cpus: int = 2
) -> dict[str, Any]:
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "object_store_memory": object_store,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "_node_ip_address": "127.0.0.1",
        "_system_config": system_config,
    }


@contextlib.contextmanager
def ray_with(
    system_config: dict[str, Any], object_store: int = OBJECT_STORE, num_cpus: int = 2
) -> Iterator[None]:
    """`ray.init` of a node alone, all of which has ended afterwards."""
    try:
        with in_turn():
            ray.init(**_init_options(system_config, object_store, num_cpus))
        yield
    finally:
        shut_down()
        end_clean_ups()
        end_guardians(os.getpid())


@contextlib.contextmanager
def cluster(url: str, nodes: int = 2, **params: Any) -> Iterator[Cluster]:
    """A cluster that spills to `url`; see `cluster_with`."""
    with cluster_with(system_config(url, **params), nodes) as made:
        yield made


@contextlib.contextmanager
def cluster_with(system_config: dict[str, Any], nodes: int, **options: Any) -> Iterator[Cluster]:
    """A cluster whose node i has the resource `node<i>`; the driver is on node 0.

    Args:
        options: of node 0, beside those of all nodes.
    """
    cluster = Cluster()
    try:
        add_node(cluster, 0, _system_config=system_config, **options)
        # Before there are others: older Rays connect to any node of the machine.
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        for i in range(1, nodes):
            add_node(cluster, i)
        yield cluster
    finally:
        started = [
            process for node in cluster.list_all_nodes() for _, process in node.live_processes()
        ]
        ray.shutdown()
        cluster.shutdown()
        for process in started:
            process.wait()
        end_clean_ups()
        end_guardians(os.getpid())


def add_node(cluster: Cluster, number: int, **options: Any) -> None:
    with in_turn():
        cluster.add_node(
            num_cpus=2,
            object_store_memory=OBJECT_STORE,
            resources={f"node{number}": 100},
            **_NODE_OPTIONS,
            **options,
        )


@contextlib.contextmanager
def ray_start(
    *args: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    python: str | Path = sys.executable,
) -> Iterator[None]:
    """`ray start --block`, which ends its node's processes when it is terminated.

    Args:
        env: what its environment has beside ours.
    """
    with contextlib.ExitStack() as stack:
        with log.open("w") as output, in_turn():
            process = subprocess.Popen(
                [
                    *(str(python), "-m", "ray.scripts.scripts", "start", "--block", *args),
                    *("--object-store-memory=100000000", "--num-cpus=1"),
                    "--node-ip-address=127.0.0.1",
                    *(["--no-monitor"] if "--head" in args else []),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_max_io_workers": "1", **(env or {})},
            )
            stack.callback(_end_node, process)
            wait_until(lambda: "--block" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield


def _end_node(process: subprocess.Popen[bytes]) -> None:
    """End a `ray start --block` in order, and what is left of it then."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE)
        for child in psutil.wait_procs(started, timeout=10)[1]:
            kill(child.pid)
    end_guardians(process.pid)


def on(node: int) -> dict[str, Any]:
    """The options of what is to run on that node. As many tasks at once as it has processors."""
    return {"resources": {f"node{node}": 1}}


def kill_node(cluster: Cluster, number: int) -> None:
    """Kill a node other than the head. It destroys nothing; Cluster.remove_node would."""
    node = cluster.list_all_nodes()[number]
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    cluster.worker_nodes.remove(node)
    wait_until(lambda: not _is_alive(node.node_id))


def _is_alive(node_id: str) -> bool:
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)


def spill(refs: list[Any], server: Server) -> None:
    """Have Ray spill `refs`, and drop their copies from the object store."""
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
    wanted = {ref.hex() for ref in refs}
    filler: list[Any] = []
    for i in range(40):
        filler.append(ray.put(np.full(MIB, i)))
        # Ray has the object's URL, and may drop its copy, only after the header is there.
        if len(filler) > 2 * OBJECT_STORE // (8 * MIB) and wanted <= server.spilled_ids():
            return
    raise AssertionError(f"not spilled: {wanted - server.spilled_ids()}")


def expect_no_keys(server: Server) -> None:
    """All references are gone, so all keys must go; the neighbours' stay as they are."""
    wait_until(lambda: server.spilled_keys() == [])
    server.assert_foreign_untouched()


def clean_ups() -> list[psutil.Process]:
    """The clean-ups of dead sessions that head starts of this process have begun."""
    return [child for child in psutil.Process().children() if "ray_valkey_spill gc" in title(child)]


def end_clean_ups() -> None:
    """They would watch for a minute."""
    for process in clean_ups():
        kill(process.pid)


def io_workers() -> list[psutil.Process]:
    """The IO workers of the Ray that this process started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if re.search("(Spill|Restore)Worker", title(child))]


def own_memory(process: psutil.Process) -> int:
    """Bytes that it alone has, but for pages of the object store that nobody else has touched."""
    return sum(
        each.private_clean + each.private_dirty
        for each in process.memory_maps(grouped=True)
        if not each.path.startswith("/dev/shm/")
    )


def title(process: psutil.Process) -> str:
    """What the process calls itself; nothing if it has just ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def talks_to(process: psutil.Process, port: int) -> bool:
    """Whether the process has a connection to `port`."""
    with contextlib.suppress(psutil.Error):
        return any(c.raddr and c.raddr.port == port for c in process.net_connections())
    return False


def failures() -> int:
    """How many attempts have failed in the outage that goes on."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    return sum(
        outage["failures"]
        for path in shared_files(session).glob("*.outages")
        if (text := path.read_text())
        for outage in json.loads(text).values()
    )


def run_driver(script: str, *args: str, env: dict[str, str] | None = None) -> str:
    """Run `script` in an interpreter of its own and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
