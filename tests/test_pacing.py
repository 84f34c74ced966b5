"""How many bytes are kept under way, by a model of the wire: its rate, and its round trip.

A model, because only there the right answer is known.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ray_valkey_spill.protocol.pacing import Pacer
from ray_valkey_spill.units import MIB

CHUNK = MIB // 2
LEAST, MOST = MIB, 8 * MIB


def flow(
    pacer: Pacer, rate_of: Callable[[int], float], total: int, noise: float = 0.05
) -> list[int]:
    """Deliver `total` bytes at the rate that the wire has with a limit; returns the limits."""
    clock, chance, limits = 0.0, random.Random(0), []
    for _ in range(0, total, CHUNK):
        clock += CHUNK / rate_of(pacer.limit) * chance.uniform(1 - noise, 1 + noise)
        pacer.deliver(CHUNK, clock)
        limits.append(pacer.limit)
    return limits


def wire(rate: float, round_trip: float) -> Callable[[int], float]:
    return lambda limit: min(rate, limit / round_trip)


def late(limits: list[int]) -> float:
    """The mean limit of the second half."""
    half = limits[len(limits) // 2 :]
    return sum(half) / len(half)


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("needed", [1.5 * MIB, 3 * MIB, 6 * MIB])
def test_the_wire_is_filled_with_little_more_than_it_needs(needed: float, noise: float) -> None:
    rate = 2e9
    limits = flow(Pacer(LEAST, MOST, LEAST), wire(rate, needed / rate), 4096 * MIB, noise)
    assert 0.9 * needed <= late(limits) <= 1.7 * needed


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("start", [LEAST, MOST])
def test_a_near_server_gets_the_least(start: int, noise: float) -> None:
    limits = flow(Pacer(LEAST, MOST, start), wire(3e9, 50e-6), 4096 * MIB, noise)
    assert late(limits) <= 1.15 * LEAST


def test_more_than_the_caches_take_is_given_up() -> None:
    """A wire that gets slower with more than 2 MiB under way."""
    limits = flow(
        Pacer(LEAST, MOST, MOST), lambda limit: 3e9 if limit <= 2 * MIB else 2e9, 4096 * MIB
    )
    assert late(limits) <= 2 * MIB


def test_the_limit_stays_within_its_bounds() -> None:
    limits = flow(Pacer(LEAST, MOST, 100 * MIB), wire(1e12, 1.0), 2048 * MIB)
    assert min(limits) >= LEAST
    assert max(limits) == MOST
    assert late(limits) >= 0.9 * MOST


def test_what_is_not_limited_changes_nothing() -> None:
    pacer = Pacer(LEAST, MOST, LEAST)
    for number in range(10_000):
        pacer.deliver(CHUNK, float(number))
        pacer.interrupt()
    assert pacer.limit == LEAST
