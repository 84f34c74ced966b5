"""What a soak watches: its drivers, and the IO workers of its Ray."""

from __future__ import annotations

import collections
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from support.clusters import io_workers, own_memory

from benchmarks.common import MIB
from benchmarks.soak_driver import HANG

SAMPLE_INTERVAL = 5.0
# What an IO worker may grow by, from when it was first looked at: the data under way, LZ4's
# threads, and a connection to each process that is asked who needs its objects.
MOST_GROWTH = {"memory": 64 * MIB, "threads": 8, "files": 16}


class Driver:
    """A process of `soak_driver`.

    Attributes:
        failed: what went wrong with it, once it was stopped; None if nothing did.
    """

    def __init__(self, address: str, seed: int, destroyed: Path) -> None:
        self._latest: dict[str, Any] = {}
        self.failed: str | None = None
        self.progress = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak_driver", address, str(seed), str(destroyed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._hear)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if found != self._latest:
                    self.progress = time.monotonic()
                self._latest = found

    def _hear(self) -> None:
        assert self._process.stderr is not None
        self._errors += self._process.stderr

    @property
    def job(self) -> str:
        """The id of its Ray job; empty before it has done anything."""
        return str(self._latest.get("job", ""))

    @property
    def operations(self) -> collections.Counter[str]:
        """What it has done."""
        return collections.Counter(self._latest.get("operations", {}))

    def tell(self, what: str) -> None:
        """Have it do something after the step it is at; see `soak_driver`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()

    def failure(self) -> str | None:
        if self._process.poll() is not None:
            self._join()
            return self._ended()
        if time.monotonic() - self.progress > HANG + 60:
            return f"a driver did nothing for {HANG + 60} seconds"
        return None

    def stop(self, *, kill: bool = False) -> collections.Counter[str]:
        """End it, which without `kill` is after the step it is at; returns what it did.

        What went wrong with it until then is in `failed`.
        """
        assert self._process.stdin is not None
        self.failed = self.failure()
        if kill:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.failed = self.failed or f"a driver did not end within {HANG} seconds"
            self._process.kill()
            self._process.wait()
        self._join()
        if self._process.returncode and not (kill or self.failed):
            self.failed = self._ended()
        return self.operations

    def _ended(self) -> str:
        return f"a driver ended: {''.join(self._errors[-30:])}"

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


class Watch(threading.Thread):
    """Looks at the IO workers every few seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[int, _Looks] = {}
        self.growth: dict[str, int] = dict.fromkeys(MOST_GROWTH, 0)
        self._grown: dict[str, str] = {}  # by what
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def failures(self) -> list[str]:
        if not self._first:
            return ["no IO worker was looked at"]
        return [
            f"an IO worker grew by {self.growth[name]} ({name}): {self._grown[name]}"
            for name, most in MOST_GROWTH.items()
            if self.growth[name] > most
        ]

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_INTERVAL):
            for worker in io_workers():
                with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile
                    self._look_at(worker)

    def _look_at(self, worker: psutil.Process) -> None:
        found = _looks_of(worker)
        first = self._first.setdefault(worker.pid, found)
        for name, has in found.items():
            growth = has.total() - first[name].total()
            if growth > self.growth[name]:
                self.growth[name] = growth
                self._grown[name] = (
                    f"{dict(has - first[name])} came, {dict(first[name] - has)} went"
                )


_Looks = dict[str, collections.Counter[str]]


def _looks_of(worker: psutil.Process) -> _Looks:
    """What a process has: bytes of memory, threads by name, and open files by what they are."""
    process = Path(f"/proc/{worker.pid}")
    threads, files = collections.Counter[str](), collections.Counter[str]()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
        for thread in process.glob("task/*/comm"):
            threads[thread.read_text().strip()] += 1
        for file in process.glob("fd/*"):
            files[str(file.readlink()).partition(":")[0]] += 1
        for connection in worker.net_connections("tcp"):
            files[f"{connection.status} to {connection.raddr and connection.raddr.port}"] += 1
            files["socket"] -= 1
    memory = collections.Counter({"bytes": own_memory(worker)})
    return {"memory": memory, "threads": threads, "files": files}
