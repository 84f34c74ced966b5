"""A cluster started with the plain tools: `ray start`, twice, and a driver that connects."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from clusters import ray_start, run_driver
from servers import valkey_server, wait_until

import ray_valkey_spill
from ray_valkey_spill.gcs import running_at

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
