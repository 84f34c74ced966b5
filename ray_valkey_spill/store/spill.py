"""One batch of a spill to Valkey, as a transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray_valkey_spill.errors import (
    LostObjectError,
    ServerUnavailableError,
    SpillError,
    UnconfirmedError,
)
from ray_valkey_spill.format.names import Entry, NodeName, ObjectName
from ray_valkey_spill.store.under_way import UNDER_WAY
from ray_valkey_spill.tiers.budget import Budget, Payments
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = ["LATE_ARRIVALS", "Batch"]

# Seconds within which a server executes requests that it got over a connection that broke.
LATE_ARRIVALS = 1.0


class Batch:
    """A batch of objects to put into Valkey.

    Use it as `with Batch(…) as batch: batch.write(…); batch.commit()`. After the block, `stored`
    has the objects that were put, a prefix of `names`, and `failure` is the error that stopped the
    rest. A SpillError ends the block and is not raised. Nothing is left of the rest. If the server
    could not be reached, their attempts are no longer under way, so that `Node.recover` removes
    their leftovers.

    Args:
        tier: the tier that takes the objects.
        budget: pays for them.
        node: node of the objects.
        names: names of the attempts, in order.
        size: bytes of all their data.
    """

    def __init__(
        self,
        tier: ValkeyTier,
        budget: Budget,
        node: NodeName,
        names: Sequence[ObjectName],
        size: int,
    ) -> None:
        self.stored: list[Entry] = []
        self.failure: SpillError | None = None
        self._tier = tier
        self._budget = budget
        self._node = node
        self._names = self._all_names = names
        self._size = size
        # The tier's count at the start: values written before a connection broke may be lost, even
        # if the server had acknowledged them.
        self._breaks = tier.breaks
        self._is_reachable = True
        self._is_settled = False
        # Whether the server may have settled objects, though that was not heard of.
        self._may_be_settled = False

    def __enter__(self) -> Batch:
        try:
            UNDER_WAY.begin(self._all_names)
            self._budget.begin(self._size)
        except BaseException:
            UNDER_WAY.end(self._all_names)
            raise
        return self

    def write(self, values: Payments) -> None:
        """Register, write and settle objects until there is no more room or something fails."""
        if not values.begin():
            # Without room, not even a registration may be written.
            self.failure, self._names, self._is_settled = values.failure, (), True
            return
        try:
            for entry in self._tier.write(self._node, self._names, values, self._budget):
                self.stored.append(entry)
        except ServerUnavailableError:
            self._is_reachable = False
            raise
        except SpillError as error:
            self.failure = self._as_unconfirmed(error)
        else:
            self.failure, self._is_settled = values.failure, not values.is_half_way
        finally:
            self._may_be_settled = values.are_drawn

    def commit(self) -> None:
        """Remove what is not whole, and make sure that the rest is there to stay."""
        self._may_be_settled = True
        try:
            if rest := self._names[len(self.stored) :]:
                self._remove(rest)
            if not self._is_settled:
                self._tier.settle(self._node, self.stored, self._budget)
        except ServerUnavailableError:
            self._is_reachable = False
            raise
        if self.stored:
            self._tier.confirm(self._node, self.stored, self._breaks)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        is_undone = error is None
        try:
            if error is not None:
                self.stored = []
            if isinstance(error, SpillError):
                self.failure = self.failure or self._as_unconfirmed(error)
                is_undone = self._is_reachable and self._undo()
        finally:
            # In this order: whoever finds that something is stranded finds all of it. The budget is
            # unlocked even if a step fails (MemoryError): nobody could spill any more.
            try:
                self._note(error, is_undone)
            finally:
                try:
                    UNDER_WAY.end(self._all_names)
                finally:
                    if not is_undone:
                        self._budget.strand()
                    self._budget.end()
        return isinstance(error, SpillError)

    def _note(self, error: BaseException | None, is_undone: bool) -> None:
        """Note what has become of the attempts."""
        if error is None:
            UNDER_WAY.put(self.stored)
        if not is_undone:
            UNDER_WAY.fail(self._all_names)
        # A successor may have values without the registrations: by those nobody finds them.
        may_be_left = self._may_be_settled or self._tier.breaks != self._breaks
        if not is_undone and may_be_left:
            UNDER_WAY.doubt(self._names)

    def _undo(self) -> bool:
        """Remove all objects of the batch; return whether nothing is left."""
        try:
            self._remove(self._names)
            # The node's data may have been destroyed, and nobody would release what is kept.
            self._tier.settle(self._node, [], self._budget, keep=False)
        except SpillError:
            return False
        return True

    def _remove(self, names: Sequence[ObjectName]) -> None:
        if self._tier.breaks != self._breaks:
            # The server may still execute SETs of the values removed here.
            time.sleep(LATE_ARRIVALS)
        self._tier.remove_objects(names)

    def _as_unconfirmed(self, error: SpillError) -> SpillError:
        """Return `error`, or an UnconfirmedError if a loss may be due to a failover.

        A new primary may lack the registrations. The caller then puts the objects again, while it
        does not after the destruction of the node's data.
        """
        is_lost = isinstance(error, LostObjectError) and self._tier.breaks != self._breaks
        return UnconfirmedError(error.message) if is_lost else error
