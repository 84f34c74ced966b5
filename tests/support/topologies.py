"""Real clusters, and primaries with replicas that Sentinels watch."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import valkey
from valkey.cluster import ClusterNode, ValkeyCluster
from valkey.crc import key_slot

from support.certificates import Certificates
from support.servers import Contents, Node, free_port, free_ports, wait_until
from support.tls import tls_client, tls_node

SLOTS = 16384

# Seconds, with some to spare, after which a failover by hand is given up (CLUSTER_MF_TIMEOUT).
_FAILOVER_TIMEOUT = 10.0

_REPLICATION = {
    # Replicas get their copy at once, not after five seconds in which others might join them.
    "repl_diskless_sync_delay": 0,
    # A node that is started again has what it saved itself, and not the copy it once was sent.
    "rdb_del_sync_files": True,
    # What is not written to tells only with this that it is in sync.
    "repl_ping_replica_period": 1,
}


# --- clusters ---


@dataclass(frozen=True)
class Cluster(Contents):
    """A cluster whose nodes can be killed, and its slots moved.

    Attributes:
        nodes: its first primaries, then their replicas in the same order.
        client: one of the whole cluster.
        tls: whether it speaks TLS alone.
    """

    nodes: list[Node]
    client: ValkeyCluster
    tls: bool = False

    @property
    def url(self) -> str:
        return _url(self.nodes, self.tls)

    def keys(self, pattern: str = "*") -> list[bytes]:
        return sorted(key for node in self.primaries() for key in node.client.keys(pattern))

    def flush(self) -> None:
        for node in self.primaries():
            node.client.flushall()

    def primaries(self) -> list[Node]:
        """Those that live and have slots, as they say themselves."""
        return [node for node in _alive(self.nodes) if _me(node)["slots"]]

    def primary_of(self, key: str | bytes) -> Node:
        """The primary that serves `key`; waits for the failover if there is none."""
        return self._owner(key_slot(_bytes(key)))

    def replicas_of(self, node: Node) -> list[Node]:
        """Those that live and follow `node`."""
        identity = _identity(node)
        return [other for other in _alive(self.nodes) if _me(other)["master_id"] == identity]

    def kill(self, node: Node) -> None:
        node.kill()

    def restart(self, node: Node) -> None:
        """Start it again; whether it has its data is for its configuration to say."""
        node.start()
        wait_until(node.serves)

    def failover(self, node: Node, how: str = "") -> None:
        """Make a primary of a replica, in agreement with its primary, by FORCE or by TAKEOVER."""
        # A replica gives up a failover that takes five seconds, as on a busy machine.
        given_up_at = 0.0

        def is_done() -> bool:
            nonlocal given_up_at
            if _me(node)["slots"]:
                return True
            if time.monotonic() > given_up_at:
                try:
                    node.client.execute_command("CLUSTER FAILOVER", *how.split())
                except valkey.ResponseError:
                    # A primary refuses it; it may have become one since.
                    if not _me(node)["slots"]:
                        raise
                given_up_at = time.monotonic() + _FAILOVER_TIMEOUT
            return False

        wait_until(is_done)
        wait_until(lambda: _agree(_alive(self.nodes)))

    def migrate_slot(self, slot: int, to: Node) -> None:
        """Move a slot with all its keys to another primary."""
        for _ in self.migration(slot, to):
            pass

    def migration(self, slot: int, to: Node, step: int = 1) -> Iterator[int]:
        """Move a slot as far as the iterator is driven; it gives how many keys have gone.

        The first is 0, with the slot migrating. Then come `step` keys at a time; the slot belongs
        to its new primary when the iterator ends.
        """
        source = self._owner(slot)
        to.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", _identity(source))
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", _identity(to))
        moved = 0
        yield moved
        while keys := source.client.execute_command("CLUSTER GETKEYSINSLOT", slot, step):
            source.client.migrate("127.0.0.1", to.port, keys, destination_db=0, timeout=10_000)
            moved += len(keys)
            yield moved
        # The new owner first: else the slot would have none, should this end in between.
        for node in (to, source):
            node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", _identity(to))
        wait_until(lambda: _agree(_alive(self.nodes)))

    def wait_until_whole(self) -> None:
        """Until all living nodes serve and agree who has which slot, and replicas are in sync."""
        wait_until(lambda: _is_whole(_alive(self.nodes)))

    def _owner(self, slot: int) -> Node:
        def owners() -> list[tuple[int, Node]]:
            claims = [(_me(node), node) for node in _alive(self.nodes)]
            return [(int(me["epoch"]), node) for me, node in claims if _has(me, slot)]

        wait_until(owners)
        # One that was away does not know yet that it has been followed.
        return max(owners(), key=lambda owner: owner[0])[1]


@contextlib.contextmanager
def cluster_servers(
    directory: Path,
    primaries: int = 3,
    replicas: int = 3,
    certificates: Certificates | None = None,
    **config: Any,
) -> Iterator[Cluster]:
    """A cluster whose slots are spread evenly, and its replicas over the primaries.

    Args:
        directory: for the nodes' files.
        certificates: if given, all speak TLS alone.
        config: of each node, as in valkey.conf, with underscores for dashes.
    """
    number = primaries + replicas
    ports = free_ports(2 * number)
    common = {"cluster_enabled": True, "cluster_node_timeout": 1500, **_REPLICATION, **config}
    if certificates is not None:
        common["tls_cluster"] = True
    nodes = [
        # By default the bus would have a port that might not be free.
        _node(directory / str(port), port, {**common, "cluster_port": bus}, certificates)
        for port, bus in zip(ports[:number], ports[number:])
    ]
    with _running(nodes):
        _join(nodes, ports[number:], primaries)
        addresses = [ClusterNode("127.0.0.1", node.port) for node in nodes]
        options = {} if certificates is None else tls_client(certificates)
        with contextlib.closing(ValkeyCluster(startup_nodes=addresses, **options)) as client:
            yield Cluster(nodes, client, certificates is not None)


def _join(nodes: list[Node], buses: list[int], primaries: int) -> None:
    bounds = [SLOTS * i // primaries for i in range(primaries + 1)]
    for i, node in enumerate(nodes[:primaries]):
        # Else all have the same, and first quarrel about it.
        node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
        node.client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
    # Each with each: gossip would take its time.
    for i, node in enumerate(nodes):
        for other, bus in zip(nodes[:i], buses[:i]):
            node.client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus)
    identities = {_identity(node) for node in nodes}
    wait_until(lambda: all(_known(node) == identities for node in nodes))
    for i, node in enumerate(nodes[primaries:]):
        primary = _identity(nodes[i % primaries])
        node.client.execute_command("CLUSTER REPLICATE", primary)
    wait_until(lambda: _is_whole(nodes))


def _identity(node: Node) -> str:
    return _text(node.client.execute_command("CLUSTER MYID"))


def _known(node: Node) -> set[str]:
    """The nodes whose hands it has shaken."""
    others = node.client.cluster("NODES").values()
    return {other["node_id"] for other in others if "handshake" not in other["flags"]}


def _me(node: Node) -> dict[str, Any]:
    """The node's own line of its CLUSTER NODES."""
    lines = node.client.cluster("NODES").values()
    return next(line for line in lines if "myself" in line["flags"])


def _is_whole(nodes: list[Node]) -> bool:
    if not (
        all(node.client.cluster("INFO")["cluster_state"] == "ok" for node in nodes)
        and _agree(nodes)
    ):
        return False
    by_identity = {_identity(node): node for node in nodes}
    followed = {node: by_identity.get(_me(node)["master_id"]) for node in nodes}
    return all(
        _in_sync(node, primary) if primary else _is_primary(node)
        for node, primary in followed.items()
    )


def _agree(nodes: list[Node]) -> bool:
    """Whether they think the same of each other, and that all of them live."""
    views = {_view(node, nodes) for node in nodes}
    return len(views) == 1 and not any(failing for *_, failing in next(iter(views)))


def _view(node: Node, nodes: list[Node]) -> frozenset[tuple[str, str, str, bool]]:
    """What a node thinks of each of `nodes`: whom it follows, its slots, whether it is failing."""
    ports = {str(other.port) for other in nodes}
    return frozenset(
        (
            line["node_id"],
            line["master_id"],
            str(line["slots"]),
            not {"fail", "fail?"}.isdisjoint(line["flags"].split(",")),
        )
        for address, line in node.client.cluster("NODES").items()
        if address.rsplit(":", 1)[1] in ports
    )


def _has(line: Mapping[str, Any], slot: int) -> bool:
    return any(int(slots[0]) <= slot <= int(slots[-1]) for slots in line["slots"])


# --- Sentinels ---


@dataclass(frozen=True)
class SentinelGroup(Contents):
    """A primary with replicas, and the Sentinels that watch them.

    Attributes:
        service: the name that the Sentinels have for them.
        nodes: the first primary, then its replicas.
        tls: whether all speak TLS alone.
    """

    service: str
    nodes: list[Node]
    sentinels: list[Node]
    tls: bool = False

    @property
    def client(self) -> valkey.Valkey:
        """The primary's."""
        return self.primary().client

    @property
    def url(self) -> str:
        """Of the Sentinels."""
        return _url(self.sentinels, self.tls)

    def primary(self) -> Node:
        """The one that all Sentinels name; waits until they name the same."""
        named: set[int] = set()

        def one_is_named() -> bool:
            named.clear()
            named.update(self._named_by(sentinel) for sentinel in _alive(self.sentinels))
            return len(named) == 1

        wait_until(one_is_named)
        return next(node for node in self.nodes if node.port in named)

    def replicas(self) -> list[Node]:
        """Those that live and are not the primary."""
        primary = self.primary()
        return [node for node in _alive(self.nodes) if node is not primary]

    def kill_primary(self) -> Node:
        """The one that was."""
        primary = self.primary()
        primary.kill()
        return primary

    def failover(self) -> None:
        """Have the Sentinels follow another primary, though this one is well.

        The first of them hears of it after the others.
        """
        old, asked = self.primary(), self.sentinels[0].client

        def is_done() -> bool:
            is_under_way = "failover" in asked.sentinel_master(self.service)["flags"]
            if self.primary() is not old:
                return True
            if not is_under_way:
                # Not yet, or given up: on a machine that is busy it has not heard of any replica.
                with contextlib.suppress(valkey.ResponseError):
                    asked.sentinel_failover(self.service)
            return False

        wait_until(is_done)
        # Meanwhile they may have followed that one too, even by the old one.
        wait_until(lambda: _is_primary(self.primary()))

    def wait_until_followed(self, node: Node) -> None:
        """Until another than `node` is the primary, and takes writes."""
        wait_until(lambda: (new := self.primary()) is not node and _is_primary(new))

    def restart(self, node: Node) -> None:
        """Start it again as a replica, as who runs such servers has to.

        Without that it would be a primary for the eight seconds after which Sentinels see to it.
        """
        node.start("--replicaof", "127.0.0.1", str(self.primary().port))
        wait_until(node.serves)

    def wait_until_whole(self) -> None:
        """Until all living nodes but the primary follow it in sync, and the Sentinels know that."""
        wait_until(self._is_whole)

    def _named_by(self, sentinel: Node) -> int:
        _, port = sentinel.client.sentinel_get_master_addr_by_name(self.service)
        return int(port)

    def _is_whole(self) -> bool:
        primary, replicas = self.primary(), self.replicas()
        return (
            _is_primary(primary)
            and all(_in_sync(node, primary) for node in replicas)
            and all(self._knows(sentinel, replicas) for sentinel in _alive(self.sentinels))
        )

    def _knows(self, sentinel: Node, replicas: list[Node]) -> bool:
        primary = sentinel.client.sentinel_master(self.service)
        known = sentinel.client.sentinel_slaves(self.service)
        well = {replica["port"] for replica in known if replica["flags"] == "slave"}
        return (
            primary["flags"] == "master"
            and primary["num-other-sentinels"] == len(self.sentinels) - 1
            and well >= {node.port for node in replicas}
        )


@contextlib.contextmanager
def sentinel_servers(
    directory: Path,
    replicas: int = 1,
    sentinels: int = 3,
    certificates: Certificates | None = None,
    **config: Any,
) -> Iterator[SentinelGroup]:
    """A primary with replicas, and Sentinels two of which have to agree that it is gone.

    Args:
        directory: for the servers' files.
        certificates: if given, all speak TLS alone.
        config: of the primary and the replicas, as in valkey.conf, with underscores for dashes.
    """
    service = "spill"
    ports = free_ports(1 + replicas + sentinels)
    common = {**_REPLICATION, **config}
    nodes = [
        _node(directory / str(port), port, common, certificates) for port in ports[: 1 + replicas]
    ]
    watchers = [
        _node(
            directory / str(port),
            port,
            _watch(i, service, nodes[0].port),
            certificates,
            arguments=["--sentinel"],
        )
        for i, port in enumerate(ports[1 + replicas :])
    ]
    with _running(nodes), _running(watchers):
        for node in nodes[1:]:
            node.client.replicaof("127.0.0.1", nodes[0].port)
        group = SentinelGroup(service, nodes, watchers, certificates is not None)
        for sentinel in watchers:
            _quicken(sentinel)
        group.wait_until_whole()
        yield group


@contextlib.contextmanager
def one_sentinel(
    directory: Path, port: int, service: str = "spill", **options: Any
) -> Iterator[Node]:
    """A Sentinel on its own, which is never to agree with itself on a failover."""
    watch = {f"sentinel monitor {service} 127.0.0.1 {port}": 2, **options}
    node = Node(directory, free_port(), watch, arguments=["--sentinel"])
    with contextlib.closing(node):
        node.start()
        wait_until(lambda: _listens(node.port))
        yield node


def _listens(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


def _watch(number: int, service: str, primary: int) -> dict[str, int]:
    """The configuration of a Sentinel.

    One after the other finds that a server is down. If all did so at once each would vote for
    itself, and the next election would be six seconds later.
    """
    return {
        f"sentinel monitor {service} 127.0.0.1 {primary}": 2,
        f"sentinel down-after-milliseconds {service}": 1000 + 300 * number,
        f"sentinel failover-timeout {service}": 3000,
    }


def _quicken(sentinel: Node) -> None:
    """Have a Sentinel look around more often than every one, two and ten seconds.

    Else the group needs seconds to get acquainted, and takes a server that it has to connect to
    again for one that is down.
    """
    periods = {
        "ping-period": 200,
        "ask-period": 200,
        "info-period": 200,
        "publish-period": 200,
        "min-link-reconnect-period": 100,
        # One that a busy machine kept waiting for two seconds would not act for half a minute.
        "tilt-trigger": 60_000,
    }
    arguments = [word for name, ms in periods.items() for word in (name, ms)]
    sentinel.client.execute_command("SENTINEL DEBUG", *arguments)


# --- both ---


def _node(
    directory: Path,
    port: int,
    config: Mapping[str, Any],
    certificates: Certificates | None,
    arguments: Sequence[str] = (),
) -> Node:
    if certificates is None:
        return Node(directory, port, config, arguments=arguments)
    return tls_node(directory, port, certificates, config, arguments)


@contextlib.contextmanager
def _running(nodes: Iterable[Node]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for node in nodes:
            stack.enter_context(contextlib.closing(node))
            node.start()
        for node in nodes:
            wait_until(node.serves)
        yield


def _alive(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if node.alive]


def _is_primary(node: Node) -> bool:
    return node.alive and _replication(node)["role"] == "master"


def _in_sync(node: Node, primary: Node) -> bool:
    """Whether `node` has what `primary` has, and is sent what it will get."""
    mine, theirs = _replication(node), _replication(primary)
    seen = (value for name, value in theirs.items() if name.startswith("slave"))
    return (
        mine.get("master_port") == primary.port
        and mine["master_link_status"] == "up"
        # Servers before 8.0 send nothing until a replica has acknowledged its copy.
        and any(
            isinstance(one, dict) and one["port"] == node.port and one["offset"] for one in seen
        )
    )


def _replication(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = node.client.info("replication")
    return found


def _url(nodes: Iterable[Node], tls: bool) -> str:
    return f"valkey{'s' if tls else ''}://{','.join(f'127.0.0.1:{node.port}' for node in nodes)}/0"


def _bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _text(reply: str | bytes) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply
