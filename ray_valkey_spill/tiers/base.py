"""The protocol that all tiers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from ray_valkey_spill.format.names import Place
from ray_valkey_spill.format.packing import Receive
from ray_valkey_spill.units import Buffer

__all__ = ["Stat", "Tier"]

_T = TypeVar("_T")


class Stat(NamedTuple):
    """What a tier has of an object.

    Attributes:
        header: value of the header; None if it is missing.
        chunk_sizes: size of each chunk in bytes, 0 if it is missing; empty for a tier that does not
            store chunks separately.
        payload: length of all chunks together, in bytes, for a tier that stores them in one file.
    """

    header: Buffer | None
    chunk_sizes: list[int]
    payload: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.header is not None and all(self.chunk_sizes)


class Tier(Protocol):
    """Writes, reads and removes values, and knows nothing of their content.

    Unless stated otherwise, errors are SpillErrors that pass once the tier works again.

    The tiers write in different ways, so writing is not part of this protocol: a spill to Valkey is
    a transaction (`store.spill`), and the overflow takes one file per object.
    """

    def stat(self, places: Sequence[Place]) -> Iterator[Stat]:
        """Yield the header of each object, and which chunks exist, in order."""

    def read(self, place: Place, sizes: Sequence[int], use: Callable[[Receive], _T]) -> _T:
        """Open an object that `stat` has found, and return the result of `use`.

        Args:
            place: the object.
            sizes: stored sizes of its chunks, in bytes.
            use: gets a function that receives chunks into memoryviews and yields as each arrives,
                in order. May be called in another thread, to avoid a hand-over for every chunk.

        Raises:
            LostObjectError: a chunk is missing, or has another size.
        """

    def close_reading(self) -> None:
        """Drop the chunks that `stat` has begun to read ahead."""

    def remove(self, places: Sequence[Place], *, stepwise: bool = False) -> None:
        """Remove objects; a missing object is not an error.

        Args:
            places: the objects.
            stepwise: see `ValkeyTier.remove_objects`.
        """

    def mark_lost(self, place: Place) -> None:
        """Make every later `stat` of a damaged object report it as lost."""
