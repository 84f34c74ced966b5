"""A node whose local disk is full: nothing is spilled there, so spilling goes on."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clusters import ray_start, run_driver, starting_ray, system_config
from support.servers import Server, free_ports, valkey_server, wait_until

import ray_valkey_spill
from ray_valkey_spill.plugin.spilling_config import RAY_SETTINGS

CAPACITY = "64m"
# At 95 % of that Ray's own check strikes.
LEFT_FREE = 2 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; for Ray's sockets, at a short path."""
    directory = Path(f"/tmp/rvs-disk-{os.getpid()}")
    directory.mkdir(mode=0o700)
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={CAPACITY}", "tmpfs", str(directory)]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
        try:
            yield directory
        finally:
            # Busy for as long as the last of Ray's processes ends.
            umount = ["umount", str(directory)]
            wait_until(lambda: subprocess.run(umount, check=False).returncode == 0)
    finally:
        directory.rmdir()


def fill(directory: Path, leave: int) -> None:
    disk = os.statvfs(directory)
    with (directory / "filler").open("wb") as file:
        file.write(b"x" * (disk.f_bavail * disk.f_frsize - leave))


SPILLING = """
import pathlib, sys, time, numpy as np, ray

def spill_and_restore():
    refs = [ray.put(np.full(4 << 17, i)) for i in range(50)]  # 4 MiB each
    return [int(ray.get(ref)[0]) for ref in refs] == list(range(50))

"""

FULL = """
disk = sys.argv[1]
with open(f"{disk}/filler", "wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError as error:
        print(error)
assert spill_and_restore()
print("spilled and restored")
from ray_valkey_spill.cli.demo import shut_down
shut_down()
"""


def test_a_full_local_disk_stops_no_spill_and_no_restore(server: Server, disk: Path) -> None:
    script = starting_ray(system_config(server.url), _temp_dir=str(disk)) + SPILLING + FULL
    printed = run_driver(script, str(disk))
    assert "No space left on device\nspilled and restored\n" in printed
    wait_until(lambda: server.our_keys() == [])


ON_BOTH_NODES = """
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
task = ray.remote(max_retries=0)(spill_and_restore)
for node in ("first", "second"):
    try:
        print(node, ray.get(task.options(resources={node: 0.01}).remote()))
    except ray.exceptions.OutOfDiskError:
        print(node, "is out of disk")
"""


def on_both_nodes(disk: Path, head: list[str], both: dict[str, str]) -> str:
    """What a job prints on two nodes whose file system is nearly full.

    Args:
        head: arguments of the head.
        both: environment variables of both nodes.
    """
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with (
        ray_start(
            *("--head", f"--port={port}", f"--temp-dir={disk}", "--include-dashboard=false"),
            *('--resources={"first": 1}', *head),
            log=disk / "head.log",
            env=both,
        ),
        ray_start(
            *(f"--address={address}", '--resources={"second": 1}'),
            log=disk / "node.log",
            env=both,
        ),
    ):
        fill(disk, LEFT_FREE)
        time.sleep(0.5)  # Ray looks every 100 ms
        return run_driver(SPILLING + ON_BOTH_NODES, address)


LIFTED = {f"RAY_{name}": str(value) for name, value in RAY_SETTINGS.items()}


@pytest.mark.slow
def test_the_environment_lifts_the_disk_check_on_every_node(disk: Path) -> None:
    with valkey_server() as server:
        config = {"RAY_object_spilling_config": ray_valkey_spill.spilling_config(server.url)}
        printed = on_both_nodes(disk, [], {**config, **LIFTED})
    assert printed == "first True\nsecond True\n"


@pytest.mark.slow
def test_the_heads_system_config_decides_for_every_node(disk: Path) -> None:
    """Also where users keep Ray's check; what the others fill is full for Ray, then."""
    with valkey_server() as server:
        config = {
            **ray_valkey_spill.system_config(server.url),
            "local_fs_capacity_threshold": 0.95,
            # Nothing is spilled before the store is full, which is when Ray looks at the disk.
            "object_spilling_threshold": 1.0,
        }
        printed = on_both_nodes(disk, [f"--system-config={json.dumps(config)}"], LIFTED)
    assert printed == "first is out of disk\nsecond is out of disk\n"
