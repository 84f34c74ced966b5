"""Which server has which keys: one server, the Sentinels' primary, or a cluster's shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from valkey.crc import VALKEY_CLUSTER_HASH_SLOTS, key_slot

from ray_valkey_spill.config import Endpoint
from ray_valkey_spill.errors import (
    NotValkeyError,
    ServerError,
    ServerRefusedError,
    TransientError,
)
from ray_valkey_spill.protocol.connection import Connection
from ray_valkey_spill.protocol.resp import command, not_now

__all__ = ["Cluster", "Single", "Topology", "cluster_at", "primaries_of"]


@dataclass(frozen=True, slots=True)
class Single:
    """One server has all keys."""

    endpoint: Endpoint

    def owner(self, key: bytes) -> Endpoint:
        return self.endpoint

    @property
    def primaries(self) -> tuple[Endpoint, ...]:
        return (self.endpoint,)


class Cluster:
    """Each primary of a cluster has the keys of some slots.

    Args:
        slots: the reply to CLUSTER SLOTS.
        asked: the node that sent it, which may not know its own host name.

    Raises:
        NotValkeyError: `slots` is not such a reply.
    """

    def __init__(self, slots: Sequence[Any], asked: Endpoint) -> None:
        self._owners: list[Endpoint | None] = [None] * VALKEY_CLUSTER_HASH_SLOTS
        self._ids: dict[Endpoint, bytes] = {}
        self.nodes: set[Endpoint] = set()
        try:
            for first, last, *nodes in slots:
                self._add(first, last, nodes, asked)
        except _MALFORMED as error:
            raise NotValkeyError(
                f"{asked} answers CLUSTER SLOTS, but not as Valkey does ({error})"
            ) from error

    def _add(self, first: int, last: int, nodes: Sequence[Any], asked: Endpoint) -> None:
        if not 0 <= first <= last < VALKEY_CLUSTER_HASH_SLOTS:
            raise ValueError(f"slots {first} to {last}")
        endpoints = [_node(node, asked) for node in nodes]
        self.nodes |= {*endpoints}
        self._ids |= {e: node[2] for e, node in zip(endpoints, nodes) if node[2:]}
        self._owners[first : last + 1] = [endpoints[0]] * (last + 1 - first)

    def owner(self, key: bytes) -> Endpoint:
        """Raise TransientError while no node serves the key's slot."""
        endpoint = self._owners[key_slot(key)]
        if endpoint is None:
            raise not_now(f"CLUSTERDOWN no node serves slot {key_slot(key)}")
        return endpoint

    def move(self, key: bytes, endpoint: Endpoint) -> None:
        """Record that `endpoint` serves the slot of `key`."""
        self._owners[key_slot(key)] = endpoint
        self.nodes.add(endpoint)

    def agrees(self, other: Cluster, nodes: Collection[Endpoint]) -> bool:
        """Whether every slot that `other` gives to one of `nodes` has the same owner here.

        Nodes are compared by id: two nodes may know a third one by different names.
        """
        return all(
            self._id(mine) == other._id(theirs)
            for mine, theirs in zip(self._owners, other._owners)
            if theirs in nodes
        )

    def _id(self, endpoint: Endpoint | None) -> bytes | Endpoint | None:
        return None if endpoint is None else self._ids.get(endpoint, endpoint)

    @property
    def primaries(self) -> tuple[Endpoint, ...]:
        return tuple(sorted({owner for owner in self._owners if owner is not None}))


Topology = Single | Cluster


def cluster_at(node: Connection) -> Cluster:
    """Ask a node for its cluster's slots. Errors as `Connection.read`, and of the command."""
    request = command("CLUSTER", "SLOTS")
    node.add(request)
    while node.read() is not request:
        pass
    return Cluster(request.result(), node.endpoint)


def primaries_of(
    service: str, sentinels: Iterable[Endpoint], connect: Callable[[Endpoint], Connection]
) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Yield each of `sentinels` that knows `service`, and the primary that it names.

    The caller must ask that server for its role (https://valkey.io/topics/sentinel-clients): a
    Sentinel that is cut off from the others may still name the previous primary.

    Args:
        service: name of the service, as in `sentinel monitor`.
        sentinels: the Sentinels to ask, in this order.
        connect: opens a connection to a Sentinel.

    Raises:
        OSError, TransientError: no Sentinel can be reached.
        ServerRefusedError: no Sentinel knows the service, and at least one answered or refused.
    """
    failure: Exception | None = None
    refusal: ServerRefusedError | None = None
    is_known = False
    for sentinel in sentinels:
        try:
            with contextlib.closing(connect(sentinel)) as connection:
                request = command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
                connection.add(request)
                connection.read()
                found = request.result()
                named = _named(found, sentinel) if isinstance(found, list) else None
        except (OSError, TransientError) as error:
            failure = failure or error
        except ServerRefusedError as error:
            refusal = ServerRefusedError(
                f"the Sentinel at {sentinel} refuses ({error.message})", error.hint
            )
        except ServerError as error:
            refusal = ServerRefusedError(
                f"the server at {sentinel} is not a Sentinel ({error.message})",
                "Correct url, or remove sentinel_service",
            )
        else:
            if named is not None:
                is_known = True
                yield sentinel, named
            else:
                refusal = ServerRefusedError(
                    f"the Sentinel at {sentinel} knows no service {service!r}",
                    "Correct url or sentinel_service (SENTINEL MASTERS lists the services)",
                )
    if not is_known:
        reason = refusal or failure
        assert reason is not None
        raise reason


# What the use of a reply of another shape raises.
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError)


def _named(found: Sequence[Any], sentinel: Endpoint) -> Endpoint:
    """Return the server that a Sentinel names. Raises NotValkeyError for another reply."""
    try:
        return _endpoint(found[0].decode(), int(found[1]))
    except _MALFORMED as error:
        raise NotValkeyError(f"{sentinel} names a primary, but not as Valkey does") from error


def _node(told: Sequence[Any], asked: Endpoint) -> Endpoint:
    named = told[0] not in (None, b"", b"?")
    return _endpoint(told[0].decode() if named else asked.host, told[1])


def _endpoint(host: str, port: int) -> Endpoint:
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port {port}")
    return Endpoint(host, port)
