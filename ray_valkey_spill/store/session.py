"""A session as a whole: where its GCS is, and its end, when all its data are removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace, NodeName
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import Failures, node_name
from ray_valkey_spill.tiers.ledger import Ledger, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.overflow_place import SharedOverflow
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = ["EndingSession", "note_gcs_address"]


def note_gcs_address(config: Config, session: str, gcs_address: str, patience: float) -> None:
    """Note where the GCS of a session is now, beside where its nodes have reached it.

    A clean-up asks the GCS of a session whose nodes are silent. After a head has come back at
    another address, nobody else may have noted that before the session seems to be dead.

    Args:
        config: server and namespace.
        session: name of the session.
        gcs_address: host:port.
        patience: seconds for which to retry an unavailable server.

    Raises:
        SpillError: as for `link.Link.run`.
    """
    link = link_to(replace(config, retry_timeout=min(config.retry_timeout, patience)))
    with contextlib.closing(link):
        ledger, name = Ledger(link, Keyspace.of(config)), node_name(session, "").session
        leases = [lease for lease in ledger.leases() if lease.node_name.session == name]
        ledger.add_address(leases, gcs_address)


class EndingSession:
    """A session whose data nobody needs any more. Not thread-safe.

    Errors are those of `link.Link.run`, and OverflowUnavailableError.

    Args:
        config: server, namespace and overflow.
        session: name of the session.
        patience: seconds for which to retry an unavailable server.
    """

    def __init__(self, config: Config, session: str, patience: float) -> None:
        self._config = config
        self._patience = patience
        # As in keys. Sessions are compared as a whole: one name may begin as another does.
        self._session = node_name(session, "").session
        self._link = link_to(replace(config, retry_timeout=min(config.retry_timeout, patience)))
        self._valkey = ValkeyTier(self._link, Keyspace.of(config))
        self._ledger = self._valkey.ledger
        self._shared: SharedOverflow | None = None
        if (overflow := OverflowTier.of(config)) is not None:
            self._shared = SharedOverflow(overflow, self._session, self._ledger)

    def close(self) -> None:
        self._valkey.close()
        if self._shared is not None:
            self._shared.overflow.close()

    def gcs_addresses(self) -> set[str]:
        """Return the addresses at which the session's nodes have reached its GCS."""
        return {
            lease.gcs_address
            for lease in self._ledger.leases()
            if lease.node_name.session == self._session and lease.has_address
        }

    def remove(self, is_here: Callable[[str], bool], is_alive: Callable[[int], bool]) -> bool:
        """Remove the session's data; return whether nothing of it is left.

        What a node is writing may be removed too early, and so be left behind, unless its writers
        can be seen from here. So of nodes that ran elsewhere this keeps what is half-written, with
        their leases: `CleanUp` removes both once the leases have run out.

        A failure with one node does not hold up the others.

        Args:
            is_here: whether the node with that id runs, or ran, on this host.
            is_alive: as for `Node.recover`, for those nodes.
        """
        shared = self._shared
        has_files = shared is None
        with Failures() as failures:
            if shared is not None:
                with failures.kept():  # what is in Valkey goes whatever the overflow says
                    has_files = shared.is_here()
            for each in sorted(self._nodes()):
                with failures.kept():
                    if is_here(each.node):
                        self._destroy(each, is_alive)
                    else:
                        self._remove_stored(each)
        if self._nodes():
            return False
        if shared is not None:
            if not has_files:
                raise shared.overflow.nothing_of(self._session)
            if not shared.end():
                return False
        self._ledger.unlist_if_empty()
        return not self._nodes() and self._session not in self._ledger.overflows()

    def _nodes(self) -> set[NodeName]:
        return {each for each in self._ledger.node_names() if each.session == self._session}

    def _destroy(self, each: NodeName, is_alive: Callable[[int], bool]) -> None:
        node = Node(self._config, each.session, each.node, patience=self._patience)
        with contextlib.closing(node):
            node.destroy(is_alive, leave_overflow=False)

    def _remove_stored(self, each: NodeName) -> None:
        self._valkey.remove_stored(each)
        if self._shared is not None:
            self._shared.destroy(each)
