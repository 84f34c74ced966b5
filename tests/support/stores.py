"""A store together with the background half of its node, as an IO worker that keeps it has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from ray_valkey_spill.config import Config
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.protocol.link import USUAL_SHARING, Sharing
from ray_valkey_spill.store.node import Node, Room
from ray_valkey_spill.store.object_store import ObjectStore
from ray_valkey_spill.store.observer import Observer
from support.servers import Server

__all__ = ["Lease", "Store"]


class Store(ObjectStore):
    """An `ObjectStore` with the methods of its `Node`, which is the attribute `background`."""

    def __init__(
        self,
        config: Config,
        session: str,
        node: str,
        observer: Observer | None = None,
        sharing: Sharing = USUAL_SHARING,
        **options: Any,
    ) -> None:
        super().__init__(config, session, node, observer, sharing)
        self._whose = config, session, node, observer, sharing
        self.background = Node(*self._whose, beside=self, **options)

    def close(self) -> None:
        super().close()
        self.background.close()

    def close_idle(self) -> None:
        super().close_idle()
        self.background.close_idle()

    def renew_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        self.background.renew_lease(gcs_address, is_destroyed)

    def keep_lease(self, gcs_address: str, is_destroyed: Callable[[], bool]) -> None:
        self.background.keep_lease(gcs_address, is_destroyed)

    def probe_overflow(self) -> None:
        self.background.probe_overflow()

    def join_overflow(self) -> None:
        self.background.join_overflow()

    def recover(self, is_alive: Callable[[int], bool]) -> int:
        return self.background.recover(is_alive)

    def sweep_overflow(self, is_alive: Callable[[int], bool] = lambda pid: True) -> int | None:
        return self.background.sweep_overflow(is_alive)

    def delete_again(self, urls: Iterable[str]) -> None:
        self.background.delete(urls)

    def room(self) -> Room:
        return self.background.room()

    def give_back(self) -> None:
        """Release the grant now."""
        self.background.give_back(idle=0.0)

    def destroy(self, is_alive: Callable[[int], bool], patience: float = 5.0) -> int:
        # A test may end in the middle of a failover.
        config, *_ = self._whose
        patient = Node(*self._whose, beside=self, patience=config.retry_timeout)
        with contextlib.closing(patient):
            return patient.destroy(is_alive, patience)


class Lease:
    """The one lease on a server, past the store."""

    def __init__(self, server: Server, keys: Keyspace) -> None:
        self._client = server.client
        self._key = keys.leases

    def renewed(self) -> float:
        found = self._client.zrange(self._key, 0, -1, withscores=True)
        return max((float(score) for _, score in found), default=0.0)

    def age(self) -> float:
        """Let it have been renewed a minute before; returns when that was."""
        for member in self._client.zrange(self._key, 0, -1):
            self._client.zincrby(self._key, -60_000, member)
        return self.renewed()

    def remove(self) -> None:
        self._client.delete(self._key)
