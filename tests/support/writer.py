"""A process of its own that puts objects, so that a test can kill it between any two commands."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ray_valkey_spill.config import Config
from ray_valkey_spill.store.object_store import ObjectStore
from support.samples import noise, source

__all__ = ["Outcome", "Writer"]

_TESTS = Path(__file__).parents[1]


class Outcome(NamedTuple):
    """What `ObjectStore.put` returned: the URLs, and the class of the failure, or None."""

    urls: list[str]
    failure: str | None


class Writer:
    """Puts one batch after the other, for one node; killed at the end of its `with`.

    Args:
        params: of its `Config`.
        session, node: whose the objects are.
    """

    def __init__(self, params: Mapping[str, Any], session: str, node: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.writer", json.dumps(params), session, node],
            cwd=_TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, sizes: Sequence[int]) -> None:
        """Let it put objects of so many bytes, which are those of `samples` by their place."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(list(sizes))}\n")
        self._process.stdin.flush()

    def end(self) -> Outcome:
        """Wait for what became of them."""
        assert self._process.stdout is not None
        return Outcome(*json.loads(self._process.stdout.readline()))

    @property
    def has_ended(self) -> bool:
        """Whether `end` need not wait."""
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def put(self, sizes: Sequence[int]) -> Outcome:
        self.begin(sizes)
        return self.end()

    def kill(self) -> None:
        """By SIGKILL."""
        self._process.kill()
        self._process.communicate()


def _main(params: str, session: str, node: str) -> None:
    store = ObjectStore(Config.load(json.loads(params), {}), session, node)
    for line in sys.stdin:
        sizes = json.loads(line)
        urls, failure = store.put([source(noise(size, i), i) for i, size in enumerate(sizes)])
        print(json.dumps([urls, failure and type(failure).__name__]), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
