"""Objects for the tests to put: each has a number, and may have bytes that no other has."""

from __future__ import annotations

import numpy as np

from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.store.object_store import ObjectStore

METADATA, OWNER = b"PYTHON", b"\x00owner"


def noise(size: int, seed: int = 0) -> bytes:
    """Incompressible."""
    return np.random.default_rng(seed).bytes(size)


def object_id(number: int) -> str:
    return f"{number:056x}"


def source(data: bytes | bytearray | memoryview, number: int = 0) -> SourceObject:
    return SourceObject(object_id(number), METADATA, OWNER, memoryview(data))


def get(store: ObjectStore, url: str, number: int = 0) -> bytes:
    """What `source` was given, from wherever the URL says."""
    found = store.find(url, object_id(number))
    assert (found.header.ray_metadata, found.header.owner_address) == (METADATA, OWNER)
    target = bytearray(found.header.size)
    store.fill(found, memoryview(target))
    return bytes(target)
