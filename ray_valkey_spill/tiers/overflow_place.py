"""Whether the overflow of a node is that of its whole session, and not one that only looks alike.

The books have a token for each session, and the overflow a file named after it. A node whose
overflow has no such file has another directory, or a mount that is not there: what the others have
left there it would take for lost.
"""

from __future__ import annotations

import os

from ray_valkey_spill.errors import OverflowUnavailableError
from ray_valkey_spill.tiers.ledger import Ledger
from ray_valkey_spill.tiers.overflow import OverflowTier

__all__ = ["SharedOverflow"]


class SharedOverflow:
    """One node's view of what the session's nodes agree on. Any thread may join.

    Errors are `OverflowUnavailableError`, and with a ledger also those of `link.Link.run`.

    Args:
        overflow: the node's; also an attribute, for what may be done before it has joined.
        session: the session.
    """

    def __init__(self, overflow: OverflowTier, session: str) -> None:
        self.overflow = overflow
        self._session = session
        self._agreed: str | None = None  # the token, once it has been seen here

    def close(self) -> None:
        """End the threads of the overflow; the next use starts others."""
        self.overflow.close()

    def probe(self) -> None:
        """Make sure that what is written to the overflow can be found there."""
        token = _new_token()
        self.overflow.sign(self._session, token)
        if not self.overflow.is_signed(self._session, token):
            raise OverflowUnavailableError(
                f"the overflow at {self.overflow} loses what is written to it"
            )
        self.overflow.unsign(self._session, token)

    def joined(self, ledger: Ledger) -> OverflowTier:
        """The overflow, once it is known to be the session's."""
        if self._agreed is None:
            self.join(ledger)
        return self.overflow

    def join(self, ledger: Ledger) -> None:
        """Make sure that the overflow is the session's, or make it that. The node needs a lease."""
        known = self._agreed or ledger.overflows().get(self._session)
        token = known or _new_token()
        if known is None:
            self.overflow.sign(self._session, token)
        # A server that has lost its data is told again.
        agreed = ledger.agree_on_overflow(self._session, token)
        is_here = agreed == self._agreed or self.overflow.is_signed(self._session, agreed)
        if agreed != token and (is_here or known is None):
            # Others were faster, and nobody will look for this one.
            self.overflow.unsign(self._session, token)
        if not is_here:
            raise OverflowUnavailableError(
                f"the overflow at {self.overflow} is not the one that the session's other nodes "
                "have: what they leave there is not here",
                "Give an overflow_uri that is the same place on every node, such as a mount of "
                "one shared directory or an object store",
            )
        self._agreed = agreed

    def leave(self, ledger: Ledger) -> None:
        """The last of the session's nodes takes down what they had agreed on."""
        agreed = ledger.overflows().get(self._session)
        if agreed is not None and ledger.forget_overflow(self._session):
            self.overflow.unsign(self._session, agreed)
        self._agreed = None


def _new_token() -> str:
    return os.urandom(8).hex()
