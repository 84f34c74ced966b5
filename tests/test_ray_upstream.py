"""What Ray expects of any storage; docs/upstream.md tells which test covers what."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from packaging.version import Version
from ray._private.internal_api import memory_summary
from ray.exceptions import ObjectLostError, RayActorError
from support.clusters import (
    MIB,
    OBJECT_STORE,
    RETRIED_SOON,
    cluster_with,
    expect_no_keys,
    kill,
    kill_node,
    local_ray,
    on,
    run_driver,
    spill,
    starting_ray,
    system_config,
)
from support.proxy import Proxy, proxy_to
from support.servers import INDEX, PATIENCE, Server, valkey_server, wait_until

HERE = Path(__file__).parent

# Each object is spilled by itself, by the only worker that there is for it.
ONE_BY_ONE = {"max_io_workers": 1, "min_spilling_size": 0, "object_store_full_delay_ms": 100}


@pytest.fixture(scope="class")
def _nodes() -> Iterator[Server]:
    with valkey_server() as server:
        server.settle_foreign()
        with cluster_with({**system_config(server.url), **ONE_BY_ONE}, 2):
            yield server
        assert server.our_keys() == []


@pytest.fixture
def nodes(_nodes: Server) -> Iterator[Server]:
    """The server of two nodes, on which nothing is spilled; a test drops what it has spilled."""
    yield _nodes
    expect_no_keys(_nodes)


@pytest.fixture
def own_server() -> Iterator[Server]:
    with valkey_server() as server:
        server.settle_foreign()
        yield server
        assert server.our_keys() == []
        server.assert_foreign_untouched()


@ray.remote(max_retries=0)
def make(i: int) -> np.ndarray:
    return np.full(8 * MIB, i, np.uint8)


@ray.remote(max_retries=0)
def total(*arrays: np.ndarray) -> int:
    return sum(int(array[-1]) for array in arrays)


@ray.remote(num_cpus=0)
class Churn:
    """Makes several times what an object store holds, keeps some of it, and reads what it kept."""

    def run(self, seed: int) -> tuple[int, int]:
        """How many objects are left, and this process's id."""
        random = np.random.default_rng(seed)
        self.kept: dict[int, ray.ObjectRef] = {}
        for i in range(30):
            self.kept[i] = ray.put(np.full(MIB, i))
            if random.random() < 0.4:
                self.kept.pop(int(random.choice(list(self.kept))))
            if random.random() < 0.5 and self.kept:
                chosen = int(random.choice(list(self.kept)))
                assert (ray.get(self.kept[chosen]) == chosen).all()
        for i, ref in self.kept.items():
            assert (ray.get(ref) == i).all()
        return len(self.kept), os.getpid()


def figures() -> tuple[int, int]:
    """How many objects Ray says that it has spilled and restored, on all nodes."""
    summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    found = dict(re.findall(r"(Spilled|Restored) \d+ MiB, (\d+) objects", summary))
    return int(found.get("Spilled", 0)), int(found.get("Restored", 0))


deletes_after_owners = pytest.mark.skipif(
    Version(ray.__version__) < Version("2.51"),
    reason="Ray before 2.51 deletes nothing of an owner that has ended",
)


class TestTwoNodes:
    """On one cluster, for starting one takes longer than most of the tests."""

    def test_an_object_that_is_in_use_is_not_spilled(self, nodes: Server) -> None:
        ref = ray.put(np.full(OBJECT_STORE * 6 // 10, 7, np.uint8))
        held = ray.get(ref)
        others = [ray.put(np.full(MIB, i)) for i in range(12)]
        wait_until(lambda: nodes.spilled_ids() & {other.hex() for other in others})
        assert ref.hex() not in nodes.spilled_ids()
        assert (held == 7).all()
        del held
        spill([ref], nodes)
        assert (ray.get(ref, timeout=PATIENCE) == 7).all()

    @deletes_after_owners
    def test_with_one_io_worker_each_way_puts_gets_and_drops_do_not_block_one_another(
        self,
        nodes: Server,
    ) -> None:
        churns = [Churn.options(**on(node)).remote() for node in (0, 1)]
        results = ray.get([churn.run.remote(i) for i, churn in enumerate(churns)], timeout=PATIENCE)
        assert all(count for count, _ in results)

    def test_what_killed_owners_had_spilled_goes_on_each_node(self, nodes: Server) -> None:
        churns = [Churn.options(**on(node)).remote() for node in (0, 1)]
        results = ray.get([churn.run.remote(i) for i, churn in enumerate(churns)], timeout=PATIENCE)
        assert {m.decode().split(":")[1] for m in nodes.client.zrange(INDEX, 0, -1)} == {
            node["NodeID"] for node in ray.nodes()
        }
        kill(results[0][1])
        ray.kill(churns[1])
        for churn in churns:
            with pytest.raises(RayActorError):
                ray.get(churn.run.remote(0), timeout=PATIENCE)
        expect_no_keys(nodes)

    def test_results_of_one_task_may_exceed_the_object_store(self, nodes: Server) -> None:
        @ray.remote(num_returns=4, max_retries=0)
        def parts() -> list[np.ndarray]:
            return [np.full(OBJECT_STORE // 2, i, np.uint8) for i in range(4)]

        refs = parts.options(**on(1)).remote()
        for i, ref in enumerate(refs):
            assert (ray.get(ref, timeout=PATIENCE) == i).all()

    def test_room_is_made_for_arguments_from_another_node(self, nodes: Server) -> None:
        there = [make.options(**on(1)).remote(i) for i in range(9)]
        ray.wait(there, num_returns=9, fetch_local=False)
        for round_ in range(3):
            arguments = [ray.put(np.full(8 * MIB, round_, np.uint8)) for _ in range(8)]
            assert (
                ray.get(total.options(**on(1)).remote(*arguments), timeout=PATIENCE) == 8 * round_
            )
            del arguments
        wait_until(lambda: nodes.spilled_ids() & {ref.hex() for ref in there})
        assert ray.get(total.options(**on(0)).remote(*there), timeout=PATIENCE) == sum(range(9))

    def test_copies_of_what_another_node_has_are_dropped_and_not_spilled(
        self, nodes: Server
    ) -> None:
        # Below the share at which Ray spills of itself, on either node; more than one node holds.
        refs = [make.options(**on(i % 2)).remote(i) for i in range(16)]
        for _ in range(3):
            for i, ref in enumerate(refs):
                assert int(ray.get(ref, timeout=PATIENCE)[-1]) == i
        assert nodes.spilled_ids() == set()

    def test_rays_own_figures_tell_what_was_spilled_and_restored(self, nodes: Server) -> None:
        spilled, restored = figures()
        # The store holds one of them.
        refs = [ray.put(np.full(60 * MIB, i, np.uint8)) for i in range(4)]
        wait_until(lambda: figures() == (spilled + 3, restored))
        assert int(ray.get(refs[0], timeout=PATIENCE)[-1]) == 0
        wait_until(lambda: figures() == (spilled + 4, restored + 1))

    def test_results_are_awaited_while_others_are_made_and_spilled(self, nodes: Server) -> None:
        @ray.remote(num_cpus=0)
        class Maker:
            async def make(self, i: int) -> np.ndarray:
                return np.full(24 * MIB, i, np.uint8)

        async def gather() -> list[int]:
            maker = Maker.remote()
            refs = [maker.make.remote(i) for i in range(10)]
            return [int((await ref)[-1]) for ref in refs]

        assert asyncio.run(asyncio.wait_for(gather(), 60)) == list(range(10))


@pytest.mark.slow
def test_spilling_begins_at_the_threshold_that_is_set(own_server: Server) -> None:
    config = {**system_config(own_server.url), **ONE_BY_ONE, "object_spilling_threshold": 0.1}
    with cluster_with(config, 1):
        refs = [ray.put(np.full(8 * MIB, i, np.uint8)) for i in range(4)]
        # The store is not a half full.
        wait_until(lambda: own_server.spilled_ids() >= {ref.hex() for ref in refs[:2]})
        assert [int(array[-1]) for array in ray.get(refs, timeout=PATIENCE)] == list(range(4))


@pytest.fixture(scope="class")
def _proxied() -> Iterator[tuple[Server, Proxy]]:
    with valkey_server() as server:
        server.settle_foreign()
        with proxy_to(server.port) as proxy, local_ray(proxy.url):
            yield server, proxy
        assert server.our_keys() == []


@pytest.fixture
def proxy(_proxied: tuple[Server, Proxy]) -> Iterator[Proxy]:
    """On the way of a Ray of which nothing is left spilled; a test drops what it has spilled."""
    server, proxy = _proxied
    yield proxy
    proxy.to_server.delay = 0.0
    expect_no_keys(server)


class TestBehindAProxy:
    @pytest.mark.slow
    def test_connections_that_break_again_and_again_hold_up_nothing_for_long(
        self, proxy: Proxy
    ) -> None:
        refs = []
        for i in range(20):
            refs.append(ray.put(np.full(MIB, i)))
            proxy.reset()
        for i in range(20):
            assert (ray.get(refs[i], timeout=PATIENCE) == i).all()
            proxy.reset()

    @pytest.mark.slow
    def test_a_slow_server_delays_and_loses_nothing(self, proxy: Proxy) -> None:
        proxy.to_server.delay = 0.005
        refs = [ray.put(np.full(MIB, i)) for i in range(15)]
        assert [int(ray.get(ref, timeout=PATIENCE)[-1]) for ref in refs] == list(range(15))


def test_the_system_config_wins_over_the_environment(own_server: Server) -> None:
    script = """
refs = [ray.put(np.full(1 << 20, i)) for i in range(20)]
assert all((ray.get(ref) == i).all() for i, ref in enumerate(refs))
import valkey
print(valkey.Valkey(port=int(sys.argv[1])).zcard("ray:spill:chosen:{chosen}:index"))
ray.shutdown()
"""
    script = starting_ray(system_config(own_server.url, namespace="chosen")) + script
    passed_over = json.dumps({"type": "valkey", "params": {"url": "valkey://127.0.0.1:1/0"}})
    env = {"RAY_object_spilling_config": passed_over}
    assert int(run_driver(script, str(own_server.port), env=env)) > 0
    assert own_server.our_keys("ray:spill:chosen:") == []


INTERRUPTED = """
refs = [ray.put(np.full(1 << 20, i)) for i in range(20)]
import valkey
print(valkey.Valkey(port={port}).zcard({index!r}), "spilled", flush=True)
os.kill(os.getpid(), {number})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_takes_what_its_ray_had_spilled_with_it(
    own_server: Server, number: signal.Signals
) -> None:
    script = INTERRUPTED.format(port=own_server.port, index=INDEX, number=int(number))
    script = starting_ray(system_config(own_server.url)) + script
    with pytest.raises(AssertionError, match=r"[1-9]\d* spilled"):
        run_driver(script)
    wait_until(lambda: own_server.our_keys() == [])


@pytest.mark.slow
def test_an_object_that_died_with_its_node_is_lost_and_others_are_spilled_still(
    own_server: Server,
) -> None:
    config = {**system_config(own_server.url), **ONE_BY_ONE, **RETRIED_SOON}
    with cluster_with(config, 2) as made:
        ref = make.options(**on(1)).remote(1)
        ray.wait([ref], fetch_local=False)
        kill_node(made, 1)
        with pytest.raises(ObjectLostError):
            ray.get(ref, timeout=PATIENCE)
        others = [ray.put(np.full(MIB, i)) for i in range(20)]
        spill(others[:5], own_server)
        assert [int(ray.get(other, timeout=PATIENCE)[-1]) for other in others] == list(range(20))
        with pytest.raises(ObjectLostError):
            ray.get(ref, timeout=PATIENCE)


def test_every_test_that_the_table_names_exists() -> None:
    table = (HERE.parent / "docs" / "upstream.md").read_text()
    named = set(re.findall(r"`(\w+\.py)::(\w+)`", table))
    assert len(named) > 20
    for file in {file for file, _ in named}:
        tree = ast.parse((HERE / file).read_text())
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert {test for of, test in named if of == file} <= there, file
