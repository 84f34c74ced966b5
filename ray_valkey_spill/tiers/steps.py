"""Steps that may hang: done in threads of their own, and waited for only as long as each may take.

A system call on a share whose server is away cannot be interrupted and has no time limit, and an
object store's client may retry for minutes. Whoever waits for such a step here gets `StalledError`
once it has made no progress for as long as it may. The step itself goes on: its thread takes
nothing else until it returns, and is a daemon, so that no process waits for it at its end.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

__all__ = ["Job", "StalledError", "StepThread", "StepThreads", "begin_step"]

# Threads that may hang at a time. A step can hang for good, as one on a share that was unmounted
# lazily and mounted again: so it is not only a hung step's return that ends an outage.
_MOST_HUNG = 3
_NOW = float("-inf")

# The `StepThread` that a thread is, if it is one.
_this = threading.local()

_T = TypeVar("_T")


class StalledError(Exception):
    """A step has made no progress for `seconds`, and goes on without anybody who waits for it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no progress for {seconds:.0f} s")
        self.seconds = seconds


def begin_step(limit: float) -> None:
    """Note that this thread's job has made progress: its next step may take `limit` seconds.

    Outside of a `StepThread` nobody waits, and this does nothing.

    Raises:
        StalledError: nobody waits for the job any more.
    """
    thread = getattr(_this, "thread", None)
    if thread is not None:
        thread.begin_step(limit)


class Job(Generic[_T]):
    """What a thread was given to do; `StepThread.wait` returns its result."""

    def __init__(self, work: Callable[[], _T], *, is_final: bool) -> None:
        self._work: Callable[[], _T] | None = work
        self.is_final = is_final
        self._error: BaseException | None = None
        # Held until the job is done: a lock is the fastest event there is.
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def run(self) -> bool:
        """Do it, unless it was dropped; returns whether it failed."""
        work, self._work = self._work, None
        if work is not None:
            try:
                self._value = work()
            except BaseException as error:
                self._error = error
        return self._error is not None

    def drop(self) -> None:
        """Do nothing if it has not begun, and is not final. Nobody may wait for it from now on."""
        if not self.is_final:
            self._work = None

    def end(self) -> None:
        self._under_way.release()

    def ends_within(self, seconds: float) -> bool:
        return self._under_way.acquire(timeout=max(0.0, seconds))

    def result(self) -> _T:
        error, self._error = self._error, None
        if error is None:
            return self._value
        try:
            raise error
        finally:
            # Its traceback refers to this frame, which would keep it and all it refers to.
            del error


class StepThreads:
    """Threads for jobs whose steps may hang. Thread-safe.

    There are as many as are used at a time. While one hangs, further jobs fail at once with
    `StalledError`; once it has returned, they are done again. Meanwhile one job is tried in another
    thread every `retry` seconds, as long as only a few hang, and jobs are done again if it ends.

    Args:
        name: what the threads are called.
        limit: seconds that the first step of a job may take.
        retry: seconds.
    """

    def __init__(self, name: str, limit: float, retry: float) -> None:
        self.name = name
        self.limit = limit
        self.lock = threading.Lock()
        self._retry = retry
        self._retry_at = _NOW
        self._idle: list[StepThread] = []
        self._hung: set[StepThread] = set()

    def run(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises. In one of the threads, it is done right there.

        Raises:
            StalledError
        """
        if hasattr(_this, "thread"):
            return work()
        with self.thread() as thread:
            return thread.run(work)

    @contextlib.contextmanager
    def thread(self) -> Iterator[StepThread]:
        """A thread for the caller alone. At the end it is waited for, unless it hangs.

        Raises:
            StalledError
        """
        thread = self._take()
        try:
            yield thread
        finally:
            thread.settle()
            self._put_back(thread)

    def close(self) -> None:
        """End the threads, one that hangs when its step returns. The next job starts others."""
        with self.lock:
            idle, self._idle = self._idle, []
            for thread in self._hung:
                thread.is_ending = True
        for thread in idle:
            thread.end()

    def _take(self) -> StepThread:
        with self.lock:
            if self._hung:
                if len(self._hung) >= _MOST_HUNG or time.monotonic() < self._retry_at:
                    raise StalledError(max(thread.seconds_at_step for thread in self._hung))
                self._retry_at = time.monotonic() + self._retry
            if self._idle:
                thread = self._idle.pop()
                thread.hangs = False
                return thread
        thread = StepThread(self)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from error
        return thread

    def _put_back(self, thread: StepThread) -> None:
        with self.lock:
            if thread.is_busy:
                self._hung.add(thread)
                self._retry_at = time.monotonic() + self._retry
            else:
                self._idle.append(thread)
                self._retry_at = _NOW

    def returned(self, thread: StepThread) -> None:
        """Use a thread again if it is one that has hung. The caller holds the lock."""
        if thread in self._hung:
            self._hung.remove(thread)
            self._retry_at = _NOW
            if not thread.is_ending:
                self._idle.append(thread)


class StepThread:
    """Does jobs in order. Whoever uses it is one thread, and waits for them in that order too.

    After a job that failed, those that were given before it was waited for are dropped.

    Attributes:
        hangs: whether `StalledError` was raised since it was taken.
        is_ending: whether it is to end once it has nothing to do.
    """

    def __init__(self, threads: StepThreads) -> None:
        self._thread = threading.Thread(
            target=self._do_jobs, name=f"ray-valkey-spill-{threads.name}", daemon=True
        )
        self.hangs = self.is_ending = False
        self._threads = threads
        self._given: SimpleQueue[Job[Any] | None] = SimpleQueue()
        # Guarded by the lock of `threads`: what is not done, first what is being done.
        self._jobs: deque[Job[Any]] = deque()
        # When the step that is under way began, and how long it may take.
        self._step = time.monotonic(), threads.limit
        self._is_final = False

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs)

    @property
    def seconds_at_step(self) -> float:
        began, _ = self._step
        return time.monotonic() - began

    def begin_step(self, limit: float) -> None:
        """As `begin_step` of the module, in this thread."""
        if self.hangs and not self._is_final:
            raise StalledError(self.seconds_at_step)
        self._step = time.monotonic(), limit

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Callable[[], _T], *, is_final: bool = False) -> Job[_T]:
        """Give it a job, to be done after those before it."""
        job = Job(work, is_final=is_final)
        with self._threads.lock:
            if not self._jobs:
                self._step = time.monotonic(), self._threads.limit
            self._jobs.append(job)
        self._given.put(job)
        return job

    def wait(self, job: Job[_T]) -> _T:
        """What the job returns or raises.

        Raises:
            StalledError: the thread's step takes longer than it may.
        """
        while True:
            began, limit = self._step
            if job.ends_within(began + limit - time.monotonic()):
                return job.result()
            began, limit = self._step
            if (seconds := time.monotonic() - began) >= limit:
                self.hangs = True
                raise StalledError(seconds)

    def run(self, work: Callable[[], _T]) -> _T:
        return self.wait(self.submit(work))

    def finish(self, work: Callable[[], object]) -> None:
        """Do `work` in place of all that has not begun.

        If the thread hangs this does not wait; `work` is done when its step has returned.
        """
        self._drop_jobs()
        job = self.submit(work, is_final=True)
        if not self.hangs:
            with contextlib.suppress(StalledError):
                self.wait(job)

    def settle(self) -> None:
        """Drop what has not begun, and wait for the step that is under way, unless it hangs."""
        if self.is_busy:
            self.finish(lambda: None)

    def end(self) -> None:
        """End the thread, which has nothing to do."""
        self._given.put(None)
        self._thread.join()

    def _drop_jobs(self) -> None:
        with self._threads.lock:
            for job in self._jobs:
                job.drop()

    def _do_jobs(self) -> None:
        _this.thread = self
        while (job := self._given.get()) is not None:
            self._step = time.monotonic(), self._threads.limit
            self._is_final = job.is_final
            failed = job.run()
            with self._threads.lock:
                self._jobs.popleft()
                for later in self._jobs if failed else ():
                    later.drop()
                if not self._jobs:
                    self._threads.returned(self)
                is_over = self.is_ending and not self._jobs
            job.end()
            del job
            if is_over:
                return
