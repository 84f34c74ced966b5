"""Inspects one spilled object: decodes its header, and checks that its chunks exist.

Reads only keys below the namespace's root, whatever key a user gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray_valkey_spill.cli.inventory import age
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    OverflowUnavailableError,
    SpillError,
)
from ray_valkey_spill.format.codec import Codec
from ray_valkey_spill.format.header import Header, decode_header, format_version
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName, Place, TierName
from ray_valkey_spill.format.sealing import KeyRing
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.store.object_store import problems
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.ledger import link_to, parse_entry, parse_pending, well_formed
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.valkey import ValkeyTier

__all__ = [
    "HALF_WRITTEN",
    "STORED",
    "UNKNOWN",
    "Inspection",
    "Inspector",
    "Target",
    "parse_target",
]

# Chunks to measure, at most, of an object without a header.
_MOST_CHUNKS = 10_000
# The state of an object by the ledger; of a file in the overflow, by its name.
STORED, HALF_WRITTEN, UNKNOWN = "stored", "half-written", "not in the ledger"

_OVERFLOW_PREFIX = "overflow:"


class Target(NamedTuple):
    """What a KEY names: one attempt to spill an object, or all attempts.

    `size` is the length that a URL has; `tier` is None if either may be meant; `chunk` is
    the number of the chunk whose key was given.
    """

    object_id: str
    name: ObjectName | None = None
    size: int | None = None
    tier: TierName | None = None
    chunk: int | None = None


def parse_target(text: str, keys: Keyspace) -> Target:
    """Parse a key, a URL, an object's name or its id.

    Raises:
        ConfigError: `text` is none of these, or belongs to another namespace.
    """
    if re.fullmatch("[0-9a-fA-F]+", text):
        return Target(text.lower())
    try:
        if "?" in text:
            place = keys.parse_url(text)
            return Target(place.name.object_id, place.name, place.size, place.tier)
        tier: TierName | None = "overflow" if text.startswith(_OVERFLOW_PREFIX) else None
        return _parse_key(text.removeprefix(_OVERFLOW_PREFIX).removeprefix(keys.root), tier)
    except (LostObjectError, ValueError):
        raise ConfigError(
            f"{text!r} names no spilled object of this namespace",
            f"Give a key below {keys.root} (<session>:<node>:<object>.<attempt>.<n>, or that and "
            "the number of a chunk), the URL of such an object, a name as `ls --json` prints it, "
            "or an object's id in hex; for another namespace, also give --namespace and "
            "--key-prefix",
        ) from None


def _parse_key(text: str, tier: TierName | None) -> Target:
    """Raises ValueError."""
    base, _, number = text.rpartition(":")
    try:
        name, chunk = ObjectName.parse(text), None
    except ValueError:
        name, chunk = ObjectName.parse(base), int(number)
        if not 0 <= chunk < name.chunks:
            raise
    return Target(name.object_id, name, tier=tier, chunk=chunk)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result for one attempt to spill an object, found without reading its chunks.

    Attributes:
        name: of the attempt.
        location: the key of its header, or the path of its file.
        tier: where it is.
        state: `STORED`, `HALF_WRITTEN` or `UNKNOWN`.
        entry: of the ledger, or made from the file's name.
        version: of the format.
        header: None if it is missing or cannot be decoded.
        found: stored bytes of each chunk, where each chunk has its own key.
        problems: why it is not a whole object; empty if it is one.
    """

    name: ObjectName
    location: str
    tier: TierName
    state: str
    entry: Entry | None
    version: int | None
    header: Header | None
    found: Sequence[int]
    problems: Sequence[str]

    @property
    def size(self) -> int | None:
        """The length of the data in bytes, if it is known."""
        if self.header is not None:
            return self.header.size
        return self.entry.size if self.entry is not None else None

    @property
    def ratio(self) -> float | None:
        header = self.header
        return header.size / header.stored_size if header and header.stored_size else None

    def url(self, keys: Keyspace) -> str | None:
        """The URL that Ray has for it."""
        seal = self.header.seal if self.header is not None else None
        key_id = None if seal is None else seal.key_id
        if self.size is None:
            return None
        return keys.url(Place(self.name, self.size, self.tier, key_id))

    def codecs(self) -> dict[str, int]:
        """The number of chunks by codec."""
        chunks = self.header.chunks if self.header is not None else ()
        counts = {c.name.lower(): sum(chunk.codec is c for chunk in chunks) for c in Codec}
        return {codec: count for codec, count in counts.items() if count}

    def as_dict(self, keys: Keyspace, now: float) -> dict[str, Any]:
        """For JSON; sizes in bytes, age in seconds at `now`."""
        header, entry = self.header, self.entry
        report: dict[str, Any] = {
            "object": self.name.object_id,
            "session": self.name.session,
            "node": self.name.node,
            "name": str(self.name),
            "tier": self.tier,
            "path" if self.tier == "overflow" else "key": self.location,
            "url": self.url(keys),
            "state": self.state,
            "writer": self.name.writer,
            "age_seconds": age(self.name.time, now),
            "counted_bytes": None if entry is None else entry.stored,
            "is_whole": not self.problems,
            "problems": list(self.problems),
            "header": None,
        }
        if header is not None:
            report["header"] = {
                "version": self.version,
                "ray_metadata": header.ray_metadata.decode(errors="backslashreplace"),
                "owner_address": header.owner_address.hex(),
                "logical_bytes": header.size,
                "stored_bytes": header.stored_size,
                "ratio": self.ratio,
                "chunk_bytes": header.chunk_size,
                "sealed_with_key": header.seal and f"{header.seal.key_id:016x}",
                "inline": header.inline,
                "codecs": self.codecs(),
                "chunks": [
                    {
                        "number": number,
                        "stored_bytes": chunk.stored_size,
                        "codec": chunk.codec.name.lower(),
                        "xxh3_64": None if header.seal else f"{chunk.checksum:016x}",
                        "found_bytes": self.found[number] if number < len(self.found) else None,
                    }
                    for number, chunk in enumerate(header.chunks)
                ],
            }
        return report


class Inspector:
    """Finds and inspects objects.

    Errors are those of `link.Link.run`, and OverflowUnavailableError. The constructor raises
    ConfigError if the file with the keys that open objects cannot be read.
    """

    def __init__(
        self, config: Config, waiting: Callable[[SpillError], None] = lambda error: None
    ) -> None:
        self.keys = Keyspace.of(config)
        self._link = link_to(config, waiting=waiting)
        self._tier = ValkeyTier(self._link, self.keys)
        self._ledger = self._tier.ledger
        self._overflow = OverflowTier.of(config)
        self._key_ring = KeyRing.of(config)
        if self._key_ring is not None:
            self._key_ring.current()  # raises what is wrong with the file, once

    def close(self) -> None:
        self._link.close()
        if self._overflow is not None:
            self._overflow.close()

    def time(self) -> float:
        """The server's clock, in seconds since the epoch."""
        return self._ledger.time() / 1000

    def inspect(self, target: Target) -> list[Inspection]:
        """Inspect every attempt that `target` names; returns at least one.

        Raises:
            SpillError: nothing of it is stored, or it is in an overflow that is not given.
        """
        if target.tier == "overflow" and self._overflow is None:
            raise OverflowUnavailableError(
                "the object is in the overflow, and no overflow_uri is given", "Give --overflow-uri"
            )
        found: list[Inspection] = []
        if target.tier != "overflow":
            found += self._link.confirmed(lambda: [*self._in_valkey(target)])
        if self._overflow is not None and target.tier != "valkey":
            found += self._in_overflow(self._overflow, target)
        if not found:
            raise SpillError(
                f"nothing of {target.name or f'object {target.object_id}'} is stored below "
                f"{self.keys.root}" + (f" or in {self._overflow}" if self._overflow else ""),
                "" if self._overflow else "If there is an overflow, give --overflow-uri",
            )
        return found

    def _in_valkey(self, target: Target) -> Iterator[Inspection]:
        name = target.name
        if name is None:
            entries = {
                known: entry
                for node_name in self._ledger.node_names()
                for known, entry in self._in_ledger(f"{node_name}:{target.object_id}").items()
            }
        else:
            entries = self._in_ledger(str(name))
            if not entries and self._link.execute(command("STRLEN", self.keys.header(name))) != [0]:
                yield self._inspect_in_valkey(name, None, UNKNOWN, target.size)
        for known, entry in entries.items():
            state = HALF_WRITTEN if entry is None else STORED
            yield self._inspect_in_valkey(known, entry, state, target.size)

    def _in_ledger(self, base: str) -> dict[ObjectName, Entry | None]:
        """The attempts whose names are `base` or begin with it; with entries if they are stored."""
        stop = f"({base}/"  # "/" comes right after "."
        pending, more, stored = self._link.execute(
            command("ZRANGEBYLEX", self.keys.pending, f"[{base}", f"[{base}"),
            command("ZRANGEBYLEX", self.keys.pending, f"[{base}.", stop),
            command("ZRANGEBYLEX", self.keys.index, f"[{base}.", stop),
        )
        found: dict[ObjectName, Entry | None] = {}
        for name in well_formed(self.keys.pending, (*pending, *more), parse_pending):
            found[name] = None
        for entry in well_formed(self.keys.index, stored, parse_entry):
            found[entry.name] = entry
        return found

    def _inspect_in_valkey(
        self, name: ObjectName, entry: Entry | None, state: str, size: int | None
    ) -> Inspection:
        stat = Stat(None, [])
        # A forged name may claim millions of chunks.
        length = command("STRLEN", self.keys.header(name))
        if name.chunks <= _MOST_CHUNKS or self._link.execute(length) != [0]:
            (stat,) = self._tier.measure([(name, 0)])
        return self._inspection(name, self.keys.header(name), "valkey", state, entry, stat, size)

    def _in_overflow(self, overflow: OverflowTier, target: Target) -> Iterator[Inspection]:
        node_names = overflow.node_names()
        if target.name is not None:
            node_names &= {NodeName(target.name.session, target.name.node)}
        for node_name in sorted(node_names):
            for entry, is_whole, path in overflow.files(node_name):
                name = entry.name
                if name != target.name and (target.name or name.object_id != target.object_id):
                    continue
                state = STORED if is_whole else HALF_WRITTEN
                place = Place(name, entry.size, "overflow")
                stat = overflow.stat(place) if is_whole else Stat(None, [])
                yield self._inspection(name, path, "overflow", state, entry, stat, target.size)

    def _inspection(
        self,
        name: ObjectName,
        location: str,
        tier: TierName,
        state: str,
        entry: Entry | None,
        stat: Stat,
        size: int | None,
    ) -> Inspection:
        """Judge `stat`; `size` is the length of the data by a URL."""
        header, version, wrong = None, None, []
        if state == HALF_WRITTEN:
            wrong.append("it is being written, or its writer was killed meanwhile")
        elif stat.header is None:
            wrong.append(
                f"its header is gone from the {'overflow' if tier == 'overflow' else 'server'}"
            )
        if stat.header is not None:
            try:
                key = self.keys.header(name)
                header, payload = decode_header(stat.header, key, self._key_ring)
                version = format_version(stat.header)
                sizes = {s for s in (size, entry and entry.size) if s is not None}
                wrong += problems(name, name.object_id, header, payload, stat, sizes)
            except (LostObjectError, ConfigError) as error:
                wrong.append(str(error))
        return Inspection(
            name, location, tier, state, entry, version, header, stat.chunk_sizes, wrong
        )
