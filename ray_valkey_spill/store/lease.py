"""The lease of a node: that it lives, so that nobody takes what it has stored for remains."""

from __future__ import annotations

from collections.abc import Callable

from ray_valkey_spill.format.names import Owner
from ray_valkey_spill.tiers.ledger import Ledger

__all__ = ["NodeLease"]


class NodeLease:
    """What one thread knows of its node's lease.

    Args:
        node: of a session.
        ledger: the thread's.
    """

    def __init__(self, node: Owner, ledger: Ledger) -> None:
        self._node = node
        self._ledger = ledger
        self.is_held = False

    def renew(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """Take the lease, or renew it, unless the node's data were destroyed.

        A server may have lost a lease with all its data: then it is taken again.

        Args:
            gcs_address: where to ask whether the session runs, should all its leases run out.
            is_destroyed: whether the node's data were destroyed. That must be so before they are.
        """
        if self.is_held and self._ledger.renew(self._node, gcs_address, new=False):
            return
        self.is_held = not is_destroyed() and self._ledger.renew(self._node, gcs_address, new=True)
