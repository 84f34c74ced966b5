"""Asks the owners of objects, and the GCS, whether anybody still needs the objects.

The owner of an object is the process that created its reference. It answers any process that is
connected to the cluster (Ray 2.60, `ReferenceCounter::FillObjectInformation`). An object that it
does not know any more has no size, no location and no spilled copy in its answer.

All this is internal to Ray. Where a question has another shape, it is not asked again, and one line
in the log says so; then nothing is reclaimed on its answer.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.core.generated import common_pb2, gcs_pb2

from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.store.reclaim import Owned, Verdict

__all__ = ["RayOwners", "joined"]

logger = logging.getLogger("ray_valkey_spill")

# Seconds that an owner has to answer, that all who do not answer may take together in a call, and
# that a call takes until it asks no further owner.
_ANSWER_TIMEOUT, _SILENT_TIMEOUT, _LONGEST_CALL = 2.0, 5.0, 10.0
_NODES_TIMEOUT = 5.0
# Seconds for which an owner that did not answer is not asked again: the first time, on a busy host
# a matter of chance, and at most.
_FIRST_REST, _LONGEST_REST = 5.0, 30.0
# Objects to ask an owner for at once. Ray splits more than ten thousand into several requests, and
# counts the replies to several without a lock (`CoreWorker::GetLocationFromOwner`): for the same
# reason each call is for one owner only. A small number also frees the GIL for others.
_ASKED_TOGETHER = 500
_ID_SIZE = 28
_OBJECT_ID = re.compile(f"[0-9a-f]{{{2 * _ID_SIZE}}}")
# The field has had another name in earlier versions of Ray.
_NODE_ID = "node_id" if "node_id" in common_pb2.Address.DESCRIPTOR.fields_by_name else "raylet_id"
# Owners to remember; the next ones begin anew.
_MOST_REMEMBERED = 10_000

# Questions, as a log names them.
_WHO_NEEDS, _WHO_ENDED = "who needs an object", "which processes have ended"
# What a Ray of another shape raises.
_OTHER_SHAPE = (AttributeError, TypeError, ImportError, LookupError)

_T = TypeVar("_T")


@dataclass
class _Call:
    """The time of a call to `verdicts`: when it began, and how long owners were silent."""

    began: float = field(default_factory=time.monotonic)
    silent: float = 0.0

    def is_over(self, now: float) -> bool:
        return self.silent > _SILENT_TIMEOUT or now - self.began > _LONGEST_CALL


class RayOwners:
    """The owners of the connected Ray session: see `reclaim.Owners`. For one thread."""

    def __init__(self) -> None:
        # The questions for which this Ray has another shape.
        self._off: set[str] = set()
        # Workers and nodes that are dead by the GCS's word, which is final.
        self._dead: set[bytes] = set()
        # By worker id: when it may be asked again, and the seconds that it rests until then.
        self._silent: dict[bytes, tuple[float, float]] = {}
        # What Ray takes for `_ANSWER_TIMEOUT`: see `_ask`.
        self._timeout = int(1000 * _ANSWER_TIMEOUT)

    def nodes(self) -> Mapping[str, bool] | None:
        """As `Owners.nodes`; None also where Ray has another shape."""
        nodes = self._tried("which nodes are alive", _nodes, None)
        if nodes is not None:
            # Ids come back where somebody chooses them.
            self._dead -= {bytes.fromhex(node) for node, is_alive in nodes.items() if is_alive}
        return nodes

    def verdicts(self, wanted: Sequence[Owned]) -> list[Verdict]:
        """As `Owners.verdicts`."""
        found = [Verdict.UNKNOWN] * len(wanted)
        by_owner: dict[bytes, list[int]] = {}
        for number, (object_id, owner) in enumerate(wanted):
            if _OBJECT_ID.fullmatch(object_id):
                by_owner.setdefault(owner, []).append(number)
        call = _Call()
        # In any order, so that those for whom no time is left are others the next time.
        for owner in random.sample([*by_owner], len(by_owner)):
            numbers = by_owner[owner]
            address = _address(owner)
            if address is None or _WHO_NEEDS in self._off:
                continue
            for start in range(0, len(numbers), _ASKED_TOGETHER):
                some = numbers[start : start + _ASKED_TOGETHER]
                ids = [wanted[number].object_id for number in some]
                verdicts = self._of_owner(address, owner, ids, call)
                for number, verdict in zip(some, verdicts):
                    found[number] = verdict
        return found

    def _of_owner(
        self, address: Any, owner: bytes, object_ids: Sequence[str], call: _Call
    ) -> list[Verdict]:
        """Return the verdicts of one owner."""
        unknown = [Verdict.UNKNOWN] * len(object_ids)
        dead = [Verdict.OWNER_DEAD] * len(object_ids)
        worker = bytes(address.worker_id)
        node = bytes(getattr(address, _NODE_ID))
        if {worker, node} & self._dead:
            return dead
        began = time.monotonic()
        until, rest = self._silent.get(worker, (0.0, 0.0))
        if began < until or call.is_over(began):
            return unknown
        verdicts = self._tried(_WHO_NEEDS, lambda: self._ask(owner, object_ids), None)
        if verdicts is not None:
            self._silent.pop(worker, None)
            return verdicts
        if self._is_dead(worker, node):
            self._silent.pop(worker, None)
            return dead
        now = time.monotonic()
        call.silent += now - began
        if len(self._silent) >= _MOST_REMEMBERED:
            self._silent.clear()
        rest = min(max(_FIRST_REST, 2 * rest), _LONGEST_REST)
        self._silent[worker] = now + rest, rest
        return unknown

    def _ask(self, owner: bytes, object_ids: Sequence[str]) -> list[Verdict] | None:
        """Ask an owner that lives; returns None if it did not answer for all objects."""
        began = time.monotonic()
        try:
            return _ask(owner, object_ids, self._timeout)
        except ray.exceptions.GetTimeoutError:
            # Earlier versions of Ray take the milliseconds for microseconds
            # (`CoreWorker::GetLocationFromOwner`).
            if time.monotonic() - began > _ANSWER_TIMEOUT / 10:
                raise
        self._timeout = int(1_000_000 * _ANSWER_TIMEOUT)
        return _ask(owner, object_ids, self._timeout)

    def _is_dead(self, worker: bytes, node: bytes) -> bool:
        """Whether an owner that has not answered is dead by the GCS's word, itself or its node."""
        if len(self._dead) >= _MOST_REMEMBERED:
            self._dead.clear()
        # The nodes first: that question has a time-out, so the GCS answers.
        nodes = self.nodes()
        if nodes is None:
            return False
        # A node is known to the GCS before its processes exist. In the end it forgets a dead one
        # (`maximum_gcs_dead_node_cached_count`).
        has_own = nodes.get(self._tried("which node this is", _own_node, ""))
        if not nodes.get(node.hex(), not has_own):
            self._dead.add(node)
            return True
        if self._tried(_WHO_ENDED, lambda: _has_ended(worker), False):
            self._dead.add(worker)
            return True
        return False

    def _tried(self, question: str, ask: Callable[[], _T], otherwise: _T) -> _T:
        """Return the result of `ask`; `otherwise` if it failed."""
        if question in self._off:
            return otherwise
        try:
            return ask()
        except _OTHER_SHAPE as error:
            self._off.add(question)
            logger.warning(
                "this Ray (%s) cannot be asked %s (%s: %s): what nobody needs any more, but Ray "
                "does not delete, stays until the session ends",
                ray.__version__,
                question,
                type(error).__name__,
                error,
            )
        except Exception as error:  # a time-out, or an RPC that failed
            logger.debug("no answer from Ray: %s", error)
        return otherwise


@contextlib.contextmanager
def joined(address: str) -> Iterator[tuple[str, RayOwners]]:
    """Join the Ray cluster at `address` as a driver; yields its session and its owners.

    Raises:
        SpillError: that is not possible from here.
    """
    # Ray takes "local" for a new cluster.
    if address == "local" or address.startswith("ray://"):
        kind = "no address" if address == "local" else "that of Ray Client"
        raise SpillError(
            f"cannot join the Ray cluster at {address}, which is {kind}",
            'Give --address the host:port of the GCS, usually with port 6379, or "auto"',
        )
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # of several kinds, by the reason
        raise SpillError(f"cannot join the Ray cluster at {address}: {error}") from error
    try:
        yield ray._private.worker._global_node.session_name, RayOwners()
    finally:
        ray.shutdown()


def _address(owner: bytes) -> Any | None:
    """Return an owner's address; None if it is not one, which would end the process in Ray."""
    try:
        address = common_pb2.Address.FromString(owner)
    except Exception:
        return None
    ids = (address.worker_id, getattr(address, _NODE_ID))
    has_ids = all(len(each) == _ID_SIZE and any(each) for each in ids)
    return address if has_ids and address.ip_address and 0 < address.port < 1 << 16 else None


def _ask(owner: bytes, object_ids: Sequence[str], timeout: int) -> list[Verdict] | None:
    with _borrowed(owner, object_ids) as refs:
        worker = ray._private.worker.global_worker.core_worker
        answers = worker.get_object_locations(refs, timeout)
        if any(ref not in answers for ref in refs):
            return None
        return [_verdict(answers[ref]) for ref in refs]


@contextlib.contextmanager
def _borrowed(owner: bytes, object_ids: Sequence[str]) -> Iterator[list[ray.ObjectRef]]:
    """Yield references to objects, which are only this process's own: no owner counts them."""
    worker = ray._private.worker.global_worker.core_worker
    refs: list[ray.ObjectRef] = []
    try:
        for object_id in object_ids:
            refs.append(ray.ObjectRef(bytes.fromhex(object_id), owner, ""))
            worker.deserialize_and_register_object_ref(
                bytes.fromhex(object_id), ray.ObjectRef.nil(), owner, b""
            )
        yield refs
    finally:
        refs.clear()


def _verdict(answer: Mapping[str, Any]) -> Verdict:
    is_known = answer["did_spill"] or answer["node_ids"] or answer["object_size"] is not None
    return Verdict.REFERENCED if is_known else Verdict.UNREFERENCED


def _nodes() -> Mapping[str, bool]:
    client: Any = ray._private.worker.global_worker.gcs_client
    nodes = client.get_all_node_info(timeout=_NODES_TIMEOUT)
    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.Value("ALIVE")
    by_start = sorted(
        (getattr(info, "start_time_ms", 0), node.hex(), info.state == alive)
        for node, info in nodes.items()
    )
    return {node: is_alive for _, node, is_alive in by_start}


def _own_node() -> str:
    # Ray's public functions would start a Ray in a process that is just leaving its own.
    return str(ray._private.worker.global_worker.current_node_id.hex())


def _has_ended(worker_id: bytes) -> bool:
    """Whether the GCS lists a worker or driver as dead; not if it does not know it."""
    state: Any = ray._private.state.state
    if hasattr(state, "_connect_and_get_accessor"):
        accessor = state._connect_and_get_accessor()
    else:  # before Ray 2.52
        state._check_connected()
        accessor = state.global_state_accessor
    found = accessor.get_worker_info(ray.WorkerID(worker_id))
    return found is not None and not gcs_pb2.WorkerTableData.FromString(found).is_alive
