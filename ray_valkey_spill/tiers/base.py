"""Types that all tiers share."""

from __future__ import annotations

from typing import NamedTuple

from ray_valkey_spill.units import Buffer

__all__ = ["Stat"]


class Stat(NamedTuple):
    """An object as found: `chunk_sizes` in bytes, 0 for a missing chunk, where each has its own.

    `payload` is the length of all of them where they are in one file.
    """

    header: Buffer | None
    chunk_sizes: list[int]
    payload: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.header is not None and all(self.chunk_sizes)
