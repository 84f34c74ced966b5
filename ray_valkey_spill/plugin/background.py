"""Recurring work in a background thread."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable

__all__ = ["Background"]

logger = logging.getLogger("ray_valkey_spill")

# Seconds. Shorter than a lease (see `cleanup`), so that one failure does not let it run out.
_AFTER_FAILURE = 15.0


class Background:
    """Runs `work` repeatedly in a daemon thread, from `start` to `stop`.

    Args:
        work: returns the seconds until its next run, which may come up to 30 % later. If it raises,
            the error is logged, and the next run follows within 20 s.
        name: name of the thread.
    """

    def __init__(self, work: Callable[[], float], name: str = "background") -> None:
        self._work = work
        self._name = f"ray-valkey-spill-{name}"
        self._waking = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it was started before. Its first run begins at once.

        If the thread cannot be started, the next call tries again.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def wake(self) -> None:
        """Make the next run begin at once, or right after the one in progress."""
        self._waking.set()

    def stop(self) -> None:
        """End the thread after the run in progress, and wait for it."""
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
            # Jitter spreads workers that started together or waited together.
            self._waking.wait(pause * random.uniform(1.0, 1.3))
            self._waking.clear()
