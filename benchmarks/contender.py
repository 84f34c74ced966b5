"""What a contender of `checkouts` runs: the object store of one checkout, and nothing else of it.

`python contender.py distance` or `fleet`, with the checkout in PYTHONPATH. It uses only what every
checkout has that these benchmarks compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray_valkey_spill
from ray_valkey_spill.config import Config
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.store.object_store import ObjectStore

try:
    from ray_valkey_spill.store.node import Node
except ImportError:
    HAS_NODE = False
else:
    HAS_NODE = True

try:
    from ray_valkey_spill.store.reclaim import USUAL_PACE, Owned, Verdict
    from ray_valkey_spill.store.under_way import UNDER_WAY
except ImportError:
    HAS_RECLAIM = False
else:
    HAS_RECLAIM = True

# A node's background work is done by one of them, or, where there is no `Node`, by each.
IO_WORKERS = 8

SESSION = "session_benchmark"
# Nobody listens there, and nobody asks: every lease is fresh.
GCS_ADDRESS = "127.0.0.1:1"
_METADATA, _OWNER = b"PYTHON", b"\x00owner"


def _source(data: memoryview, number: int) -> SourceObject:
    return SourceObject(f"{number:056x}", _METADATA, _OWNER, data)


def _put(store: ObjectStore, sources: list[SourceObject]) -> list[str]:
    urls, failure = store.put(sources)
    if failure is not None:
        raise failure
    return list(urls)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Contender:
    """Spills, restores and deletes objects of node 0, whose data cannot be compressed."""

    def __init__(self) -> None:
        self._store: ObjectStore | None = None
        self._data = memoryview(b"")
        self._target = memoryview(b"")
        self._sources: list[SourceObject] = []
        self._spilled: list[list[str]] = []

    def imported_from(self) -> str:
        return str(ray_valkey_spill.__file__)

    def open(self, params: dict[str, Any], size: int, count: int) -> None:
        """Begin anew with a store that has no connection yet, and `count` objects of `size`."""
        self.close()
        if len(self._data) < size:
            self._data = memoryview(random.Random(0).randbytes(size))
            self._target = memoryview(bytearray(size))
        self._sources = [_source(self._data[:size], number) for number in range(count)]
        self._store = ObjectStore(Config.load(params, {}), SESSION, _node(0))

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def spill(self) -> float:
        """Seconds that putting all objects in one batch takes."""
        return _seconds(lambda: self._spilled.append(_put(self._store, self._sources)))

    def restore(self) -> float:
        """Seconds that finding and filling the first object of the latest batch takes."""
        source = self._sources[0]
        target = self._target[: len(source.data)]

        def run() -> None:
            self._store.fill(self._store.find(self._spilled[-1][0], source.object_id), target)

        seconds = _seconds(run)
        # Python compares memoryviews item by item.
        assert bytes(target) == bytes(source.data)
        target[:8] = bytes(8)
        return seconds

    def delete(self) -> float:
        """Seconds that deleting the latest batch takes."""
        return _seconds(lambda: self._store.delete(self._spilled.pop()))

    def work(self, operation: str, seconds: float) -> float:
        """Spill, and delete what was spilled before, or restore, for so long; bytes a second."""
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            getattr(self, operation)()
            if operation == "spill":
                self._store.delete(self._spilled.pop(0))
            done += sum(len(source.data) for source in self._sources)
        return done / (time.perf_counter() - start)

    def repeat(self, operation: str, times: int) -> None:
        for _ in range(times):
            getattr(self, operation)()


class FleetContender(Contender):
    """Also does what the other nodes of a fleet do, and the background work of one."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: list[ObjectStore] = []
        self._background: list[Any] = []
        # Of reclaiming: nobody waits for the pauses between its passes.
        self._clock = 0.0
        self._reclaimers: list[Any] = []
        self._owners = _NobodyEnded(0)

    # --- other nodes ---

    def populate(
        self, params: dict[str, Any], first: int, last: int, objects: int, busy: bool
    ) -> None:
        """Give each of some nodes a lease and `objects` of 8 bytes, in batches of 1,000.

        With `busy` one IO worker of each was killed in the middle of a spill: that leaves what a
        worker at work has in the metadata.
        """
        config = Config.load(params, {})
        data, zeros = memoryview(bytes(range(8))), memoryview(bytearray(16 << 20))
        for number in range(first, last):
            with contextlib.closing(ObjectStore(config, SESSION, _node(number))) as store:
                for start in range(0, objects, 1000):
                    count = min(1000, objects - start)
                    _put(store, [_source(data, start + i) for i in range(count)])
            if busy:
                _be_killed_while_spilling(config, _node(number), zeros)
        self.renew_leases(params, first, last)

    def renew_leases(self, params: dict[str, Any], first: int, last: int) -> None:
        config = Config.load(params, {})
        for number in range(first, last):
            with contextlib.closing(_background_of(config, _node(number))) as node:
                node.renew_lease(GCS_ADDRESS, lambda: False)

    # --- one node ---

    def open_node(self, params: dict[str, Any], number: int, nodes: int) -> int:
        """Begin a node's IO workers, each of which spills, restores and deletes once.

        Then they are idle. All `nodes` are alive.

        Returns:
            How many processes of the node do its background work.
        """
        config = Config.load(params, {})
        data = memoryview(random.Random(1).randbytes(900 * 1024))
        target = memoryview(bytearray(len(data)))
        name = _node(number)
        self._workers = [ObjectStore(config, SESSION, name) for _ in range(IO_WORKERS)]
        self._background = [_background_of(config, name)] if HAS_NODE else self._workers
        for worker, store in enumerate(self._workers):
            urls = _put(store, [_source(data, worker)])
            store.fill(store.find(urls[0], f"{worker:056x}"), target)
            store.delete(urls)
        if HAS_RECLAIM:
            # The objects are asked for however young they are.
            pace = dataclasses.replace(USUAL_PACE, age=0.0)
            self._owners = _NobodyEnded(nodes)
            self._reclaimers = [
                node.reclaimer(self._owners, pace, lambda: self._clock) for node in self._background
            ]
            _forget_what_was_put(name)
        return len(self._background)

    def background(self, rounds: int, period: float) -> int:
        """Do what the node does every `period` seconds, without waiting between the rounds.

        Returns:
            For how many objects their owners were asked.
        """
        before = self._owners.asked
        for _ in range(rounds):
            for each in self._background:
                each.renew_lease(GCS_ADDRESS, lambda: False)
                each.join_overflow()
                each.room()
                if hasattr(each, "settle_again"):
                    each.settle_again()
                each.recover(lambda pid: True)
                if hasattr(each, "give_back"):
                    each.give_back()
            for each in self._reclaimers:
                each.step()
            self._clock += period
        return self._owners.asked - before

    def close_node(self) -> None:
        for each in {id(each): each for each in (*self._workers, *self._background)}.values():
            each.close()
        self._workers, self._background, self._reclaimers = [], [], []

    # --- a head ---

    def import_ray(self) -> None:
        ray_valkey_spill.ValkeyStorage  # noqa: B018 (imported when asked for)

    def head_start(self, params: dict[str, Any]) -> float:
        """Seconds that Ray's validation takes at a head start, without the imports."""
        # Of the session that is there: for those of others it would start a clean-up.
        storage = ray_valkey_spill.ValkeyStorage
        return _seconds(lambda: storage("f" * 56, SESSION, **params))


def _node(number: int) -> str:
    return f"{number:056x}"


def _background_of(config: Config, node: str) -> Any:
    """What renews the lease of a node."""
    return (Node if HAS_NODE else ObjectStore)(config, SESSION, node)


class _NobodyEnded:
    """The owners of a session in which every node is alive and every object referenced."""

    def __init__(self, nodes: int) -> None:
        self.asked = 0
        self._nodes = {_node(number): True for number in range(nodes)}

    def nodes(self) -> Mapping[str, bool]:
        return self._nodes

    def verdicts(self, wanted: Sequence[Owned]) -> list[Verdict]:
        self.asked += len(wanted)
        return [Verdict.REFERENCED] * len(wanted)


def _forget_what_was_put(node: str) -> None:
    """Do as if a node's objects were put more than a minute ago: until then it looks after them."""
    if hasattr(UNDER_WAY, "put_lately"):
        UNDER_WAY.are_settled(UNDER_WAY.put_lately((SESSION, node)), time.monotonic() + 3600)


def _be_killed_while_spilling(config: Config, node: str, zeros: memoryview) -> None:
    """Let a process begin to spill two objects, and be killed as it reads the second.

    That one's memory is mapped from a file that has become shorter. The first, `zeros`, is longer
    than what is packed ahead of the network, and takes little room.
    """
    process = os.fork()
    if not process:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with tempfile.TemporaryFile() as file:
                file.truncate(mmap.PAGESIZE)
                gone = mmap.mmap(file.fileno(), mmap.PAGESIZE)
                file.truncate(0)
                sources = [_source(zeros, 0), _source(memoryview(gone), 1)]
                ObjectStore(config, SESSION, node).put(sources)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), status


if __name__ == "__main__":
    # By its path it has a name of its own, whatever the checkout has in its `benchmarks`.
    from serving import serve

    serve({"distance": Contender, "fleet": FleetContender}[sys.argv[1]]())
