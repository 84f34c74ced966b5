"""Notifications of an object store's work: once per operation, never once per chunk."""

from __future__ import annotations

from typing import Literal

from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.format.names import TierName

__all__ = ["Loss", "Observer", "Operation", "Reason"]

Operation = Literal["spill", "restore", "delete"]
# A missing object has no header or lacks a chunk. A damaged one does not read back as it was put. A
# foreign one has a URL that this package and namespace did not make.
Loss = Literal["missing", "damaged", "foreign"]
# Why nobody can need a stored object any more: see `reclaim`.
Reason = Literal["unreferenced", "owner_dead", "gone"]


class Observer:
    """Receives notifications, and ignores them.

    The thread that did the work calls its methods. They must not raise.
    """

    def done(
        self,
        operation: Operation,
        tier: TierName,
        objects: int,
        logical: int,
        stored: int | None,
        seconds: float,
    ) -> None:
        """Called after an operation on a tier. Objects that failed do not count.

        Args:
            operation: the operation.
            tier: the tier.
            objects: number of objects.
            logical: bytes of their data.
            stored: bytes written, as the metadata count them, or bytes read; None if unknown.
            seconds: duration, including retries.
        """

    def lost(self, reason: Loss, tier: TierName) -> None:
        """Called when an object that was looked for in `tier` is lost."""

    def reclaimed(self, reason: Reason, objects: int, stored: int) -> None:
        """Called after objects that nobody can need were removed, besides `done`.

        Args:
            reason: the reason.
            objects: number of objects.
            stored: bytes counted for them.
        """

    def waiting(self, error: SpillError) -> None:
        """Called before each pause between two attempts, unless these are hurried.

        The operation waits for the server, and would fail with `error` if it gave up now.
        """
