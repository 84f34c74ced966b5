"""A cluster started with the plain tools: `ray start`, twice, and a driver that connects."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
from support.clusters import ray_start, run_driver
from support.servers import PATIENCE, free_ports, valkey_server, wait_until

import ray_valkey_spill
from ray_valkey_spill.plugin.gcs import running_at

HOOK = "ray_valkey_spill.pth"

DRIVER = """
import sys, time, numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
assert len([node for node in ray.nodes() if node["Alive"]]) == 2

@ray.remote(max_retries=0)
def make(i):
    return np.full(1 << 20, i)

# On either node, for this driver may have been connected to either.
first, second = (make.options(resources={name: 0.01}) for name in ("first", "second"))
refs = [node.remote(i) for node in (first, second) for i in range(30)]
assert [int(ray.get(ref)[0]) for ref in refs] == 2 * list(range(30))
import valkey
client, index = valkey.Valkey(port=int(sys.argv[2])), "ray:spill:default:{default}:index"
members = client.zrange(index, 0, -1)
print(len({member.split(b":")[1] for member in members}), "nodes have spilled")
# Older Rays delete nothing of a driver's once that has left.
del refs
while client.zcard(index):
    time.sleep(0.05)
"""


def test_two_nodes_started_by_hand_and_a_driver(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with valkey_server() as server:
        server.settle_foreign()
        config = json.dumps(ray_valkey_spill.system_config(url=server.url))
        with (
            ray_start(
                *("--head", f"--port={port}", f"--system-config={config}"),
                *(f"--temp-dir={short_dir}", "--include-dashboard=false"),
                '--resources={"first": 1}',
                log=short_dir / "head.log",
            ),
            ray_start(
                *(f"--address={address}", '--resources={"second": 1}'),
                log=short_dir / "node.log",
                env={"RAY_max_io_workers": "4"},  # Ray's own default
            ),
        ):
            printed = run_driver(DRIVER, address, str(server.port))
            assert "2 nodes have spilled" in printed
            wait_until(lambda: server.spilled_keys() == [])
            session = running_at(address)
            assert session is not None
            assert session.name == (short_dir / "session_latest").resolve().name
            assert len(session.nodes) == 2
        server.assert_foreign_untouched()


STALLED = """
import sys, numpy as np, ray
ray.init(address=sys.argv[1])

@ray.remote(resources={"second": 1}, max_retries=0)
def spill_and_restore():
    refs = [ray.put(np.full(1 << 20, i)) for i in range(30)]
    return [int(ray.get(ref)[0]) for ref in refs] == list(range(30))

print("right:", ray.get(spill_and_restore.remote()))
"""


def python_without_the_hook(directory: Path) -> Path:
    """An environment with Ray, in which this package is not installed.

    `install` installs it there.
    """
    venv.create(directory, symlinks=True)
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    # Of directories that a .pth names, Python looks at no .pth.
    (site_packages(directory) / "others.pth").write_text("\n".join(paths))
    return directory / "bin/python"


def install(directory: Path) -> None:
    # At the root of site-packages, or in a checkout beside the modules.
    package = Path(ray_valkey_spill.__file__).parent
    (hook, *_) = (each for each in (package.parent, package) if (each / HOOK).exists())
    hook /= HOOK
    shutil.copy(hook, site_packages(directory))


def site_packages(directory: Path) -> Path:
    return next(directory.glob("lib/python*/site-packages"))


@pytest.mark.slow
def test_a_node_without_the_package_is_found_and_joins_once_it_has_it(short_dir: Path) -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    page = (Path(__file__).parent.parent / "docs/troubleshooting.md").read_text()
    (snippet,) = re.findall(r"^    import ray\n(?:    .*\n)+", page, re.MULTILINE)
    with valkey_server() as server, contextlib.ExitStack() as stack:
        config = {
            **ray_valkey_spill.system_config(url=server.url),
            # Not 60 until Ray starts the next IO worker. Long enough for one that is only slow.
            "worker_register_timeout_seconds": 15,
        }
        stack.enter_context(
            ray_start(
                *("--head", f"--port={port}", f"--system-config={json.dumps(config)}"),
                *(f"--temp-dir={short_dir}", "--include-dashboard=false"),
                log=short_dir / "head.log",
            )
        )
        stack.enter_context(
            ray_start(
                *(f"--address={address}", '--resources={"second": 1}'),
                log=short_dir / "node.log",
                python=python_without_the_hook(short_dir / "venv"),
            )
        )
        found = run_driver(textwrap.dedent(snippet), env={"RAY_ADDRESS": address})
        assert sorted(line.split()[1] for line in found.splitlines()) == [
            "ray._private.external_storage",
            "ray_valkey_spill._startup",
        ]
        log = short_dir / "driver.log"
        with log.open("w") as output:
            driver = subprocess.Popen(
                [sys.executable, "-c", STALLED, address], stdout=output, stderr=subprocess.STDOUT
            )
        stack.callback(driver.wait)
        stack.callback(driver.kill)
        message = "ValueError: Unknown external storage type: valkey"
        wait_until(lambda: message in log.read_text() or driver.poll() is not None)
        assert driver.poll() is None, log.read_text()
        install(short_dir / "venv")
        assert driver.wait(timeout=PATIENCE) == 0, log.read_text()
        assert "right: True" in log.read_text()
