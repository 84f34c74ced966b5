"""How many connections there are, and that a server with few serves all who want one."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
from support.clusters import run_driver, starting_ray, system_config
from support.proxy import proxy_to
from support.samples import get, noise, source
from support.servers import Server, valkey_server, wait_until
from support.stores import Store
from support.topologies import cluster_servers

from ray_valkey_spill.config import Config
from ray_valkey_spill.protocol.link import Sharing


def load(url: str, **params: object) -> Config:
    return Config.load({"url": url, **params}, {})


def is_alive(pid: int) -> bool:
    return True


def test_an_io_worker_needs_one_connection_and_the_one_that_keeps_the_node_another(
    server: Server,
) -> None:
    server.client.config_set("maxmemory", 1 << 30)
    with proxy_to(server.port) as proxy:
        store = Store(load(proxy.url, max_bytes=64 << 20), "session", "node")
        data = noise(20 << 20)
        urls, failure = store.put([source(data)])
        assert failure is None
        assert get(store, urls[0]) == data
        assert proxy.connections == proxy.open_connections == 1
        store.renew_lease("", lambda: False)
        store.recover(is_alive)
        store.give_back()
        assert proxy.connections == proxy.open_connections == 2
        # One that must not wait is for a moment.
        store.keep_lease("", lambda: False)
        wait_until(lambda: proxy.open_connections == 2)
        assert proxy.connections == 3
        store.delete(urls)
        store.destroy(is_alive)
        store.close()
    server.client.config_set("maxmemory", 0)


def test_an_idle_io_worker_needs_none(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        store = Store(load(proxy.url), "session", "node", sharing=Sharing(idle=0))
        urls, _ = store.put([source(bytes(1000))])
        store.delete(urls)
        store.close_idle()
        wait_until(lambda: proxy.open_connections == 0)
        store.close()


def write_until_all_have(url: str, writers: int) -> None:
    """Let `writers` put and get until each has done so twice.

    None of them stops before, so that those who came first must make room for the others.
    """
    data = noise(1 << 20)
    done = dict.fromkeys(range(writers), 0)
    failures: list[object] = []

    def write(number: int) -> None:
        config = load(url, max_bytes=512 << 20, retry_timeout=120)
        sharing = Sharing(turn=0.2)
        store = Store(config, "session", f"node{number % 3}", sharing=sharing)
        with contextlib.closing(store):
            while min(done.values()) < 2 and not failures:
                urls, failure = store.put([source(data)])
                if failure is not None or get(store, urls[0]) != data:
                    failures.append(failure)
                store.delete(urls)
                done[number] += 1

    threads = [threading.Thread(target=write, args=[number]) for number in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(done.values()) >= 2
    for number in range(3):
        with contextlib.closing(Store(load(url), "session", f"node{number}")) as store:
            assert store.destroy(is_alive) == 0


@pytest.mark.parametrize(("allowed", "writers"), [(4, 8), (20, 24)])
def test_nobody_starves_with_fewer_connections_than_writers(allowed: int, writers: int) -> None:
    with valkey_server() as server:
        # One of them is this test's.
        server.client.config_set("maxclients", allowed)
        write_until_all_have(server.url, writers)
        assert server.client.info("stats")["rejected_connections"] > 0
        assert server.spilled_keys() == []


def test_nobody_starves_while_others_hold_what_it_needs_of_several_shards(tmp_path: Path) -> None:
    """Two writers of which each has the last connection of a shard that the other one needs."""
    with cluster_servers(tmp_path, replicas=0) as cluster:
        for node in cluster.primaries():
            clients = node.client.info("clients")
            used = clients["connected_clients"] + clients.get("cluster_connections", 0)
            node.client.config_set("maxclients", used + 1)
        write_until_all_have(cluster.url, 4)
        refused = [
            node.client.info("stats")["rejected_connections"] for node in cluster.primaries()
        ]
        assert sum(refused) > 0
        assert cluster.spilled_keys() == []


def test_ray_spills_and_restores_with_few_connections(short_dir: Path) -> None:
    with valkey_server() as server:
        # One of them is this test's.
        server.client.config_set("maxclients", 3)
        config = system_config(server.url, io_workers=2)
        script = f"""
import numpy as np
{starting_ray(config)}
refs = [ray.put(np.full(1 << 20, i, np.uint64)) for i in range(40)]
print("restored", sum(int(ray.get(ref)[0]) for ref in refs))
ray.shutdown()
"""
        assert f"restored {sum(range(40))}" in run_driver(script)
        assert server.client.info("stats")["rejected_connections"] > 0
