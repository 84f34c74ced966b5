"""Work that is done now and then beside everything else."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable

__all__ = ["Background"]

logger = logging.getLogger("ray_valkey_spill")

# Less than a lease lasts: see `cleanup`.
_AFTER_FAILURE = 15.0


class Background:
    """Has a thread do `work` again and again, from `start` to `stop`.

    The thread does not keep its process alive.

    Args:
        work: returns after how many seconds, or somewhat more, it is to be done again. If it
            raises, that is logged, and it is done again soon.
        name: of the thread.
    """

    def __init__(self, work: Callable[[], float], name: str = "background") -> None:
        self._work = work
        self._name = f"ray-valkey-spill-{name}"
        self._waking = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, which does its work at once, unless that has been done.

        Where no thread can be had there is none until the next call.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def wake(self) -> None:
        """Have the work done soon: there is some."""
        self._waking.set()

    def stop(self) -> None:
        """End the thread, once it has done what it is at."""
        self._stopping = True
        self.wake()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            try:
                pause = self._work()
            except Exception:
                logger.exception("the background work failed")
                pause = _AFTER_FAILURE
            # Workers that started together, or that waited together, do not stay together.
            self._waking.wait(pause * random.uniform(1.0, 1.3))
            self._waking.clear()
