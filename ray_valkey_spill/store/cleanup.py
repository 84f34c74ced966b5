"""Finds and removes the data of dead sessions, and of dead nodes of running sessions.

Each node with IO workers renews a lease about every ten seconds. A lease has run out if it was not
renewed for a minute. The clean-up measures that by watching, with this process's own clock. The
server's clock may have jumped, so it can only shorten the watch, and not below 35 s. Nobody can
renew while the server cannot be reached, so the watch then starts again.

IO workers may be stopped or gone while their node lives. So the clean-up also asks the GCS of each
session without a lease: a session is dead only if no GCS answers for it, and a node of a running
session only if the GCS says so. If the GCS cannot be asked, because its host does not answer or no
lease has its address, the session may be cut off from here, or paused with its machines; and a
session that outlives its GCS may be waiting for the next one. Then it is dead only after ten times
as long. A GCS at a loopback address can be asked only on the session's own host; an answer at that
address elsewhere proves nothing.

Several servers may use one overflow, and what a server knows may be lost. So of a session that has
files in the overflow, and nothing on this server, nothing is removed, unless the caller names it,
or its removal has begun.

A lagging server shows old leases, and shows stored objects as half-written. So the clean-up removes
nothing on the word of one: see `link.Link.confirmed`.

The clean-up stops at a session as soon as one of its leases has changed since the judgement. It
removes the metadata last, so that the next clean-up finds the rest if this one is killed.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import OverflowUnavailableError, SpillError
from ray_valkey_spill.format.names import Keyspace, NodeName
from ray_valkey_spill.store.liveness import (
    UNKNOWN,
    UNREACHABLE,
    RunningSession,
    has_run_here,
    is_loopback,
)
from ray_valkey_spill.tiers.ledger import OUTLIVES_GCS, Lease, Usage, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier, StoredFile
from ray_valkey_spill.tiers.overflow_place import SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = ["BETWEEN_LOOKS", "CONFIRMATION", "LEASE", "RENEWAL", "CleanUp", "Remains"]

# Seconds between two renewals; and from the latest renewal until a lease has run out.
RENEWAL, LEASE = 10.0, 60.0
# Seconds to watch a lease that has run out by the server's clock: time for several late renewals.
CONFIRMATION = 3.5 * RENEWAL
# Factor by which a lease lasts longer if no GCS can be asked.
_UNASKED = 10
# Seconds between two looks at the leases.
BETWEEN_LOOKS = 1.0
# Seconds; if two looks are further apart, this process was paused, and perhaps others with it.
_LONGEST_BLINK = 5.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Remains:
    """Data of a dead node that nobody can need.

    Attributes:
        node_name: the node.
        session_is_dead: whether all data of the node are meant; in a running session, only
            half-written objects are.
        usage: what the node has in Valkey.
        pending: number of half-written objects in Valkey.
        files: number of files in the overflow.
        file_bytes: length of these files, in bytes.
        kept, kept_bytes: objects of a running session that may be needed, and the bytes counted for
            them: see `reclaim`.
    """

    node_name: NodeName
    session_is_dead: bool
    usage: Usage
    pending: int
    files: int
    file_bytes: int
    kept: int = 0
    kept_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.session_is_dead or self.pending or self.files)


class CleanUp:
    """Finds the dead nodes of a namespace, and removes their data.

    Errors are those of `link.Link.run`. If the overflow cannot be used, the data in Valkey are
    removed nevertheless, except for the metadata by which the next clean-up finds the rest.

    Args:
        config: server, namespace and overflow.
        running_at: see `gcs.running_at`.
        waiting: see `link.Link`.

    Attributes:
        unavailable: error of the overflow since the latest `find` began; None if it was usable.
    """

    def __init__(
        self,
        config: Config,
        running_at: Callable[[str], RunningSession | None],
        waiting: Callable[[SpillError], None] = lambda error: None,
    ) -> None:
        self._link = link_to(config, waiting=waiting)
        self._tier = ValkeyTier(self._link, Keyspace.of(config))
        self._ledger = self._tier.ledger
        self._overflow = OverflowTier.of(config)
        self._running_at = running_at
        self.unavailable: OverflowUnavailableError | None = None
        # Leases of the dead sessions at the time of the judgement.
        self._dead: dict[str, set[Lease]] = {}
        self._named = ""
        # The error if a dead session's files are not in the overflow.
        self._missing: OverflowUnavailableError | None = None

    def close(self) -> None:
        self._link.close()
        if self._overflow is not None:
            self._overflow.close()

    def sessions(self) -> set[str]:
        """Return all sessions with data or metadata, but those that this server does not know."""
        node_names, _ = self._node_names("")
        return {node_name.session for node_name in node_names}

    def find(
        self,
        report: Callable[[str], None] = lambda text: None,
        *,
        wanted: Callable[[str], bool] = lambda session: True,
        named: str = "",
        watching: Callable[[int, float], None] = lambda nodes, seconds: None,
    ) -> list[Remains]:
        """Watch for about as long as a lease lasts; returns what the dead have left.

        Nodes with a GCS that cannot be asked are watched ten times as long in addition.

        Args:
            report: is given lines on what is kept and why.
            wanted: whether a session, by its name, is looked at.
            named: the session that the caller asks for by its whole name: it is looked at also if
                this server knows nothing of it, and forgotten if its files are not in the overflow.
            watching: is called every second with the number of nodes that are watched, and for how
                many seconds at most.
        """
        self.unavailable, self._named = None, named
        node_names, unknown = self._node_names(named)
        node_names = {node_name for node_name in node_names if wanted(node_name.session)}
        for session in sorted(filter(wanted, unknown)):
            report(
                f"Kept: the files of {session} in the overflow. This server knows nothing of that "
                "session: it may use another one. If it is over, give its whole name as --session"
            )
        before = self._leases()
        silent = self._watch(node_names, LEASE, watching)
        running = {
            session: self._running(session, before[session])
            for session in sorted({node_name.session for node_name in silent})
        }
        unasked = {node_name for node_name in silent if running[node_name.session] is UNREACHABLE}
        silent -= unasked - self._watch(unasked, _UNASKED * LEASE, watching)
        after = self._leases()
        # A GCS may have come back meanwhile, perhaps at the address that a new node has noted.
        for session in sorted({node_name.session for node_name in unasked & silent}):
            running[session] = self._running(session, before[session] | after[session])
        usages = self._ledger.usages()
        self._dead = {}
        remains = []
        for session in sorted({node_name.session for node_name in silent}):
            nodes = {node_name for node_name in silent if node_name.session == session}
            answer = running[session]
            if answer is not None and answer is not UNREACHABLE:
                nodes = self._dead_nodes(answer, nodes, report)
            elif before[session] != after[session]:
                report(
                    f"Kept: {session}, as some of its nodes live, though its GCS does not answer"
                )
                continue
            else:
                self._dead[session] = after[session]
            remains += [
                self._remains(node_name, session in self._dead, usages.get(node_name, Usage()))
                for node_name in sorted(nodes)
                if node_name.node
            ]
        self._report_what_stays(report)
        return remains

    def _report_what_stays(self, report: Callable[[str], None]) -> None:
        if self.unavailable is not None:
            report(f"Kept: all data in the overflow, since {self.unavailable.message}")
        elif self._overflow is None:
            for session in sorted(self._dead.keys() & self._ledger.overflows()):
                report(f"Kept: the files of {session} in its overflow. Give its overflow_uri")

    def _leases(self) -> defaultdict[str, set[Lease]]:
        """Return the leases, by session."""
        leases = defaultdict[str, set[Lease]](set)
        for lease in self._link.confirmed(self._ledger.leases):
            leases[lease.node_name.session].add(lease)
        return leases

    def _node_names(self, named: str) -> tuple[set[NodeName], set[str]]:
        """Return the nodes to look at, and the sessions of the overflow that are unknown here."""
        node_names = self._ledger.node_names()
        sessions = {*self._ledger.overflows()} | {each.session for each in node_names}
        in_overflow = self._of_overflow(OverflowTier.node_names, set[NodeName]())
        others = self._of_overflow(OverflowTier.sessions, set[str]()) - sessions
        unknown = {each for each in others - {named} if not self._is_ending(each)}
        sessions |= others - unknown
        node_names |= {each for each in in_overflow if each.session in sessions}
        # The token of its overflow may be all that is left of a session, and has no node.
        lone = sessions - {each.session for each in node_names}
        return node_names | {NodeName(session, "") for session in lone}, unknown

    def _is_ending(self, session: str) -> bool:
        return self._of_overflow(lambda overflow: overflow.is_ending(session), False)

    def _of_overflow(self, use: Callable[[OverflowTier], _T], otherwise: _T) -> _T:
        """Return the result of `use` on the overflow; `otherwise` if it is missing or unusable."""
        if self._overflow is not None and self.unavailable is None:
            try:
                return use(self._overflow)
            except OverflowUnavailableError as error:
                self.unavailable = error
        return otherwise

    def _running(self, session: str, leases: Collection[Lease]) -> RunningSession | None:
        """As `gcs.running_at`, for all addresses of a session's GCS that its leases have."""
        addresses = {lease.gcs_address for lease in leases if lease.has_address}
        may_return = any(lease.gcs_address == OUTLIVES_GCS for lease in leases)
        found = [self._ask(session, address) for address in sorted(addresses)]
        for running in found:
            if running is not None and running.name == session:
                return running
        if UNKNOWN in found:
            return UNKNOWN
        return UNREACHABLE if may_return or UNREACHABLE in found or not found else None

    def _ask(self, session: str, address: str) -> RunningSession | None:
        running = self._running_at(address)
        is_it = running is not None and running.name == session
        if not is_it and is_loopback(address) and not has_run_here(session):
            return UNREACHABLE
        return running

    def _dead_nodes(
        self, running: RunningSession, silent: Collection[NodeName], report: Callable[[str], None]
    ) -> set[NodeName]:
        """Return the silent nodes of a running session that the GCS does not list as alive."""
        if running is UNKNOWN:
            for node_name in sorted(silent):
                report(f"Kept: {node_name}, since the process at its GCS's address gives no answer")
            return set()
        living = {node_name for node_name in silent if node_name.node in running.nodes}
        for node_name in sorted(living):
            report(f"Kept: {node_name}, which is alive according to its GCS")
        return {*silent} - living

    def _watch(
        self, node_names: Iterable[NodeName], lease: float, watching: Callable[[int, float], None]
    ) -> set[NodeName]:
        """Return the nodes whose lease of `lease` seconds runs out while it is watched."""
        undecided, dead = set(node_names), set[NodeName]()
        # One operation: a connection that is closed meanwhile must count as a break.
        with self._link.operation():
            breaks, looked = self._link.breaks, time.monotonic()
            first, deadlines = self._deadlines(undecided, lease)
            while undecided:
                left = max(deadlines[node_name] for node_name in undecided) - time.monotonic()
                watching(len(undecided), max(0.0, left))
                time.sleep(BETWEEN_LOOKS)
                renewed = self._renewed()
                now = time.monotonic()
                undecided -= {
                    node_name
                    for node_name in undecided
                    if renewed.get(node_name) != first.get(node_name)
                }
                if self._link.breaks != breaks or now - looked > _LONGEST_BLINK:
                    breaks, now = self._link.breaks, time.monotonic()
                    first, deadlines = self._deadlines(undecided, lease)
                out = {node_name for node_name in undecided if now >= deadlines[node_name]}
                dead |= out
                undecided -= out
                looked = now
        return dead

    def _renewed(self) -> dict[NodeName, int]:
        """Return the time of each node's latest renewal."""
        leases = self._link.confirmed(self._ledger.leases, keep=True)
        leases.sort(key=lambda lease: lease.renewed)
        return {lease.node_name: lease.renewed for lease in leases}

    def _deadlines(
        self, node_names: set[NodeName], lease: float
    ) -> tuple[dict[NodeName, int], dict[NodeName, float]]:
        """Return each lease's latest renewal, and when it runs out if it is not renewed again."""
        renewed, server_time, now = self._renewed(), self._ledger.time(), time.monotonic()
        deadlines = {}
        for node_name in node_names:
            ago = (server_time - renewed.get(node_name, server_time)) / 1000
            left = lease - ago if ago >= 0 else lease
            deadlines[node_name] = now + max(left, CONFIRMATION)
        return renewed, deadlines

    def _remains(self, node_name: NodeName, session_is_dead: bool, usage: Usage) -> Remains:
        nothing: list[StoredFile] = []
        files = self._of_overflow(lambda overflow: overflow.files(node_name), nothing)
        nobodys = [file for file in files if session_is_dead or not file.is_whole]
        kept = [] if session_is_dead else [file.entry for file in files if file.is_whole]
        in_valkey = Usage() if session_is_dead else usage
        return Remains(
            node_name,
            session_is_dead,
            usage,
            pending=sum(map(len, self._ledger.pending(node_name))),
            files=len(nobodys),
            file_bytes=sum(file.entry.stored for file in nobodys),
            kept=in_valkey.objects + len(kept),
            kept_bytes=in_valkey.stored + sum(entry.stored for entry in kept),
        )

    def remove(self, remains: Iterable[Remains]) -> list[Remains]:
        """Remove the data that the latest `find` has found, and the tokens of dead sessions.

        Returns:
            The removed part of it. Data of a session that has come to life since are kept, and so
            are files in an overflow that cannot be used.
        """
        self._missing = None
        remains = list(remains)
        removed = [each for each in remains if not each.session_is_dead]
        for each in removed:
            self._remove_half_written(each.node_name)
        for session in self._dead:
            of_session = [each for each in remains if each.node_name.session == session]
            if self._remove_session(session, [each.node_name for each in of_session]):
                removed += of_session
        if self.unavailable is not None:
            removed = [replace(each, files=0, file_bytes=0) for each in removed]
        self.unavailable = self.unavailable or self._missing
        # Also for a clean-up or a node that was killed just before it did so.
        self._ledger.unlist_if_empty()
        return removed

    def _remove_half_written(self, node_name: NodeName) -> None:
        self._tier.remove_half_written(node_name)
        self._ledger.release_all(node_name)
        self._of_overflow(lambda overflow: overflow.remove_parts(node_name, lambda pid: False), 0)

    def _remove_session(self, session: str, node_names: Sequence[NodeName]) -> bool:
        """Remove a session's data while it is dead; return whether it is still dead at the end."""
        if not all(map(self._remove_from_valkey, node_names)):
            return False
        steps: list[Callable[[OverflowTier], object]] = [
            functools.partial(OverflowTier.begin_end, session=session),
            *(functools.partial(OverflowTier.destroy, node_name=each) for each in node_names),
        ]
        is_here = self._of_overflow(lambda overflow: self._shared(session).is_here(), False)
        for step in steps if is_here else ():
            if not self._is_dead(session):
                break
            self._of_overflow(step, None)
        if not self._is_dead(session):
            self._of_overflow(lambda overflow: overflow.withdraw_end(session), None)
            return False
        if self.unavailable is None:
            self._forget(session, node_names, is_here=is_here)
        return True

    def _forget(self, session: str, node_names: Iterable[NodeName], *, is_here: bool) -> None:
        """Remove the metadata of a dead session that has no data any more.

        If its files are not here, its token stays, by which the next clean-up finds them.
        """
        for node_name in node_names:
            self._ledger.close_account(node_name)
        if is_here:
            self._of_overflow(lambda overflow: self._shared(session).end(), False)
        elif session == self._named:
            self._ledger.forget_overflow(session)
        elif self._overflow is not None:
            self._missing = self._missing or OverflowUnavailableError(
                self._overflow.nothing_of(session).message,
                "Mount it, and clean up again. If its files were removed for good, give the "
                "session's whole name as --session",
            )

    def _shared(self, session: str) -> SharedOverflow:
        assert self._overflow is not None
        return SharedOverflow(self._overflow, session, self._ledger)

    def _remove_from_valkey(self, node_name: NodeName) -> bool:
        """Remove a dead node's data in Valkey while its session is dead; return whether it is."""
        for names in self._ledger.pending(node_name):
            if not self._is_dead(node_name.session):
                return False
            self._tier.remove_objects(names, stepwise=True)
        for entries in self._ledger.stored(node_name):
            if not self._is_dead(node_name.session):
                return False
            self._tier.remove_objects((entry.name for entry in entries), stepwise=True)
        return True

    def _is_dead(self, session: str) -> bool:
        """Whether the session's leases are unchanged since it was judged to be dead."""
        return self._leases()[session] == self._dead[session]

    def recount(self) -> None:
        """Correct the usage of all nodes in the metadata."""
        for node_name in self._ledger.node_names():
            self._ledger.recount(node_name)
        self._ledger.recount_totals()
