"""How much a writer may write: the namespace's budget, and the room on a shared server.

Without `max_bytes`, spilling takes only free memory, less a margin, so that no server evicts
anything for it. `max_bytes` is the operator's permission to take that much, even if a server evicts
other keys for it.

A writer pays for each value out of a grant. When it settles its objects, it is granted bytes for
the next ones, so that in the steady state it need not ask before it writes. All writers together
keep at most a twentieth of `max_bytes`, and half the margin of a server with `maxmemory`: what they
keep fits unless others have filled the margin since the latest look. A grant is in the metadata
before any byte of it is written, so the budget is never exceeded, even if a process is killed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

from ray_valkey_spill.errors import ServerFullError, SpillError
from ray_valkey_spill.format.names import Entry, NodeName, ObjectName
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import Request
from ray_valkey_spill.protocol.server_info import MemoryInfo
from ray_valkey_spill.tiers.ledger import Grant, Kept, Ledger, Reservation, Totals
from ray_valkey_spill.tiers.room import Limits, cost, free_room, margin, member_cost
from ray_valkey_spill.units import KIB, MIB

__all__ = ["IDLE", "Budget", "Payments"]

# Bytes; the least that a writer asks for, because many small objects take more than their data.
_LEAST_GRANTED = 64 * KIB
# Seconds after which a writer that puts nothing releases its grant.
IDLE = 10.0
# Seconds after which a server without limits is looked at again: together with the values, and
# before any value is written.
_LOOK_AGAIN, _LOOK_FIRST = 1.0, 10.0
# Seconds for which a look at a server holds on which others may lose keys to what is written, and
# after which a batch that takes longer looks again.
_FLEETING = 1.0
# Bytes, times the number of servers, that a writer writes between two looks at the room at least,
# however many others write: a look at one server takes some 0.1 ms.
_LEAST_BETWEEN_OWN_LOOKS = 2 * MIB
# Share of the margin that others may use while a batch is written, without stopping it.
_INTO_MARGIN = 1 / 2
# Attempts to get a grant: another writer that asked at the same time may give its bytes back.
_ATTEMPTS = 2


class Budget:
    """The bytes that one writer may still write.

    Not thread-safe, except that a second thread may call `give_back`, `stranded` and `recovered`.
    The first thread writes between `begin` and `end`.

    Args:
        link: the link that also carries the values, so that no other connection is needed.
        ledger: over the same link.
        node: the writer's node.
        writer: name of the writer, unique on its node.
        max_bytes: bytes that the namespace may have stored, as `cost` counts them; None for no
            limit.
        advice: how a user can get more room.
    """

    def __init__(
        self,
        link: Link,
        ledger: Ledger,
        node: NodeName,
        writer: str,
        max_bytes: int | None,
        advice: str,
    ) -> None:
        self._link = link
        self._ledger = ledger
        self.node = node
        self._writer = writer
        self._advice = advice
        self._limits = Limits(max_bytes)
        self._ours: Totals | Reservation = Totals()
        self._looked_at = float("-inf")
        # Held from `begin` to `end`, and while the grant is released.
        self._in_use = threading.Lock()
        # Bytes: granted for certain; written by this batch; written by earlier ones that may still
        # be there.
        self._granted = self._written = self._stranded = 0
        self._began = float("-inf")
        # Whether the server may have a grant of this writer.
        self._is_granted = False
        self._expected = 0
        self._used_at = float("-inf")
        # Bytes that the other writers might still write when the metadata were last read.
        self._of_others = 0
        # Written bytes at which the writer looks at the room again; the looks under way, their
        # results, and the bytes written when they were sent.
        self._look_at, self._is_look_due = float("inf"), False
        self._looks: list[Request] = []
        self._found: list[MemoryInfo] = []
        self._written_at_look = 0
        self._is_tight = False

    # --- one batch ---

    def begin(self, size: int) -> None:
        """Begin a batch of about `size` bytes."""
        self._in_use.acquire()
        try:
            self._expected = size
            self._began = time.monotonic()
            self._looks, self._found = [], []
            self._is_look_due = False
            self._plan_look()
            # What is kept is only good as long as others cannot have filled the room.
            self._is_tight = self._is_tight or (
                self._limits.is_fleeting and self._is_older_than(_FLEETING)
            )
        except BaseException:  # such as MemoryError
            self._in_use.release()
            raise

    def end(self) -> None:
        """End the batch. All that it wrote must be settled, removed or stranded."""
        self._written = 0
        self._used_at = time.monotonic()
        self._in_use.release()

    def require(self, size: int) -> None:
        """Make sure that `size` more bytes may be written.

        Raises:
            ServerFullError: they may not. The earlier grant still stands.
            ServerError: as `link.Link.run`.
        """
        left = self._granted - self._stranded - self._written
        if (left < size or self._is_tight) and not self._is_unlimited():
            self._enlarge(size)

    def take(self, size: int) -> None:
        """Count `size` bytes as written. Errors as `require`."""
        self.require(size)
        self._written += size

    def strand(self) -> None:
        """What the batch has written may stay on the server, until it is `recovered`.

        If it was settled unheard, less is granted now than was.
        """
        self._stranded += self._written
        self._granted = self._written = 0

    def looks(self) -> Iterable[Request]:
        """Return requests that look for room, if a look is due, to send with the values."""
        is_due = self._is_look_due or self._written >= self._look_at or self._takes_long()
        return self._new_looks() if is_due and not self._looks else ()

    def _takes_long(self) -> bool:
        """Whether the batch began, and the latest look was heard, so long ago that one is due."""
        latest = max(self._began, self._looked_at)
        return bool(self._limits.bounded) and time.monotonic() - latest > _FLEETING

    def _plan_look(self) -> None:
        """Set after how many bytes to look again: this writer's share of `between_looks`.

        The share is that of its grant, and what others may write is as it was at the latest grant.
        """
        granted = max(1, self._granted - self._stranded)
        between = self._limits.between_looks * granted / (granted + self._of_others)
        least = _LEAST_BETWEEN_OWN_LOOKS * len(self._limits.memories)
        self._look_at = self._written + max(least, between)

    def _new_looks(self) -> Iterator[Request]:
        self._is_look_due = False
        self._written_at_look, self._found = self._written, []
        for request in self._link.memory_requests():
            self._looks.append(request)
            yield request

    def hear(self, request: Request) -> bool:
        """Process the reply to a look; return False if `request` is not a look.

        Raises:
            ServerError: the look failed. Nothing is known of the room any more.
        """
        if request not in self._looks:
            return False
        self._looks.remove(request)
        self._found.append(self._link.memory_of(request))
        if not self._looks:
            self._take_in(self._found)
            self._plan_look()
            room = self._limits.room(self._ours, into_margin=_INTO_MARGIN)
            left = self._granted - self._stranded - self._written_at_look
            self._is_tight = room is not None and room < self._of_others + left
        return True

    def settlements(
        self, entries: Iterable[Entry], *, verify: bool, keep: bool = True
    ) -> Iterator[Request]:
        """Yield requests that settle objects and keep a grant; see `Ledger.settlements`.

        Args:
            entries: the objects.
            verify: as there.
            keep: whether the writer keeps some of its grant.
        """
        entries = list(entries)
        kept = None
        if self._is_granted or self._limits.exist:
            self._is_granted = True
            left = self._granted - self._stranded - sum(entry.stored for entry in entries)
            most = self._limits.kept_by_one
            is_enough = 2 * left >= most
            kept = Kept(
                self._writer,
                self._stranded,
                (min(most, left) if is_enough else most) if keep else 0,
                self._limits.kept_by_all,
                self._limits.max_bytes,
            )
            self._is_look_due = (keep and not is_enough and bool(self._limits.bounded)) or (
                self._limits.is_fleeting and self._is_older_than(_FLEETING / 2)
            )
        else:
            self._is_look_due = self._is_older_than(_LOOK_AGAIN)
        yield from self._ledger.settlements(self.node, entries, kept, verify=verify)

    def settled(self, granted: int, unwritten: int) -> None:
        """Record that the batch is settled.

        Args:
            granted: bytes that the writer keeps.
            unwritten: bytes that all writers may still write.
        """
        self._granted = granted
        self._written = self._written_at_look = 0
        self._of_others = max(0, unwritten - (granted - self._stranded))

    # --- in another thread ---

    @property
    def stranded(self) -> int:
        """Bytes that were written, but neither settled nor removed."""
        return self._stranded

    def recovered(self, size: int) -> None:
        """Record that `size` stranded bytes were removed."""
        with self._in_use:
            self._stranded -= size

    def give_back(self, ledger: Ledger, idle: float = IDLE) -> None:
        """Release the grant if nothing was put for `idle` seconds, over the thread's own ledger.

        The node releases the grant of a killed writer: see `store.node`.
        """
        if not self._in_use.acquire(blocking=False):
            return
        try:
            is_idle = time.monotonic() - self._used_at >= idle
            if is_idle and self._is_granted and not self._stranded:
                # In this order: a release may be carried out and fail nevertheless.
                self._granted = 0
                ledger.release(self.node, [self._writer])
                self._is_granted = False
        finally:
            self._in_use.release()

    def release_unknown(self, ledger: Ledger) -> None:
        """Release a grant that the server has of this writer, if the writer knows of none.

        The release was lost in a failover, or in the start from an older snapshot.
        """
        if self._in_use.acquire(blocking=False):
            try:
                if not self._is_granted:
                    ledger.release(self.node, [self._writer])
            finally:
                self._in_use.release()

    # --- helpers ---

    def _is_unlimited(self) -> bool:
        """Whether there are no limits, as far as is known; asks the servers if need be."""
        if self._limits.max_bytes is not None:
            return False
        if self._is_older_than(_LOOK_FIRST):
            self._take_in(self._link.memories())
        return not self._limits.exist

    def _is_older_than(self, seconds: float) -> bool:
        """Whether the latest look at the servers is."""
        return time.monotonic() - self._looked_at > seconds

    def _take_in(self, memories: Iterable[MemoryInfo]) -> None:
        self._limits = Limits(self._limits.max_bytes, [*memories])
        self._looked_at = time.monotonic()

    def _enlarge(self, size: int) -> None:
        """Get a grant with at least `size` bytes left. Errors as `require`.

        The grant comes before the look at the servers: the look counts everything that others have
        written by then, and every later grant to others counts this one. Bytes that do not fit are
        given back.
        """
        limits = self._limits
        written = self._stranded + self._written
        # A grant that no longer fits is replaced.
        grant = Grant(written if self._is_tight else max(written, self._granted), written)
        self._granted = grant.granted
        left = grant.granted - written
        expected = max(_LEAST_GRANTED, self._expected - self._written) + limits.kept_by_one
        least, most = size - left, max(size, min(expected, limits.at_once)) - left
        room: int | None = None
        for _ in range(_ATTEMPTS):
            reply = self._reserve(grant, least, most, room)
            room = self._limits.room(reply, into_margin=_INTO_MARGIN if self._written else 0.0)
            granted = reply.granted
            if room is not None:
                granted -= max(0, reply.unwritten - room)
            if granted >= least:
                if granted < reply.granted:
                    self._link.execute(self._reservation(grant, granted, granted, None))
                self._granted = grant.granted + granted
                self._of_others = max(0, reply.unwritten - reply.granted - left)
                self._is_tight = False
                self._plan_look()
                return
            if reply.granted < least:
                break
        if reply.granted:
            self._link.execute(self._reservation(grant, 0, 0, None))
        if not self._limits.exist:
            return  # not any more
        raise self._refusal(least, reply.used)

    def _reserve(self, grant: Grant, least: int, most: int, room: int | None) -> Reservation:
        """Ask for bytes on top of `grant`, then look at the servers, in one exchange."""
        request = self._reservation(grant, least, most, room)
        self._is_granted = True

        def requests() -> Iterator[Request]:
            yield request
            yield from self._link.memory_requests()

        _, *looks = list(self._link.run(requests()))
        reply = Reservation(*request.integers(len(Reservation._fields)))
        self._ours = reply
        self._take_in(map(self._link.memory_of, looks))
        return reply

    def _reservation(self, grant: Grant, least: int, most: int, room: int | None) -> Request:
        budget = self._limits.max_bytes
        return self._ledger.reservation(self.node, self._writer, grant, least, most, budget, room)

    def _refusal(self, wanted: int, used: int) -> ServerFullError:
        budget = self._limits.max_bytes
        if budget is not None and (used + wanted > budget or not self._limits.bounded):
            return ServerFullError(
                f"the budget is used up: {used / MIB:.1f} MiB of max_bytes ({budget / MIB:.1f} "
                f"MiB) are taken, and {wanted / MIB:.1f} MiB are wanted",
                f"Raise max_bytes, {self._advice}",
            )
        memory = min(self._limits.bounded, key=free_room)
        left = margin(memory.maxmemory) / MIB
        what = (
            f"Valkey at {self._link.address} is full (OOM) except for the margin left to others: "
            f"{memory.used / MIB:.1f} MiB of maxmemory {memory.maxmemory / MIB:.1f} MiB are used, "
            f"{left:.1f} MiB are left, and {wanted / MIB:.1f} MiB are wanted"
        )
        if budget is None and memory.evicts_others:
            return ServerFullError(
                f"{what}. Without max_bytes nobody's keys are evicted for spilling",
                "Give max_bytes, how much of the server Ray may take, evicting keys of others "
                f"{'' if memory.evicts_all else 'that have a TTL '}if need be, raise the server's "
                f"maxmemory, {self._advice}",
            )
        return ServerFullError(
            what, f"Raise the server's maxmemory, remove other data from it, {self._advice}"
        )


class Payments(Iterator[tuple[Value, Entry | None]]):
    """Iterates over paid values; the last value of an object comes with its entry.

    The iteration ends when there is no more room, and `failure` is the reason. Raised into
    `Link.run`, the failure would close a connection with replies under way: a run must be drained.

    Args:
        budget: pays, between `begin` and `end`.
        values: of objects, in order.

    Attributes:
        failure: why there is no more room, if there is none.
        are_drawn: whether there are no more of them.
        is_half_way: whether values of an object were paid for, and not all that it has.
    """

    def __init__(self, budget: Budget, values: Iterator[Value]) -> None:
        self.failure: SpillError | None = None
        self.are_drawn = self.is_half_way = False
        self._budget = budget
        self._values = values
        self._first: tuple[Value, Entry | None] | None = None
        self._name: ObjectName | None = None
        self._paid = 0

    def begin(self) -> bool:
        """Pay for the first value; return whether there is one."""
        self._first = next(self, None)
        return self._first is not None

    def __next__(self) -> tuple[Value, Entry | None]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        value = next(self._values, None)
        if value is None:
            self.are_drawn = True
            raise StopIteration
        try:
            entry = self._pay(value)
        except SpillError as error:
            self.failure, self.are_drawn = error, True
            raise StopIteration from None
        return value, entry

    def _pay(self, value: Value) -> Entry | None:
        size = cost(len(value.key), value.length)
        if value.name is not self._name:
            self._name, self._paid = value.name, 0
            entry = member_cost(len(str(value.name)))
            if not value.is_last:
                # Refuse an object that does not fit before half of it is written.
                self._budget.require(value.expected + entry)
            size += entry
        self._budget.take(size)
        self._paid += size
        self.is_half_way = not value.is_last
        return Entry(value.name, value.size, self._paid) if value.is_last else None
