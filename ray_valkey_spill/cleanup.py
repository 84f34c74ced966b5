"""Finds and removes what dead sessions, and dead nodes of running ones, have left.

Whoever lives renews a lease: each node with IO workers, every ten seconds or so. A lease has run
out if it was not renewed for a minute. That is measured here, by watching and by this process's own
clock: the server's may have jumped, and is only believed where it tells of *less* time. While the
server cannot be reached nobody can renew, so the watch begins again after that.

IO workers may also be stopped, or be gone, while their node lives. So for whoever has no lease its
session's GCS is asked too: a session is dead only if nobody answers for it there, and a node of a
running session only if the GCS says so. Where it cannot be asked, because its host does not answer
or because no lease tells where it is, all of the session may be cut off from here, or stopped with
its machines, and then it is dead only after ten times as long.

A session of which any lease has changed since it was judged is not touched, or no further. What
makes its remains be found goes last: if a clean-up is killed, the next one finds the rest.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ray_valkey_spill.config import Config
from ray_valkey_spill.gcs import UNKNOWN, UNREACHABLE, RunningSession
from ray_valkey_spill.keys import Keyspace
from ray_valkey_spill.ledger import Lease, Owner, Usage
from ray_valkey_spill.overflow import OverflowTier
from ray_valkey_spill.shared_overflow import SharedOverflow
from ray_valkey_spill.tiers import ValkeyTier
from ray_valkey_spill.wire import Link

__all__ = ["LEASE", "RENEWAL", "CleanUp", "Remains"]

# Seconds from one renewal to the next, and after which a lease that was not renewed has run out.
RENEWAL, LEASE = 10.0, 60.0
# Seconds to watch a lease that by the server's clock has run out: some renewals, however late.
_CONFIRMATION = 3.5 * RENEWAL
# How many times as long a lease lasts where nobody can be asked.
_UNASKED = 10
_BETWEEN_LOOKS = 1.0
# If more passes between two looks, this process stood still, and perhaps others with it.
_LONGEST_BLINK = 5.0


@dataclass(frozen=True, slots=True)
class Remains:
    """What a dead node has left that nobody can need.

    Attributes:
        owner: whose it is.
        session_is_dead: if so, all of it is; of a running session, only what is half-written.
        usage: what it has in Valkey.
        pending: how many objects in Valkey are half-written.
        files: how many there are in the overflow.
        file_bytes: how long these are.
    """

    owner: Owner
    session_is_dead: bool
    usage: Usage
    pending: int
    files: int
    file_bytes: int

    @property
    def is_empty(self) -> bool:
        return not (self.session_is_dead or self.pending or self.files)


class CleanUp:
    """A look for the dead of a namespace, and their removal.

    Errors are those of `wire.Link.run`, and OverflowUnavailableError.

    Args:
        config: which server, namespace and overflow.
        running_at: see `gcs.running_at`.
    """

    def __init__(self, config: Config, running_at: Callable[[str], RunningSession | None]) -> None:
        self._link = Link(config)
        self._tier = ValkeyTier(self._link, Keyspace.of(config))
        self._ledger = self._tier.ledger
        self._overflow = OverflowTier.of(config)
        self._running_at = running_at
        # What leases the dead sessions had when they were judged.
        self._dead: dict[str, set[Lease]] = {}

    def close(self) -> None:
        self._link.close()

    def sessions(self) -> set[str]:
        """All that have anything here."""
        return {owner.session for owner in self._owners()}

    def find(self, tell: Callable[[str], None] = lambda text: None) -> list[Remains]:
        """Watch for about as long as a lease lasts; returns what the dead have left.

        Those whose GCS cannot be asked are watched for ten times as long again.

        Args:
            tell: is given lines on what is waited for, and on what is kept and why.
        """
        owners = self._owners()
        before = self._leases()
        silent = self._watch(owners, LEASE, tell)
        running = {
            session: self._running(session, {lease.gcs_address for lease in before[session]})
            for session in sorted({owner.session for owner in silent})
        }
        unasked = {owner for owner in silent if running[owner.session] is UNREACHABLE}
        silent -= unasked - self._watch(unasked, _UNASKED * LEASE, tell)
        after = self._leases()
        usages = self._ledger.usages()
        self._dead = {}
        remains = []
        for session in sorted({owner.session for owner in silent}):
            nodes = {owner for owner in silent if owner.session == session}
            answer = running[session]
            if answer is not None and answer is not UNREACHABLE:
                nodes = self._dead_nodes(answer, nodes, tell)
            elif before[session] != after[session]:
                tell(f"Kept: {session}, some of whose nodes live, though its GCS does not answer")
                continue
            else:
                self._dead[session] = after[session]
            remains += [
                self._remains(owner, session in self._dead, usages.get(owner, Usage()))
                for owner in sorted(nodes)
                if owner.node
            ]
        return remains

    def _leases(self) -> defaultdict[str, set[Lease]]:
        """Those of each session."""
        leases = defaultdict[str, set[Lease]](set)
        for lease in self._ledger.leases():
            leases[lease.owner.session].add(lease)
        return leases

    def _owners(self) -> set[Owner]:
        owners, sessions = self._ledger.owners(), {*self._ledger.overflows()}
        if self._overflow is not None:
            owners |= self._overflow.owners()
            sessions |= self._overflow.sessions()
        # What a session has agreed on may be all that is left of it, and is no node's.
        return owners | {Owner(session, "") for session in sessions - {o.session for o in owners}}

    def _running(self, session: str, addresses: Iterable[str]) -> RunningSession | None:
        """As `gcs.running_at`, for all the addresses that a session's GCS may have."""
        found = [self._running_at(address) for address in sorted(addresses) if address]
        for running in found:
            if running is not None and running.name == session:
                return running
        if UNKNOWN in found:
            return UNKNOWN
        return UNREACHABLE if UNREACHABLE in found or not found else None

    def _dead_nodes(
        self, running: RunningSession, silent: Collection[Owner], tell: Callable[[str], None]
    ) -> set[Owner]:
        """Those of the silent nodes of a session that are dead, and not only silent."""
        if running is UNKNOWN:
            for owner in sorted(silent):
                tell(f"Kept: {owner}, since what runs at its GCS's address does not tell of it")
            return set()
        living = {owner for owner in silent if owner.node in running.nodes}
        for owner in sorted(living):
            tell(f"Kept: {owner}, which lives, as its GCS says")
        return {*silent} - living

    def _watch(
        self, owners: Iterable[Owner], lease: float, tell: Callable[[str], None]
    ) -> set[Owner]:
        """Those of `owners` whose leases, of `lease` seconds, run out while they are looked at."""
        undecided, dead = set(owners), set[Owner]()
        # One operation: a connection that was closed meanwhile has to count as broken.
        with self._link.operation():
            breaks, looked = self._link.breaks, time.monotonic()
            first, deadlines = self._deadlines(undecided, lease)
            if undecided:
                longest = max(deadlines.values()) - looked
                tell(f"Watching {len(undecided)} nodes' leases for up to {longest:.0f} s")
            while undecided:
                time.sleep(_BETWEEN_LOOKS)
                renewed = self._renewed()
                now = time.monotonic()
                undecided -= {
                    owner for owner in undecided if renewed.get(owner) != first.get(owner)
                }
                if self._link.breaks != breaks or now - looked > _LONGEST_BLINK:
                    breaks, now = self._link.breaks, time.monotonic()
                    first, deadlines = self._deadlines(undecided, lease)
                out = {owner for owner in undecided if now >= deadlines[owner]}
                dead |= out
                undecided -= out
                looked = now
        return dead

    def _renewed(self) -> dict[Owner, int]:
        """When each lease was renewed; the latest, where a node has several."""
        leases = sorted(self._ledger.leases(), key=lambda lease: lease.renewed)
        return {lease.owner: lease.renewed for lease in leases}

    def _deadlines(
        self, owners: set[Owner], lease: float
    ) -> tuple[dict[Owner, int], dict[Owner, float]]:
        """When each lease was renewed, and when it has run out if it is not renewed again."""
        renewed, server_time, now = self._renewed(), self._ledger.time(), time.monotonic()
        deadlines = {}
        for owner in owners:
            ago = (server_time - renewed.get(owner, server_time)) / 1000
            left = lease - ago if ago >= 0 else lease
            deadlines[owner] = now + max(left, _CONFIRMATION)
        return renewed, deadlines

    def _remains(self, owner: Owner, session_is_dead: bool, usage: Usage) -> Remains:
        files = list(self._overflow.files(owner)) if self._overflow else []
        nobodys = [file for file in files if session_is_dead or not file.is_whole]
        return Remains(
            owner,
            session_is_dead,
            usage,
            pending=sum(map(len, self._ledger.pending(owner))),
            files=len(nobodys),
            file_bytes=sum(file.entry.stored for file in nobodys),
        )

    def remove(self, remains: Iterable[Remains]) -> list[Remains]:
        """Remove what the latest `find` has found, and what dead sessions had agreed on.

        Returns:
            What of it was removed. What has come to life since is kept.
        """
        remains = list(remains)
        removed = [each for each in remains if not each.session_is_dead]
        for each in removed:
            self._remove_half_written(each.owner)
        for session in self._dead:
            of_session = [each for each in remains if each.owner.session == session]
            if all(self._remove_all(each.owner) for each in of_session) and self._is_dead(session):
                if self._overflow is not None:
                    self._overflow.destroy_session(session)
                for each in of_session:
                    self._ledger.close_account(each.owner)
                if self._overflow is not None:
                    SharedOverflow(self._overflow, session).leave(self._ledger)
                else:
                    self._ledger.forget_overflow(session)
                removed += of_session
        return removed

    def _remove_half_written(self, owner: Owner) -> None:
        for names in self._ledger.pending(owner):
            self._tier.remove(names)
        self._ledger.release_all(owner)
        if self._overflow is not None:
            self._overflow.remove_parts(owner, lambda pid: False)

    def _remove_all(self, owner: Owner) -> bool:
        """Remove what a dead session has in Valkey, while it is dead; returns whether that is."""
        for names in self._ledger.pending(owner):
            if not self._is_dead(owner.session):
                return False
            self._tier.remove(names)
        for entries in self._ledger.stored(owner):
            if not self._is_dead(owner.session):
                return False
            self._tier.remove(entry.name for entry in entries)
        return True

    def _is_dead(self, session: str) -> bool:
        """Whether nothing has changed since the session was judged to be dead."""
        return self._leases()[session] == self._dead[session]

    def recount(self) -> None:
        """Correct what the books say of everybody's use of the server."""
        for owner in self._ledger.owners():
            self._ledger.recount(owner)
