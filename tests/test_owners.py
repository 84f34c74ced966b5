"""What the owners of objects, and the GCS, say of them; on one real cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.core.generated.common_pb2 import Address
from support.clusters import OF_TESTS, ray_with, title
from support.servers import wait_until

from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.plugin.owners import RayOwners, joined
from ray_valkey_spill.store.reclaim import Owned, Verdict

pytestmark = pytest.mark.slow

COUNT = 3


@ray.remote(num_cpus=0)
class Owner:
    def __init__(self) -> None:
        self.refs: list[Any] = []

    def put(self) -> tuple[int, list[tuple[str, bytes]]]:
        """Make objects; returns the process's id, and the objects' ids and owner's address."""
        self.refs = [ray.put(np.full(1000, i)) for i in range(COUNT)]
        return os.getpid(), [(ref.hex(), ref.owner_address()) for ref in self.refs]

    def drop(self) -> None:
        self.refs.clear()


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with ray_with(OF_TESTS):
        yield


@pytest.fixture
def owner(_cluster: None) -> Any:
    return Owner.remote()


def made_by(owner: Any) -> tuple[int, list[Owned]]:
    pid, pairs = ray.get(owner.put.remote())
    return pid, [Owned(*pair) for pair in pairs]


def _is_stopped(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        # A thread that runs on another processor stops a little later.
        wait_until(lambda: all(_is_stopped(task) for task in Path(f"/proc/{pid}/task").iterdir()))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_owner_says_whether_its_objects_are_referenced(owner: Any) -> None:
    _, wanted = made_by(owner)
    owners = RayOwners()
    assert owners.verdicts(wanted) == [Verdict.REFERENCED] * COUNT
    ray.get(owner.drop.remote())
    # Having asked keeps nothing alive.
    wait_until(lambda: owners.verdicts(wanted) == [Verdict.UNREFERENCED] * COUNT)


def test_having_asked_is_no_reference(owner: Any) -> None:
    counts = ray._private.worker.global_worker.core_worker.get_all_reference_counts
    mine = ray.put(b"mine")
    before = counts()
    assert mine.hex().encode() in before
    _, wanted = made_by(owner)
    RayOwners().verdicts(wanted)
    after = counts()
    assert not {owned.object_id.encode() for owned in wanted} & ({*after} - {*before})


def test_an_owner_that_does_not_answer_gives_no_verdict_and_holds_up_no_other(owner: Any) -> None:
    pid, of_stopped = made_by(owner)
    other = Owner.remote()
    _, of_other = made_by(other)
    owners = RayOwners()
    with stopped(pid):
        verdicts = owners.verdicts([*of_stopped, *of_other])
        assert verdicts == [Verdict.UNKNOWN] * COUNT + [Verdict.REFERENCED] * COUNT
    # It is left in peace for a while.
    assert owners.verdicts(of_stopped) == [Verdict.UNKNOWN] * COUNT
    assert RayOwners().verdicts(of_stopped) == [Verdict.REFERENCED] * COUNT
    wait_until(lambda: owners.verdicts(of_stopped) == [Verdict.REFERENCED] * COUNT)


def test_an_owner_is_dead_by_the_word_of_the_gcs_alone(owner: Any) -> None:
    pid, wanted = made_by(owner)
    (gcs,) = [p for p in psutil.Process().children() if "gcs_server" in title(p)]
    with stopped(gcs.pid):
        os.kill(pid, signal.SIGKILL)
        owners = RayOwners()
        assert owners.nodes() is None
        assert owners.verdicts(wanted) == [Verdict.UNKNOWN] * COUNT
    wait_until(lambda: RayOwners().verdicts(wanted) == [Verdict.OWNER_DEAD] * COUNT)


def test_many_owners_that_died_together_are_found_in_one_call(owner: Any) -> None:
    """As with the end of a job."""
    others = [Owner.remote() for _ in range(5)]
    made = ray.get([other.put.remote() for other in others])
    _, of_living = made_by(owner)
    wanted = [Owned(*pair) for _, pairs in made for pair in pairs]
    for pid, _ in made:
        os.kill(pid, signal.SIGKILL)
    # Until the GCS has heard of it.
    wait_until(
        lambda: all(
            RayOwners().verdicts(wanted[first : first + COUNT]) == [Verdict.OWNER_DEAD] * COUNT
            for first in range(0, len(wanted), COUNT)
        ),
        120,
    )
    verdicts = RayOwners().verdicts([*of_living, *wanted])
    assert verdicts == [Verdict.REFERENCED] * COUNT + [Verdict.OWNER_DEAD] * len(wanted)


@pytest.mark.parametrize(
    ("address", "kind"), [("ray://127.0.0.1:10001", "Ray Client"), ("local", "no address")]
)
def test_a_cluster_is_joined_by_an_address_of_its_gcs_alone(address: str, kind: str) -> None:
    """Through Ray Client no owner can be asked, and for "local" Ray would start a new cluster."""
    with pytest.raises(SpillError, match=rf"{kind}.*Give --address"):
        joined(address).__enter__()


def test_whoever_has_taken_over_an_address_does_not_speak_for_its_predecessor(owner: Any) -> None:
    _, wanted = made_by(owner)
    address = Address.FromString(wanted[0].owner_address)
    address.worker_id = secrets.token_bytes(28)
    predecessor = [Owned(each.object_id, address.SerializeToString()) for each in wanted]
    assert RayOwners().verdicts(predecessor) == [Verdict.UNKNOWN] * COUNT


def test_an_owner_on_a_node_that_the_gcs_has_forgotten_is_dead(owner: Any) -> None:
    """It remembers a thousand dead nodes, and each living one."""
    _, wanted = made_by(owner)
    address = Address.FromString(wanted[0].owner_address)
    address.worker_id = secrets.token_bytes(28)
    # The field has another name in earlier versions of Ray.
    node_id = "node_id" if hasattr(address, "node_id") else "raylet_id"
    setattr(address, node_id, secrets.token_bytes(28))
    forgotten = [Owned(each.object_id, address.SerializeToString()) for each in wanted]
    assert RayOwners().verdicts(forgotten) == [Verdict.OWNER_DEAD] * COUNT


@pytest.mark.usefixtures("_cluster")
def test_what_is_no_address_and_no_object_gives_no_verdict() -> None:
    mine = ray.put(1)
    wanted = [
        Owned(mine.hex(), b""),
        Owned(mine.hex(), b"\x00owner"),
        Owned(mine.hex(), Address(ip_address="127.0.0.1", port=1).SerializeToString()),
        Owned("ab", mine.owner_address()),
        Owned(mine.hex(), mine.owner_address()),
    ]
    assert RayOwners().verdicts(wanted) == [Verdict.UNKNOWN] * 4 + [Verdict.REFERENCED]


@pytest.mark.usefixtures("_cluster")
def test_nodes_are_listed_with_whether_they_are_alive() -> None:
    assert RayOwners().nodes() == {ray.get_runtime_context().get_node_id(): True}
