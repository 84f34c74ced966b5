"""Real servers of each kind that faults can strike: one behind a proxy, a cluster, Sentinels."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import valkey

from support.proxy import Proxy, proxy_to
from support.servers import BOOKS, OF_THE_LIVING, Node, free_port, wait_until
from support.topologies import Cluster, SentinelGroup

MakeNode = Callable[[Path, int, dict[str, Any]], Node]


class AnyRig:
    """What faults strike, of whatever kind.

    Attributes:
        client: of the server; of a cluster, one that finds the shard of a key.
        random: for what faults choose.
        user: the name of the user that Ray connects as.
        damaged: the keys of objects that faults have destroyed or altered.
    """

    client: Any
    random: random.Random
    user = "default"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.damaged: set[str] = set()

    @property
    def clients(self) -> list[Any]:
        """One of each server that lives."""
        raise NotImplementedError

    @property
    def ports(self) -> set[int]:
        """Where Ray connects to."""
        raise NotImplementedError

    def our_keys(self) -> list[bytes]:
        return sorted(self.client.keys("ray:*"))

    def spilled_keys(self) -> list[bytes]:
        """All but those that tell who lives."""
        return [key for key in self.our_keys() if not key.endswith(OF_THE_LIVING)]

    def data_keys(self) -> list[bytes]:
        """Those of objects."""
        return [key for key in self.our_keys() if not key.endswith(BOOKS)]

    def disconnect(self) -> int:
        """Have the servers close all connections but those of `clients`; returns how many."""
        return sum(each.client_kill_filter(_type="normal", skipme=True) for each in self.clients)

    def flush(self) -> None:
        """Remove everything."""
        self.client.flushall()

    def errors(self, name: str) -> int:
        """How often the servers have answered with the error `name` since they were started."""
        found = (each.info("errorstats") for each in self.clients)
        return sum(each.get(f"errorstat_{name}", {"count": 0})["count"] for each in found)

    def rejected(self) -> int:
        """How many connections the servers have rejected since they were started."""
        return sum(each.info("stats")["rejected_connections"] for each in self.clients)


def plain_node(directory: Path, port: int, config: dict[str, Any]) -> Node:
    return Node(directory, port, config)


class Rig(AnyRig):
    """A server that can be restarted, and the proxy that its clients connect to.

    Its data lie in memory alone, but for faults that save them.

    Args:
        directory: for the server's files.
        seed: of what faults choose at random.
        make: the server.
    """

    def __init__(self, directory: Path, seed: int = 0, make: MakeNode = plain_node) -> None:
        self._directory = directory
        self._make = make
        super().__init__(seed)
        self.node = self._new_node("primary")
        self._start()
        self._proxy = proxy_to(self.node.port)
        self.proxy: Proxy = self._proxy.__enter__()

    def close(self) -> None:
        self._proxy.__exit__(None, None, None)
        self.client.close()
        self.node.close()

    @property
    def clients(self) -> list[Any]:
        return [self.client]

    @property
    def ports(self) -> set[int]:
        return {self.proxy.port}

    def _new_node(self, name: str) -> Node:
        data = self._directory / name / "data"
        data.mkdir(parents=True)
        config = {"dir": data, "enable_protected_configs": True, "repl_diskless_sync_delay": 0}
        return self._make(self._directory / name, free_port(), config)

    def _start(self, ready: bool = True, **config: Any) -> None:
        arguments = [word for key, value in config.items() for word in (f"--{key}", str(value))]
        self.node.start(*arguments)
        if ready:
            wait_until(self.node.serves)
        self.client = patient_client(self.node)

    def restart(self, ready: bool = True, **config: Any) -> None:
        """Kill the server if it runs, and start one with what is in its directory."""
        self.client.close()
        self.node.kill()
        self._start(ready, **config)

    def restart_empty(self) -> None:
        self.client.close()
        self.node.kill()
        data = self._directory / "primary" / "data"
        shutil.rmtree(data)
        data.mkdir()
        self._start()

    def save(self) -> None:
        """Shut the server down, with all its data saved to disk."""
        with contextlib.suppress(valkey.ConnectionError):
            self.client.shutdown(save=True)
        assert self.node.process is not None
        self.node.process.wait()

    def signal(self, number: int) -> None:
        assert self.node.process is not None
        self.node.process.send_signal(number)

    @contextlib.contextmanager
    def lagging_replica(self) -> Iterator[Node]:
        """A replica that has all there was a moment ago, and not what came since."""
        with self.replica() as (replica, replication):
            replication.to_client.stall()
            wait_until(lambda: _offset(replica.client) < _offset(self.client))
            yield replica

    def catch_up(self, replica: Node) -> None:
        """Wait until a replica has all that there is."""
        wait_until(lambda: _offset(replica.client) == _offset(self.client))

    @contextlib.contextmanager
    def replica(self) -> Iterator[tuple[Node, Proxy]]:
        """A replica, and the proxy through which it hears of the primary."""
        directory = self._directory / "replica"
        replica = self._new_node("replica")
        with proxy_to(self.node.port) as replication, contextlib.closing(replica):
            replica.start()
            wait_until(replica.serves)
            replica.client.replicaof("127.0.0.1", replication.port)
            wait_until(lambda: replica.client.info("replication")["master_link_status"] == "up")
            yield replica, replication
        shutil.rmtree(directory)


def _offset(client: Any) -> int:
    """How much of the replication stream the server has."""
    return int(client.info("replication")["master_repl_offset"])


def patient_client(node: Node) -> Any:
    """One that waits for every reply, however long it takes, and sends nothing twice."""
    pool = node.client.connection_pool
    options = {**pool.connection_kwargs, "socket_timeout": None, "retry": None}
    options["retry_on_error"] = []
    return valkey.Valkey(
        connection_pool=valkey.ConnectionPool(connection_class=pool.connection_class, **options)
    )


class TopologyRig(AnyRig):
    """Several servers, to each of which clients connect by themselves."""

    def __init__(self, servers: Cluster | SentinelGroup, seed: int) -> None:
        super().__init__(seed)
        self.servers = servers

    @property
    def client(self) -> Any:  # type: ignore[override]
        return self.servers.client

    @property
    def clients(self) -> list[Any]:
        return [node.client for node in self.servers.nodes if node.alive]

    @property
    def ports(self) -> set[int]:
        return {node.port for node in self.servers.nodes}

    def our_keys(self) -> list[bytes]:
        return self.servers.our_keys("ray:")

    def flush(self) -> None:
        self.servers.flush()

    def primaries(self) -> list[Node]:
        if isinstance(self.servers, Cluster):
            return self.servers.primaries()
        return [self.servers.primary()]

    def a_primary(self) -> Node:
        return self.random.choice(self.primaries())

    def replica_of(self, primary: Node) -> Node:
        if isinstance(self.servers, Cluster):
            return self.servers.replicas_of(primary)[0]
        return self.servers.replicas()[0]

    def wait_until_followed(self, primary: Node) -> None:
        """Until another has become the primary in its place."""
        if isinstance(self.servers, Cluster):
            followers = [node for node in self.servers.nodes if node is not primary]
            shards = len(self.servers.nodes) // 2
            wait_until(lambda: sum(_is_primary(node) for node in followers) == shards)
        else:
            self.servers.wait_until_followed(primary)


def _is_primary(node: Node) -> bool:
    return node.alive and node.client.info("replication")["role"] == "master"
