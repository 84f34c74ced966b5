"""Metrics of an IO worker, on the Prometheus endpoint of its Ray node.

The endpoint treats them as Ray 2.60 does (`open_telemetry_metric_recorder`, its `.cc` and `.py`).
It adds counters up per node, so they outlive the worker. It exports a gauge once each time it is
set, for 20 s. It replaces each observation of a histogram by the middle of its bucket, so the
counts are exact and the sum is approximate. A killed worker loses what it has counted since its
last report, at most ten seconds before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    NotValkeyError,
    OverflowUnavailableError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
    SpillError,
)
from ray_valkey_spill.format.names import TierName
from ray_valkey_spill.store.node import Room
from ray_valkey_spill.store.observer import Loss, Observer, Operation, Reason

__all__ = ["DEFINITIONS", "Definition", "Metrics", "markdown_table"]

logger = logging.getLogger("ray_valkey_spill")

_SECONDS = [
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
]

# By class: the first class in an error's MRO that is here names its reason.
_REASONS: Mapping[type, str] = {
    ConfigError: "config",
    LostObjectError: "lost",
    OverflowUnavailableError: "overflow",
    ServerUnavailableError: "unavailable",
    ServerFullError: "full",
    ServerRefusedError: "refused",
    NotValkeyError: "not_valkey",
    SpillError: "other",
}
_OUT_OF_REACH = {"unavailable", "refused", "not_valkey"}


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric. `name` is its name in Ray, `exported` its name in Prometheus."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def exported(self) -> str:
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


_OBJECTS = Definition(
    "valkey_spill_objects",
    "counter",
    "objects",
    ("operation", "tier"),
    "Objects spilled, restored, deleted.",
)
_LOGICAL = Definition(
    "valkey_spill_logical_bytes",
    "counter",
    "bytes",
    ("operation", "tier"),
    "Length of their data.",
)
_STORED = Definition(
    "valkey_spill_stored_bytes",
    "counter",
    "bytes",
    ("operation", "tier"),
    "Spilled: the bytes counted for them; in Valkey with the server's overhead per value, in the "
    "overflow the length of their files. Restored: the bytes read of their chunks. Unknown for "
    "deletions.",
)
_DURATION = Definition(
    "valkey_spill_operation_seconds",
    "histogram",
    "seconds",
    ("operation", "tier"),
    "Duration of a spilled or deleted batch, or of a restored object, including retries. Failed "
    "ones do not count.",
)
_FAILURES = Definition(
    "valkey_spill_failures",
    "counter",
    "attempts",
    ("operation", "reason"),
    "Attempts that failed or were cut short; all are retried. Operations include `recover`, the "
    "background work every ten seconds. Reasons: "
    f"{', '.join(f'`{reason}`' for reason in _REASONS.values())}.",
)
_LOST = Definition(
    "valkey_spill_lost_objects",
    "counter",
    "objects",
    ("reason",),
    "Restores that ended in `ObjectLostError`, counted once for each node that asked. Reasons: "
    "`missing`, `damaged`, `foreign` (the URL is not from this package and namespace).",
)
_RECLAIMED = Definition(
    "valkey_spill_reclaimed_objects",
    "counter",
    "objects",
    ("reason",),
    "Objects that were removed though Ray had not asked for it, since nobody could need them. They "
    "also count as deleted. Reasons: `unreferenced` (their owner says so), `owner_dead`, `gone` "
    "(without any value left).",
)
_RECLAIMED_BYTES = Definition(
    "valkey_spill_reclaimed_bytes", "counter", "bytes", ("reason",), "Bytes counted for them."
)
_BREAKS = Definition(
    "valkey_spill_connection_breaks",
    "counter",
    "breaks",
    (),
    "Connections that broke or could not be opened, and servers that were not ready. Each is one "
    "retry.",
)
_CONNECTED = Definition(
    "valkey_spill_connected",
    "gauge",
    "0 or 1",
    (),
    "Whether the latest attempt to use the server worked. A full server counts as working.",
)
_LEASE = Definition(
    "valkey_spill_lease_renewed_timestamp_seconds",
    "gauge",
    "Unix time",
    (),
    "When the IO worker last renewed its node's lease; 0 if it has not yet. One IO worker of a "
    "node renews it.",
)
_BUDGET_USED = Definition(
    "valkey_spill_budget_used_bytes",
    "gauge",
    "bytes",
    (),
    "Bytes that the namespace has stored in Valkey or been granted, as counted for `max_bytes`.",
)
_BUDGET_LIMIT = Definition(
    "valkey_spill_budget_limit_bytes", "gauge", "bytes", (), "`max_bytes`, if that is given."
)
_OVERFLOW_USED = Definition(
    "valkey_spill_overflow_used_bytes",
    "gauge",
    "bytes",
    (),
    "Files of the node in the overflow, if it has one; up to ten minutes old.",
)
_SERVER_USED = Definition(
    "valkey_spill_server_used_memory_bytes",
    "gauge",
    "bytes",
    (),
    "The server's `used_memory`, including other data; in a cluster, of the fullest shard.",
)
_SERVER_LIMIT = Definition(
    "valkey_spill_server_maxmemory_bytes",
    "gauge",
    "bytes",
    (),
    "Its `maxmemory`; 0 if it has no limit.",
)

_OF_DEAD_NODES = Definition(
    "valkey_spill_dead_nodes_bytes",
    "gauge",
    "bytes",
    (),
    "Bytes stored by nodes of the session that are dead, also in the overflow. One node "
    "of the session reports it.",
)

DEFINITIONS = (
    _OBJECTS,
    _LOGICAL,
    _STORED,
    _DURATION,
    _FAILURES,
    _LOST,
    _RECLAIMED,
    _RECLAIMED_BYTES,
    _BREAKS,
    _CONNECTED,
    _LEASE,
    _BUDGET_USED,
    _BUDGET_LIMIT,
    _OVERFLOW_USED,
    _SERVER_USED,
    _SERVER_LIMIT,
    _OF_DEAD_NODES,
)


class Metrics(Observer):
    """Reports an IO worker's metrics. Thread-safe; no method ever raises.

    Args:
        is_reporting: whether this process reports metrics and is connected to Ray. Until it is,
            values are dropped.
    """

    def __init__(self, is_reporting: Callable[[], bool]) -> None:
        self._is_reporting = is_reporting
        self._instruments: dict[str, Any] = {}
        self._has_failed = False
        self._connected: bool | None = None
        self._renewed = 0.0
        self._breaks = 0

    # --- events ---

    def done(
        self,
        operation: Operation,
        tier: TierName,
        objects: int,
        logical: int,
        stored: int | None,
        seconds: float,
    ) -> None:
        labels: dict[str, str] = {"operation": operation, "tier": tier}
        self._record(_OBJECTS, objects, labels)
        self._record(_LOGICAL, logical, labels)
        if stored is not None:
            self._record(_STORED, stored, labels)
        self._record(_DURATION, seconds, labels)
        if tier == "valkey":
            self._note(connected=True)

    def lost(self, reason: Loss, tier: TierName) -> None:
        self._record(_LOST, 1, {"reason": reason})

    def reclaimed(self, reason: Reason, objects: int, stored: int) -> None:
        self._record(_RECLAIMED, objects, {"reason": reason})
        self._record(_RECLAIMED_BYTES, stored, {"reason": reason})

    def failed(self, operation: Operation | Literal["recover"], error: SpillError) -> None:
        """Count an attempt that failed or was cut short."""
        reason = next(_REASONS[kind] for kind in type(error).__mro__ if kind in _REASONS)
        self._record(_FAILURES, 1, {"operation": operation, "reason": reason})
        if reason in _OUT_OF_REACH:
            self._note(connected=False)

    # --- measurements, once in each background round ---

    def renewed_lease(self) -> None:
        self._renewed = time.time()
        # A round can take longer than the endpoint exports a gauge.
        self._record(_LEASE, self._renewed)
        self._note(connected=True)

    def found_room(self, room: Room) -> None:
        self._record(_BUDGET_USED, room.used)
        if room.max_bytes is not None:
            self._record(_BUDGET_LIMIT, room.max_bytes)
        self._record(_SERVER_USED, room.memory.used)
        self._record(_SERVER_LIMIT, room.memory.maxmemory)

    def found_in_overflow(self, size: int) -> None:
        """Record that the node has `size` bytes in the overflow."""
        self._record(_OVERFLOW_USED, size)

    def found_of_dead_nodes(self, size: int) -> None:
        """Record that dead nodes of the session have stored `size` bytes."""
        self._record(_OF_DEAD_NODES, size)

    def looked(self, breaks: int) -> None:
        """End a round. `breaks` is the number of broken connections since the process began."""
        self._record(_BREAKS, breaks - self._breaks)
        self._breaks = breaks
        # Also 0, for a node whose lease nobody could renew.
        self._record(_LEASE, self._renewed)
        if self._connected is not None:
            self._record(_CONNECTED, int(self._connected))

    # --- helpers ---

    def _note(self, *, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            self._record(_CONNECTED, int(connected))

    def _record(
        self, metric: Definition, value: float, labels: dict[str, str] | None = None
    ) -> None:
        try:
            if not self._is_reporting():
                return
            instrument = self._instruments.get(metric.name)
            if instrument is None:
                instrument = self._instruments[metric.name] = _instrument(metric)
            if metric.kind == "gauge":
                instrument.set(value, labels)
            elif metric.kind == "histogram":
                instrument.observe(value, labels)
            elif value:  # Ray refuses to add 0
                instrument.inc(value, labels)
        except Exception:
            if not self._has_failed:
                logger.warning("metrics are not reported", exc_info=True)
            self._has_failed = True


def _instrument(metric: Definition) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.meaning, _SECONDS, metric.labels)
    made = Counter if metric.kind == "counter" else Gauge
    return made(metric.name, metric.meaning, metric.labels)


def markdown_table() -> str:
    """Return the table of all metrics for the documentation."""
    head = ["| name | type | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    rows = [
        f"| `{metric.exported}` | {metric.kind} | {metric.unit} "
        f"| {', '.join(f'`{label}`' for label in metric.labels) or '–'} | {metric.meaning} |"  # noqa: RUF001
        for metric in DEFINITIONS
    ]
    return "\n".join([*head, *rows])
