"""What an object store tells of its work: once an operation, never once a chunk."""

from __future__ import annotations

from typing import Literal

from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.format.names import TierName

__all__ = ["Loss", "Observer", "Operation"]

Operation = Literal["spill", "restore", "delete"]
# What is missing is not there, or not all of it; what is damaged does not read back as it was put;
# what is foreign was not put by this package, by its URL.
Loss = Literal["missing", "damaged", "foreign"]


class Observer:
    """Is told what was done, and does nothing with that.

    Its methods are called by whichever thread did it, and must not raise.
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
        """An operation on a tier has ended well, as far as it went: what failed is not counted.

        Args:
            operation: which.
            tier: which.
            objects: how many it was about.
            logical: bytes of their data.
            stored: bytes of what was written, as the books count them, or read; None if that is
                not known.
            seconds: how long it took, with what had to be tried again.
        """

    def lost(self, reason: Loss, tier: TierName) -> None:
        """An object that was looked for in `tier` is lost."""

    def waiting(self, error: SpillError) -> None:
        """An operation waits for the server, and would fail with `error` if it gave up now.

        Called before each pause between two attempts, but not while attempts are hurried.
        """
