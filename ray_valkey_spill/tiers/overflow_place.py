"""The overflow as a tier, used only if it is the same storage on all nodes of the session.

The metadata have a token for each session, and the overflow has a file named after it. If a node's
overflow lacks that file, it is another directory, or a mount that is missing. The node would then
take objects of the other nodes for lost.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

from ray_valkey_spill.errors import LostObjectError, OverflowUnavailableError
from ray_valkey_spill.format.names import Entry, NodeName, Place
from ray_valkey_spill.format.packing import Receive
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.ledger import Ledger
from ray_valkey_spill.tiers.overflow import OverflowTier

__all__ = ["MissingOverflow", "SharedOverflow"]

_T = TypeVar("_T")


class SharedOverflow:
    """A `Tier`: the session's overflow, for one thread of a node.

    Errors are `OverflowUnavailableError`, and those of `link.Link.run`, because the server has the
    session's token.

    Args:
        overflow: the node's overflow; also an attribute, for uses that need no token.
        session: name of the session.
        ledger: the thread's ledger.
    """

    def __init__(self, overflow: OverflowTier, session: str, ledger: Ledger) -> None:
        self.overflow = overflow
        self._session = session
        self._ledger = ledger
        # The session's token, once it was found here, and whether it was since the latest failure.
        self._token: str | None = None
        self._is_here = False
        # Tokens that were signed here, and that the server may have recorded.
        self._proposed: set[str] = set()

    # --- objects ---

    def write(self, values: Iterable[Value]) -> Iterator[Entry]:
        """As `OverflowTier.write`. Joins the overflow first if necessary."""
        if self._token is None:
            self.join()
        overflow = self._found()
        with self._looking_again():
            yield from overflow.write(values, self._token)

    def stat(self, places: Sequence[Place]) -> Iterator[Stat]:
        """As `Tier.stat`.

        An object that exists needs no check of the token, so it can be read while the server is
        unavailable.
        """
        for place in places:
            stat = Stat(None, [])
            with contextlib.suppress(OverflowUnavailableError):  # tried again below
                stat = self.overflow.stat(place)
            if stat.header is None:
                overflow = self._found()
                with self._looking_again():
                    stat = overflow.stat(place, self._token)
            yield stat

    def read(self, place: Place, sizes: Sequence[int], use: Callable[[Receive], _T]) -> _T:
        """As `Tier.read`. Errors as `OverflowTier.read`."""
        with self._looking_again():
            try:
                return self.overflow.read(place, sizes, use, self._token)
            except LostObjectError:
                self._found()  # it is not lost if a share has just been unmounted
                raise

    def close_reading(self) -> None:
        """As `Tier.close_reading`: nothing is read ahead."""

    def remove(self, places: Sequence[Place], *, stepwise: bool = False) -> None:
        """As `Tier.remove`."""
        overflow = self._found(must_be_agreed=False)
        with self._looking_again():
            for place in places:
                overflow.remove(place, self._token)

    def mark_lost(self, place: Place) -> None:
        """As `Tier.mark_lost`: the file is removed."""
        self.remove([place])

    def remove_parts(self, node: NodeName, is_alive: Callable[[int], bool]) -> int:
        """As `OverflowTier.remove_parts`."""
        return self._found(must_be_agreed=False).remove_parts(node, is_alive)

    # --- the token ---

    def probe(self) -> None:
        """Make sure that a file written to the overflow can be found there."""
        token = _new_token()
        self.overflow.sign(self._session, token)
        try:
            if not self.overflow.is_signed(self._session, token):
                raise OverflowUnavailableError(
                    f"the overflow at {self.overflow} loses files written to it"
                )
        finally:
            self.overflow.unsign(self._session, token)

    def join(self) -> None:
        """Make sure that the overflow is the session's, or make it so. The node needs a lease."""
        known = self._token or self._ledger.overflows().get(self._session)
        token = known or _new_token()
        if known is None:
            # Another one for each attempt: a share may be mounted only now.
            self._proposed.add(token)
            self.overflow.sign(self._session, token)
        # A server that lost its data gets the token again.
        agreed = self._ledger.agree_on_overflow(self._session, token)
        was_here = self._is_here and agreed == self._token
        is_here = was_here or self.overflow.is_signed(self._session, agreed)
        needless = self._proposed | ({token} if is_here else set[str]())
        for each in needless - {agreed}:
            # Another node was faster, or an attempt has failed: nobody will look for this token.
            self.overflow.unsign(self._session, each)
        self._proposed.clear()
        self._is_here = is_here
        if not is_here:
            raise self._elsewhere()
        self._token = agreed

    def is_here(self) -> bool:
        """Whether the session's files, if it has any, are here: a share may not be mounted."""
        token = self._ledger.overflows().get(self._session)
        return (
            token is None
            or self.overflow.is_signed(self._session, token)
            or self.overflow.is_ending(self._session)
        )

    def destroy(self, node: NodeName) -> int:
        """Remove everything of a node of the session; return the number of removed objects.

        Raises:
            OverflowUnavailableError: also if the session's files are not here.
        """
        if not self.is_here():
            raise self.overflow.nothing_of(self._session)
        return self.overflow.destroy(node)

    def end(self) -> bool:
        """Remove everything of the session; return False if a node of it has a lease.

        The session's files must have been here: see `is_here`. If this is killed, the next clean-up
        completes it: see `OverflowTier.begin_end`.
        """
        self.overflow.begin_end(self._session)
        if not self._ledger.forget_overflow(self._session):
            self.overflow.withdraw_end(self._session)
            return False
        self.overflow.destroy_session(self._session)
        return True

    def leave(self) -> None:
        """Remove the session's token and signature, if no other node of it has a lease."""
        agreed = self._ledger.overflows().get(self._session)
        needless = {*self._proposed} - {agreed}
        if agreed is not None and self._ledger.forget_overflow(self._session):
            needless.add(agreed)
        for each in needless:
            self.overflow.unsign(self._session, each)
        self._proposed.clear()
        self._token, self._is_here = None, False

    @contextlib.contextmanager
    def _looking_again(self) -> Iterator[None]:
        """After a failure, have the next use look for the token again."""
        try:
            yield
        except OverflowUnavailableError:
            self._is_here = False
            raise

    def _found(self, *, must_be_agreed: bool = True) -> OverflowTier:
        """Return the overflow. Agrees on nothing, for the session may be over.

        Args:
            must_be_agreed: whether to fail where the session has no token: what is missing here may
                be elsewhere then.
        """
        if not self._is_here:
            known = self._token
            if known is None or not self.overflow.is_signed(self._session, known):
                # A server that has lost the token may have another one. If it is away, that holds
                # up only what needs it.
                token = self._ledger.overflows().get(self._session)
                if token is None and known is None and not must_be_agreed:
                    return self.overflow
                if token in (None, known):
                    raise self.overflow.nothing_of(self._session)
                if not self.overflow.is_signed(self._session, token):
                    raise self.overflow.nothing_of(self._session) if known else self._elsewhere()
                self._token = token
            self._is_here = True
        return self.overflow

    def _elsewhere(self) -> OverflowUnavailableError:
        return OverflowUnavailableError(
            f"the overflow at {self.overflow} is not the one that the session's other nodes have: "
            "their files are not here",
            "Give an overflow_uri that is the same storage on every node: a mount of one shared "
            "directory, or an object store",
        )


class MissingOverflow:
    """The overflow `Tier` of a node without `overflow_uri`.

    Every method but `close_reading` raises OverflowUnavailableError.
    """

    def stat(self, places: Sequence[Place]) -> Iterator[Stat]:
        self._refuse()

    def read(self, place: Place, sizes: Sequence[int], use: Callable[[Receive], _T]) -> _T:
        self._refuse()

    def close_reading(self) -> None:
        """Nothing is read ahead."""

    def remove(self, places: Sequence[Place], *, stepwise: bool = False) -> None:
        self._refuse()

    def mark_lost(self, place: Place) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise OverflowUnavailableError(
            "an object was spilled to the overflow, and this node has no overflow_uri",
            "Give every node the same overflow_uri",
        )


def _new_token() -> str:
    return os.urandom(8).hex()
