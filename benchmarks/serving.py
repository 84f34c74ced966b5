"""A process that is asked and answers by lines of JSON, over its standard input and output.

Both sides of it: `serve` in the process, `Process` in the one that asks. A process ends when its
input does, so none outlives the benchmark.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Process", "serve"]


def serve(target: object) -> None:
    """Answer each request by what the method of `target` that it names returns."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        for line in sys.stdin:
            name, arguments = json.loads(line)
            print(json.dumps(getattr(target, name)(**arguments)), file=answers, flush=True)


class Process(contextlib.AbstractContextManager["Process"]):
    """A process that serves.

    Args:
        command: its command line.
        env: what its environment has beside ours.
        cwd: its working directory.
    """

    def __init__(
        self, command: Sequence[str | Path], env: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self._name = " ".join(map(str, command[-2:]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
            cwd=cwd,
            text=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, name: str, **arguments: Any) -> Any:
        self.send(name, **arguments)
        return self.receive()

    def send(self, name: str, **arguments: Any) -> None:
        """Ask without waiting for the answer, so that several processes work at once."""
        print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)

    def receive(self) -> Any:
        """The answer to the first request that has none yet.

        Raises:
            ChildProcessError: the process has ended; its traceback is on standard error.
        """
        answer = self._process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"{self._name} has ended with {self._process.wait()}")
        return json.loads(answer)
