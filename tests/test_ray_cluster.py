"""Two nodes, and nodes, drivers and IO workers that go away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from packaging.version import Version
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from support.clusters import (
    MIB,
    OBJECT_STORE,
    OF_TESTS,
    RETRIED_SOON,
    add_node,
    clean_ups,
    cluster,
    cluster_with,
    expect_no_keys,
    io_workers,
    kill,
    kill_node,
    local_ray,
    on,
    run_driver,
    spill,
    starting_ray,
    system_config,
    talks_to,
    title,
)
from support.servers import BOOKS, INDEX, PATIENCE, ROOT, SOON, Server, valkey_server, wait_until
from support.session_files import shared_files

from ray_valkey_spill.format.names import Keyspace

LEASES = Keyspace(ROOT).leases


@pytest.fixture
def spilling() -> Iterator[Server]:
    """A server of the test's own: what a killed node leaves is looked at after everything else."""
    with a_server() as server:
        yield server


@contextlib.contextmanager
def a_server() -> Iterator[Server]:
    with valkey_server() as server:
        server.settle_foreign()
        yield server
        server.assert_foreign_untouched()


def nodes_of(server: Server) -> set[str]:
    members = server.client.zrange(INDEX, 0, -1)
    return {member.decode().split(":")[1] for member in members}


def data_keys(server: Server, root: str = ROOT) -> set[bytes]:
    return {key for key in server.our_keys(root) if not key.endswith(BOOKS)}


@ray.remote(max_retries=0)
def produce(i: int) -> np.ndarray:
    return np.full(MIB, i)


@ray.remote
def check(i: int, array: np.ndarray) -> bool:
    return bool((array == i).all())


@ray.remote
def split(i: int, parts: int) -> list[np.ndarray]:
    return [np.full(MIB // 2, i * parts + j) for j in range(parts)]


@ray.remote
def merge(*parts: np.ndarray) -> list[int]:
    return sorted(int(part[0]) for part in parts if (part == part[0]).all())


def kill_raylet(cluster: Cluster, number: int) -> None:
    """Kill the raylet alone; what it started ends by itself."""
    node = cluster.list_all_nodes()[number]
    raylet = node.all_processes["raylet"][0].process
    started = psutil.Process(raylet.pid).children()
    node.kill_raylet(check_alive=False)
    raylet.wait()  # not every Ray does, and for its workers a zombie is alive
    assert psutil.wait_procs(started, timeout=PATIENCE)[1] == []
    kill_node(cluster, number)


def terminate_raylet(cluster: Cluster, number: int) -> None:
    """As `ray stop` does it, and a node's drain: the raylet ends in order, and its workers."""
    node = cluster.list_all_nodes()[number]
    raylet = node.all_processes["raylet"][0].process
    raylet.terminate()
    raylet.wait()
    kill_node(cluster, number)


def remove_node(cluster: Cluster, number: int) -> None:
    """As Ray's own tests do it: with a call of `destroy_external_storage` before the node ends."""
    cluster.remove_node(cluster.list_all_nodes()[number])


@pytest.fixture(scope="class")
def shared() -> Iterator[Server]:
    """A server for all tests of a class."""
    with a_server() as server:
        yield server


@pytest.fixture(scope="class")
def _nodes(shared: Server) -> Iterator[Cluster]:
    with cluster(shared.url, nodes=1, io_workers=2) as nodes:
        yield nodes
    # The head's end takes what killed and removed nodes had spilled as well.
    assert shared.our_keys() == []


@pytest.fixture
def nodes(_nodes: Cluster) -> Cluster:
    """Two, the other of which may be a new one."""
    if len(_nodes.list_all_nodes()) == 1:
        add_node(_nodes, 1)
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    return _nodes


@pytest.fixture(scope="class")
def node(shared: Server) -> Iterator[Cluster]:
    with cluster_with({**system_config(shared.url, 2), **RETRIED_SOON}, nodes=1) as node:
        yield node
    assert shared.our_keys() == []


class TestTwoNodes:
    """On one cluster, whose other node a test may do away with. What that had spilled is left."""

    COUNT = 3 * OBJECT_STORE // (8 * MIB)

    def test_spilled_on_one_node_and_read_on_the_other(
        self, shared: Server, nodes: Cluster
    ) -> None:
        count = self.COUNT
        head, other = (node.node_id for node in nodes.list_all_nodes())
        refs = [produce.options(**on(1)).remote(i) for i in range(count)]
        ray.wait(refs, num_returns=count, fetch_local=False)
        wait_until(lambda: other in nodes_of(shared))
        spilled = [ref for ref in refs if ref.hex() in shared.spilled_ids()]
        assert len(spilled) > count // 3
        # Read by tasks on the head, and by the driver there.
        assert all(ray.get([check.options(**on(0)).remote(i, r) for i, r in enumerate(refs)]))
        assert [int(ray.get(ref, timeout=PATIENCE)[0]) for ref in refs] == list(range(count))
        del refs, spilled
        expect_no_keys(shared)
        assert head != other

    def test_removing_a_node_leaves_the_objects_of_the_others(
        self, shared: Server, nodes: Cluster
    ) -> None:
        refs = [ray.put(np.full(MIB, i)) for i in range(30)]
        spill(refs[:10], shared)
        nodes.remove_node(nodes.list_all_nodes()[1])
        assert [int(ray.get(ref, timeout=PATIENCE)[0]) for ref in refs] == list(range(30))

    @pytest.mark.slow
    def test_a_shuffle_is_right_though_a_node_is_removed(
        self, shared: Server, nodes: Cluster
    ) -> None:
        """What the node has spilled is restored elsewhere, and the rest is made again."""
        maps, parts = 16, 5
        ids = [node.node_id for node in nodes.list_all_nodes()]
        half = [
            split.options(
                num_returns=parts,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
            )
            for node_id in ids
        ]
        made = [half[i % 2].remote(i, parts) for i in range(maps)]
        # What one node makes does not fit into its store.
        wait_until(lambda: ids[1] in nodes_of(shared))
        remove_node(nodes, 1)
        merged = [merge.remote(*(made[i][j] for i in range(maps))) for j in range(parts)]
        for j, numbers in enumerate(ray.get(merged, timeout=PATIENCE)):
            assert numbers == [i * parts + j for i in range(maps)]

    @pytest.mark.parametrize(
        "kill_it",
        [kill_node, kill_raylet, terminate_raylet, remove_node],
        ids=["node", "raylet", "terminated", "removed"],
    )
    def test_objects_outlive_the_node_that_spilled_them(
        self, shared: Server, nodes: Cluster, kill_it: Callable[[Cluster, int], None]
    ) -> None:
        refs = [produce.options(**on(1)).remote(i) for i in range(self.COUNT)]
        ray.wait(refs, num_returns=self.COUNT, fetch_local=False)
        numbers = {ref.hex(): number for number, ref in enumerate(refs)}
        # Others may be spilled as well: Ray makes objects of the arguments.
        wait_until(lambda: len(shared.spilled_ids() & numbers.keys()) > self.COUNT // 3)
        spilled = sorted(numbers[i] for i in shared.spilled_ids() & numbers.keys())
        kill_it(nodes, 1)
        for number in spilled:
            assert (ray.get(refs[number], timeout=PATIENCE) == number).all()


HEAD = """
refs = [ray.put(np.full(1 << 20, i)) for i in range(20)]
for process in psutil.Process().children(recursive=True):
    process.kill()
for process in psutil.process_iter(["cmdline"]):
    words = process.info["cmdline"] or [""]
    if "plugin.guardian" in " ".join(words) and words[-1] == str(os.getpid()):
        process.kill()
print("killed", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_head_that_was_killed_and_started_again_removes_what_is_left_of_its_past(
    spilling: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = starting_ray(system_config(spilling.url)) + HEAD
    assert run_driver(script).endswith("killed\n")
    past = data_keys(spilling)
    assert past
    # As if that had been a minute ago: so long does a lease last.
    for lease in spilling.client.zrange(LEASES, 0, -1):
        spilling.client.zincrby(LEASES, -60_000, lease)
    # The working directory has a module that the clean-up must not import.
    (tmp_path / "click.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    with local_ray(spilling.url):
        refs = [ray.put(np.full(MIB, i)) for i in range(30)]
        wait_until(lambda: not past & data_keys(spilling), SOON)
        assert [int(ray.get(ref)[0]) for ref in refs] == list(range(30))
        wait_until(lambda: not clean_ups())
    assert spilling.our_keys() == []


def test_shutdown_takes_all_of_this_session_and_nothing_of_another(spilling: Server) -> None:
    neighbour = b"ray:spill:default:session_x:node_y:00ff.0000000000000000000000000a.0"
    spilling.client.set(neighbour, b"header")
    entry = neighbour.removeprefix(b"ray:spill:default:") + b".1.100"
    spilling.client.zadd(INDEX, {entry: 0})
    with local_ray(spilling.url):
        refs = [ray.put(np.full(MIB, i)) for i in range(30)]
        assert spilling.spilled_ids() > {"00ff"}
        del refs[:5]
    assert spilling.spilled_ids() == {"00ff"}
    assert spilling.our_keys() == [neighbour, INDEX.encode()]


DRIVER = """
import os, sys, numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
refs = [ray.put(np.full(1 << 20, i)) for i in range(40)]
assert all((ray.get(ref) == i).all() for i, ref in enumerate(refs))
print("spilled", flush=True)
if sys.argv[2] == "die":
    os.kill(os.getpid(), 9)
"""


# Ray before 2.51 deletes nothing of a driver's once that has left, not even its own files of the
# filesystem storage: there it goes with the node.
DELETES_AFTER_DRIVERS = Version(ray.__version__) >= Version("2.51")


@pytest.mark.usefixtures("node")
class TestOneNode:
    """On one cluster, after which nothing is left."""

    def test_references_dropped_while_spilling_and_restoring(self, shared: Server) -> None:
        for _ in range(5):
            refs = [ray.put(np.full(MIB, i)) for i in range(25)]
            # Restores are asked for, and not waited for.
            ray.wait(refs, num_returns=1, timeout=0)
            ray.wait(refs[:8], num_returns=8, timeout=0.05)
            del refs
        expect_no_keys(shared)

    def test_a_driver_that_connects_spills_and_leaves_nothing(
        self, shared: Server, node: Cluster
    ) -> None:
        assert "spilled" in run_driver(DRIVER, node.address, "leave")
        if DELETES_AFTER_DRIVERS:
            expect_no_keys(shared)

    def test_a_killed_driver_leaves_nothing(self, shared: Server, node: Cluster) -> None:
        with pytest.raises(AssertionError, match="spilled"):
            run_driver(DRIVER, node.address, "die")
        if DELETES_AFTER_DRIVERS:
            expect_no_keys(shared)

    def test_a_killed_io_worker_loses_nothing(self, shared: Server) -> None:
        refs = [ray.put(np.full(MIB, i)) for i in range(20)]
        for i in range(3):
            # One that is still starting would cost a minute: `worker_register_timeout_seconds`.
            for process in io_workers():
                if talks_to(process, shared.port):
                    kill(process.pid)
            refs += [ray.put(np.full(MIB, 20 + 10 * i + j)) for j in range(10)]
        assert [int(ray.get(ref, timeout=PATIENCE)[0]) for ref in refs] == list(range(50))

    def test_an_io_worker_killed_while_it_restores_wedges_nothing(self, shared: Server) -> None:
        big = ray.put(np.arange(8 * MIB))
        spill([big], shared)

        @ray.remote
        def last(array: np.ndarray) -> int:
            return int(array[-1])

        def restoring() -> list[int]:
            # An idle one may still be starting.
            return [process.pid for process in io_workers() if "ray::RESTORE_" in title(process)]

        # The server stands still, so that the restore is under way for sure when it is killed.
        os.kill(shared.process._process.pid, signal.SIGSTOP)
        try:
            result = last.remote(big)
            wait_until(restoring)
            for pid in restoring():
                kill(pid)
        finally:
            os.kill(shared.process._process.pid, signal.SIGCONT)
        assert ray.get(result, timeout=PATIENCE) == 8 * MIB - 1
        # Not before the end: Ray gives a delete up after four attempts within milliseconds, if
        # their workers are killed.


def test_the_spilling_config_may_come_from_the_environment() -> None:
    """With the password, which reaches every IO worker and is on no command line."""
    script = """
refs = [ray.put(np.full(1 << 20, i)) for i in range(30)]
assert all((ray.get(ref) == i).all() for i, ref in enumerate(refs))
lines = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
assert len(lines) > 4 and not any("s3cret-word" in line for line in lines)
import valkey
client = valkey.Valkey(port=int(sys.argv[1]), password="s3cret-word")
print(client.zcard("ray:spill:elsewhere:{elsewhere}:index"))
ray.shutdown()
"""
    config = {"type": "valkey", "params": {"namespace": "elsewhere"}}
    settings = {**OF_TESTS, "max_io_workers": 1}
    with valkey_server(password="s3cret-word") as server:
        printed = run_driver(
            starting_ray() + script,
            str(server.port),
            env={
                "RAY_object_spilling_config": json.dumps(config),
                "RAY_VALKEY_SPILL_URL": server.url,
                "RAY_VALKEY_SPILL_PASSWORD": "s3cret-word",
                **{f"RAY_{name}": str(int(value)) for name, value in settings.items()},
            },
        )
        assert int(printed) > 0
        assert server.our_keys("ray:spill:elsewhere:") == []


def test_two_clusters_on_one_server_keep_apart(spilling: Server) -> None:
    with local_ray(spilling.url, namespace="first"):
        refs = [ray.put(np.full(MIB, i)) for i in range(30)]
        before = data_keys(spilling, "ray:spill:first:")
        script = """
refs = [ray.put(np.full(1 << 20, i)) for i in range(30)]
ray.shutdown()
"""
        run_driver(starting_ray(system_config(spilling.url, namespace="second")) + script)
        assert spilling.our_keys("ray:spill:second:") == []
        assert before <= data_keys(spilling, "ray:spill:first:")
        assert [int(ray.get(ref, timeout=PATIENCE)[0]) for ref in refs] == list(range(30))
        del refs
    assert spilling.our_keys("ray:spill:first:") == []


@pytest.mark.slow
@pytest.mark.parametrize("is_default", [True, False], ids=["default", "other temp_dir"])
def test_a_node_destroyed_after_its_driver_has_left_gets_no_lease_again(
    spilling: Server, short_dir: Path, is_default: bool
) -> None:
    options = {} if is_default else {"temp_dir": str(short_dir)}
    with cluster_with(system_config(spilling.url), nodes=1, **options) as made:
        session_dir = Path(made.head_node.get_session_dir_path())
        assert session_dir.is_relative_to(short_dir) != is_default
        spill([ray.put(np.full(MIB, i)) for i in range(8)], spilling)
        ray.shutdown()
        made.head_node.destroy_external_storage()
        assert (shared_files(session_dir) / "destroyed").read_text()
        # IO workers still live, and renew a lease each few seconds. One that was spilling meanwhile
        # may have put more, but not without it.
        renewed = [False]

        def looked() -> bool:
            renewed[0] = renewed[0] or LEASES.encode() in spilling.our_keys()
            return renewed[0]

        calls = spilling.client.info("commandstats").get("cmdstat_eval", {}).get("calls", 0)
        wait_until(
            lambda: (
                looked()
                or spilling.client.info("commandstats")["cmdstat_eval"]["calls"] >= calls + 4
            ),
        )
        assert not renewed[0]
