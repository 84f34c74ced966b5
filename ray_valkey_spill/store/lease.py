"""The lease of a node shows that it is alive, so that no clean-up removes its objects."""

from __future__ import annotations

from collections.abc import Callable

from ray_valkey_spill.format.names import NodeName
from ray_valkey_spill.tiers.ledger import Ledger

__all__ = ["NodeLease"]


class NodeLease:
    """The lease of a node, for one thread.

    Args:
        node: the node of a session.
        ledger: the thread's ledger.
    """

    def __init__(self, node: NodeName, ledger: Ledger) -> None:
        self._node = node
        self._ledger = ledger
        self.is_held = False

    def renew(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        """Take or renew the lease, unless the node's data were destroyed.

        If the server has lost the lease with its data, this takes it again.

        Args:
            gcs_address: address to ask whether the session runs, if all its leases run out.
            is_destroyed: whether the node's data were destroyed; must be true before they are.
        """
        if self.is_held and self._ledger.renew(self._node, gcs_address, new=False):
            return
        self.is_held = not is_destroyed() and self._ledger.renew(self._node, gcs_address, new=True)
        if self.is_held and is_destroyed():
            # Whoever destroyed them may have been done before the lease was taken.
            self._ledger.end_lease(self._node, gcs_address)
            self.is_held = False
