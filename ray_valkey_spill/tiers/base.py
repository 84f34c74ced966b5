"""What all tiers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from ray_valkey_spill.format.names import Place
from ray_valkey_spill.format.packing import Receive
from ray_valkey_spill.units import Buffer

__all__ = ["Stat", "Tier"]

_T = TypeVar("_T")


class Stat(NamedTuple):
    """An object as a tier has it.

    Attributes:
        header: its value; None if it is missing.
        chunk_sizes: in bytes, 0 for a missing chunk; empty where the tier does not store chunks
            apart.
        payload: length of all chunks together, in bytes, where they are in one file.
    """

    header: Buffer | None
    chunk_sizes: list[int]
    payload: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.header is not None and all(self.chunk_sizes)


class Tier(Protocol):
    """Where stored objects live. It moves values, and knows nothing of what is in them.

    Errors are SpillErrors that pass when the tier works again, unless something else is said.

    Writing differs and is not part of this: a spill to Valkey is a transaction (`store.spill`), and
    the overflow takes one file per object.
    """

    def stat(self, places: Sequence[Place]) -> Iterator[Stat]:
        """Headers of objects, and whether their chunks are there, in order."""

    def read(self, place: Place, sizes: Sequence[int], use: Callable[[Receive], _T]) -> _T:
        """Open an object that `stat` has found, and return what `use` returns.

        Args:
            place: the object.
            sizes: of its chunks as stored, in bytes.
            use: given what receives chunks into memoryviews and yields as each is there, in order.
                It may be called in another thread, so that there is no hand-over for every chunk.

        Raises:
            LostObjectError: a chunk is missing, or has another size.
        """

    def close_reading(self) -> None:
        """End what `stat` has begun to read ahead; the object it is about is not read."""

    def remove(self, places: Sequence[Place]) -> None:
        """Remove objects; what is not there is no error."""

    def mark_lost(self, place: Place) -> None:
        """Make every later `stat` of a damaged object find that it is lost."""
