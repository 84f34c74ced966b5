"""Asks the GCS, Ray's head process, whether a session still runs, and which of its nodes do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from ray_valkey_spill.plugin.interpreter import module_command
from ray_valkey_spill.store.liveness import UNKNOWN, UNREACHABLE, RunningSession

__all__ = ["ANSWER_TIMEOUT", "running_at"]

# Seconds until a host has to accept a connection, and a GCS to answer over it.
_CONNECT_TIMEOUT, ANSWER_TIMEOUT = 3.0, 20.0


def running_at(address: str) -> RunningSession | None:
    """Return the session of the GCS at `address` (host:port).

    Returns None if the host refuses the connection, `UNREACHABLE` if it does not answer, and
    `UNKNOWN` if it accepts the connection but does not answer as a GCS.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except ConnectionRefusedError:
        return None
    except (OSError, ValueError, OverflowError):
        return UNREACHABLE
    # In a separate process, because Ray's client ends its process if it cannot connect.
    try:
        answer = subprocess.run(  # noqa: S603 (our own module, and an address)
            module_command(__name__, address),
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return UNKNOWN
    if answer.returncode != 0:
        return UNKNOWN
    name, *nodes = json.loads(answer.stdout.splitlines()[-1])
    return RunningSession(name, frozenset(nodes))


def _main(address: str) -> None:
    from ray._private.ray_constants import KV_NAMESPACE_SESSION
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    client = GcsClient(address=address)
    name = client.internal_kv_get(b"session_name", KV_NAMESPACE_SESSION).decode()
    nodes = client.get_all_node_info(timeout=ANSWER_TIMEOUT)
    alive = GcsNodeInfo.GcsNodeState.Value("ALIVE")
    living = [node.hex() for node, info in nodes.items() if info.state == alive]
    print(json.dumps([name, *living]))  # noqa: T201


if __name__ == "__main__":
    _main(sys.argv[1])
