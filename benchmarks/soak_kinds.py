"""The kinds of server that a soak runs on."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.certificates import make_certificates
from support.hanging import HangingDirectory, can_hang, hanging_directory
from support.rigs import AnyRig, Rig, TopologyRig
from support.servers import Node
from support.tls import tls_binary, tls_node
from support.topologies import cluster_servers, sentinel_servers

from benchmarks.common import MIB
from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.preflight import acl_rules

KEYS = Keyspace.of(Config())


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run's Ray spills to.

    Attributes:
        rig: the servers.
        params: of the spilling config.
        share: the overflow, if there is one.
    """

    rig: AnyRig
    params: dict[str, Any]
    share: HangingDirectory | None = None

    def left(self) -> list[str]:
        """The keys and files of objects, and the metadata of what is stored."""
        keys = [key.decode() for key in self.rig.spilled_keys()]
        if self.share is None:
            return keys
        files = (path for path in self.share.behind.rglob("*") if path.is_file())
        return keys + [str(path) for path in files if not path.name.startswith("place.")]

    def lacks_its_header(self, name: ObjectName) -> bool:
        """Whether a fault has damaged the header of an object, so that nobody knows its owner."""
        return KEYS.header(name) in self.rig.damaged

    def entries(self) -> list[Entry]:
        """The spilled objects, in Valkey and in the overflow."""
        members = self.rig.client.zrange(KEYS.index, 0, -1)
        entries = [Entry.parse(member.decode()) for member in members]
        if self.share is not None:
            with contextlib.closing(OverflowTier(str(self.share.behind), KEYS)) as overflow:
                for owner in overflow.node_names():
                    entries += [file.entry for file in overflow.files(owner)]
        return entries


@contextlib.contextmanager
def _single(directory: Path, seed: int) -> Iterator[Target]:
    with contextlib.closing(Rig(directory / "valkey", seed)) as rig:
        yield Target(rig, {"url": rig.proxy.url})


@contextlib.contextmanager
def _with_overflow(directory: Path, seed: int) -> Iterator[Target]:
    """And with a budget of a few objects."""
    with _single(directory, seed) as single, hanging_directory(directory) as share:
        params = {"overflow_uri": str(share.path), "max_bytes": 100 * MIB}
        yield Target(single.rig, single.params | params, share)


@contextlib.contextmanager
def _sealed(directory: Path, seed: int) -> Iterator[Target]:
    keys = directory / "keys"
    keys.write_text(secrets.token_hex(32))
    with _single(directory, seed) as single:
        yield Target(single.rig, single.params | {"encryption_key_file": str(keys)})


@contextlib.contextmanager
def _tls(directory: Path, seed: int) -> Iterator[Target]:
    """With a user that may do nothing but what spilling needs."""
    certificates = make_certificates(directory / "certificates")
    user = f"ray on >secret {acl_rules(Config.load({}, {}))}"
    password = directory / "password"
    password.write_text("secret")

    def make(path: Path, port: int, config: dict[str, Any]) -> Node:
        return tls_node(path, port, certificates, {**config, "user": user})

    with contextlib.closing(Rig(directory / "server", seed, make)) as rig:
        rig.user = "ray"
        url = f"valkeys://127.0.0.1:{rig.proxy.port}/0"
        params = {"url": url, "username": "ray", "password_file": str(password)}
        yield Target(rig, params | certificates.params())


@contextlib.contextmanager
def _sentinel(directory: Path, seed: int) -> Iterator[Target]:
    with sentinel_servers(directory / "servers") as group:
        params = {"url": group.url, "sentinel_service": group.service, "min_replicas": 1}
        yield Target(TopologyRig(group, seed), params)


@contextlib.contextmanager
def _cluster(directory: Path, seed: int) -> Iterator[Target]:
    with cluster_servers(directory / "servers") as servers:
        yield Target(TopologyRig(servers, seed), {"url": servers.url, "min_replicas": 1})


_MAKERS: dict[str, Callable[[Path, int], AbstractContextManager[Target]]] = {
    "single": _single,
    "cluster": _cluster,
    "overflow": _with_overflow,
    "sentinel": _sentinel,
    "tls": _tls,
    "sealed": _sealed,
}
ALL = frozenset(_MAKERS)
TOPOLOGIES = frozenset({"cluster", "sentinel"})
ONE_SERVER = ALL - TOPOLOGIES


def kinds() -> list[str]:
    """Those that can be had here."""
    lacking = {"tls": tls_binary() is None, "overflow": not can_hang()}
    return [kind for kind in _MAKERS if not lacking.get(kind)]


def target(kind: str, directory: Path, seed: int) -> AbstractContextManager[Target]:
    """Servers of a kind, with their files in a directory; the seed is of what faults choose."""
    return _MAKERS[kind](directory, seed)
