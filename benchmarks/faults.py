"""What becomes of Ray's filesystem storage under faults that this package's tests inject.

`python -m benchmarks.faults` prints, for each, what became of the objects. It needs to be root, for
a file system that is full.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from support.clusters import cluster_with, io_workers, kill, kill_node
from support.servers import wait_until

from benchmarks.common import MIB, main, note, table

OBJECTS = 40
PATIENCE = 30.0
SETTLED = 20.0  # seconds after which nothing more is going to happen
STEM = "ray_spilled_objects"  # `ray_constants.DEFAULT_OBJECT_PREFIX`


def spilling_to(directory: Path, nodes: int = 1) -> AbstractContextManager[Cluster]:
    config = {"type": "filesystem", "params": {"directory_path": str(directory)}}
    return cluster_with({"object_spilling_config": json.dumps(config)}, nodes)


def put_all() -> list[Any]:
    return [ray.put(np.full(MIB, i)) for i in range(OBJECTS)]


def outcomes(refs: list[Any]) -> dict[str, int]:
    """How many objects came back whole, came back wrong, were refused, or did not come back."""
    found: collections.Counter[str] = collections.Counter()
    ready, waiting = ray.wait(refs, num_returns=len(refs), timeout=PATIENCE)
    found[f"hang (for the {PATIENCE:.0f} s looked at)"] = len(waiting)
    for i, ref in enumerate(refs):
        if ref in ready:
            try:
                right = (ray.get(ref, timeout=PATIENCE) == i).all()
                found["whole" if right else "wrong bytes, unnoticed"] += 1
            except ray.exceptions.GetTimeoutError:
                found[f"hang (for the {PATIENCE:.0f} s looked at)"] += 1
            except ray.exceptions.RayError as error:
                found[type(error).__name__] += 1
    return {name: count for name, count in found.items() if count}


def files(directory: Path) -> list[Path]:
    return [path for path in directory.glob(f"{STEM}*/*") if path.is_file()]


@contextlib.contextmanager
def file_system_at(directory: Path, size: str) -> Iterator[None]:
    """One of its own, in memory."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remounted(directory: Path, mode: str) -> bool:
    command = ["mount", "-o", f"remount,{mode}", str(directory)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- faults ---


def data_gone(directory: Path) -> dict[str, Any]:
    with spilling_to(directory):
        refs = put_all()
        for path in files(directory):
            path.unlink()
        return outcomes(refs)


def bits_flipped(directory: Path) -> dict[str, Any]:
    with spilling_to(directory):
        refs = put_all()
        for path in files(directory):
            data = bytearray(path.read_bytes())
            # Not between two objects.
            data[len(data) // 2 + 3 * MIB] ^= 1
            path.write_bytes(data)
        return outcomes(refs)


def storage_away_for_45_seconds(directory: Path) -> dict[str, Any]:
    with spilling_to(directory):
        refs = put_all()
        away = directory.with_name("away")
        directory.rename(away)
        ray.wait(refs, num_returns=OBJECTS, timeout=45)
        shutil.copytree(away, directory, dirs_exist_ok=True)
        start = time.monotonic()
        found = outcomes(refs)
        return {**found, "seconds until all were back": round(time.monotonic() - start)}


def node_killed(directory: Path) -> dict[str, Any]:
    @ray.remote(max_retries=0)
    def make(i: int) -> np.ndarray:
        import numpy

        return numpy.full(1 << 20, i)

    with spilling_to(directory, nodes=2) as cluster:
        refs = [make.options(resources={"node1": 1}).remote(i) for i in range(OBJECTS)]
        ray.wait(refs, num_returns=OBJECTS, fetch_local=False)
        wait_until(lambda: len(files(directory)) > 1)
        kill_node(cluster, 1)
        return outcomes(refs)


def io_workers_killed_while_they_spill(directory: Path) -> dict[str, Any]:
    killed: list[int] = []

    def strike() -> None:
        while len(killed) < 3:
            for worker in io_workers():
                if _has_open(worker, directory) and worker.pid not in killed:
                    kill(worker.pid)
                    killed.append(worker.pid)

    with spilling_to(directory):
        striking = threading.Thread(target=strike)
        striking.start()
        refs: list[Any] = []
        while striking.is_alive():
            refs += put_all()
            refs = refs[-OBJECTS:]
        found = outcomes(refs)
        refs.clear()
        time.sleep(SETTLED)
        return {**found, "files left once all references are gone": len(files(directory))}


def _has_open(worker: psutil.Process, directory: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(Path(file.path).is_relative_to(directory) for file in worker.open_files())
    return False


DRIVER = """
import os, sys
import numpy as np, ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
refs = [ray.put(np.full(1 << 20, i)) for i in range(40)]
os.kill(os.getpid(), 9)
"""


def driver_killed(directory: Path) -> dict[str, Any]:
    with spilling_to(directory) as cluster:
        command = [sys.executable, "-c", DRIVER, cluster.address]
        subprocess.run(command, capture_output=True, timeout=120, check=False)
        spilled = len(files(directory))
        time.sleep(SETTLED)
        return {"files": spilled, f"files {SETTLED:.0f} s later": len(files(directory))}


HEAD = """
import os, sys
import numpy as np, psutil, ray

ray.init(address="local", object_store_memory=100 << 20, include_dashboard=False,
         log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1",
         object_spilling_directory=sys.argv[1])
refs = [ray.put(np.full(1 << 20, i)) for i in range(40)]
for process in psutil.Process().children(recursive=True):
    process.kill()
os._exit(0)
"""


def head_killed_and_started_again(directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", HEAD, str(directory)]
    subprocess.run(command, capture_output=True, timeout=120, check=False)
    past = set(files(directory))
    with spilling_to(directory):
        refs = put_all()
        time.sleep(SETTLED)
        left = past & set(files(directory))
        return {**outcomes(refs), "old files": len(past), f"{SETTLED:.0f} s later": len(left)}


def deletion_fails(directory: Path) -> dict[str, Any]:
    with file_system_at(directory, "500m"), spilling_to(directory):
        refs = put_all()
        wait_until(lambda: remounted(directory, "ro"))  # not while a file is being written
        spilled = len(files(directory))
        refs.clear()
        time.sleep(SETTLED)
        assert remounted(directory, "rw")
        time.sleep(SETTLED)
        return {"files": spilled, "files once it could be deleted again": len(files(directory))}


FILLING = """
import sys
import numpy as np, ray

ray.init(address="local", object_store_memory=100 << 20, include_dashboard=False,
         _node_ip_address="127.0.0.1", object_spilling_directory=sys.argv[1])
refs = [ray.put(np.full(1 << 20, i)) for i in range(40)]
assert all((ray.get(ref) == i).all() for i, ref in enumerate(refs))
"""


def storage_full(directory: Path) -> dict[str, Any]:
    with file_system_at(directory, "60m"):
        command = [sys.executable, "-c", FILLING, str(directory)]
        job = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    errors = {line.split(":")[0] for line in job.stderr.splitlines() if line.startswith("ray.exc")}
    return {"job's exit code": job.returncode, "errors": sorted(errors)}


FAULTS: list[Callable[[Path], dict[str, Any]]] = [
    data_gone,
    bits_flipped,
    storage_away_for_45_seconds,
    node_killed,
    io_workers_killed_while_they_spill,
    storage_full,
    deletion_fails,
    driver_killed,
    head_killed_and_started_again,
]


def measure(quick: bool) -> dict[str, Any]:
    found = {}
    for fault in FAULTS[:2] if quick else FAULTS:
        with tempfile.TemporaryDirectory(prefix="rvs-") as directory:
            found[fault.__name__] = fault(Path(directory, "spill"))
        note(f"{fault.__name__}: {found[fault.__name__]}")
    return {"filesystem": found}


def tables(results: dict[str, Any]) -> str:
    rows = [
        [name.replace("_", " "), ", ".join(f"{what}: {count}" for what, count in found.items())]
        for name, found in results["filesystem"].items()
    ]
    return table([["fault", "Ray's filesystem storage"], *rows])


if __name__ == "__main__":
    main(__doc__, measure, tables)
