"""Runs steps that may hang in separate threads, and waits for each only as long as it may take.

A system call on a share with an unreachable server cannot be interrupted and has no time limit, and
an object store's client may retry for minutes. The caller of such a step gets `StalledError` once
the step has made no progress for its limit. The step itself continues. Its thread takes no other
job until it returns, and is a daemon, so that the process can end without it.
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

# A step can hang forever, for example on a share that was lazily unmounted and mounted again, so
# other threads are tried before it returns. With so many hung ones, each further one doubles the
# pause, up to these seconds: a thread costs little, but a share can be away for days.
_FEW_HUNG, _LONGEST_PAUSE = 3, 3600.0
_NOW = float("-inf")

# In a thread of a `StepThread`: that `StepThread`.
_this = threading.local()

_T = TypeVar("_T")


class StalledError(Exception):
    """A step has made no progress for `seconds`. It continues, but nobody waits for it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no progress for {seconds:.0f} s")
        self.seconds = seconds


def begin_step(limit: float) -> None:
    """Record that this thread's job has made progress: its next step may take `limit` seconds.

    Outside a `StepThread` this does nothing.

    Raises:
        StalledError: nobody waits for the job any more.
    """
    thread = getattr(_this, "thread", None)
    if thread is not None:
        thread.begin_step(limit)


class Job(Generic[_T]):
    """Work given to a thread; `StepThread.wait` returns its result."""

    def __init__(self, work: Callable[[], _T], *, is_final: bool) -> None:
        self._work: Callable[[], _T] | None = work
        self.is_final = is_final
        self._error: BaseException | None = None
        # Held until the job is done: a lock is faster than a `threading.Event`.
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def run(self) -> bool:
        """Do the work unless it was dropped; return whether it failed."""
        work, self._work = self._work, None
        if work is not None:
            try:
                self._value = work()
            except BaseException as error:
                self._error = error
        return self._error is not None

    def drop(self) -> None:
        """Skip the job if it has not begun and is not final. No thread may wait for it any more."""
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
            # Breaks the reference cycle of the error, its traceback and this frame.
            del error


class StepThreads:
    """Threads for jobs with steps that may hang. Thread-safe.

    There are as many threads as are used at a time. While one hangs, further jobs fail at once with
    `StalledError`, until its step returns. Meanwhile one job every `retry` seconds, and less often
    while several hang, is tried in another thread; if it ends, jobs are accepted again.

    Args:
        name: part of the threads' names.
        limit: seconds that the first step of a job may take.
        retry: seconds between two tries while a thread hangs.
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
        """Run `work` in a thread, or here if this is one of them; return or raise its result.

        Raises:
            StalledError: it makes no progress, or another job hangs.
        """
        if hasattr(_this, "thread"):
            return work()
        with self.thread() as thread:
            return thread.run(work)

    @contextlib.contextmanager
    def thread(self) -> Iterator[StepThread]:
        """Give the caller a thread of its own. Waits for it at the end, unless it hangs.

        Raises:
            StalledError: another job hangs.
        """
        thread = self._take()
        try:
            yield thread
        finally:
            thread.settle()
            self._put_back(thread)

    def close(self) -> None:
        """End the threads; a hung one ends when its step returns. The next job starts new ones."""
        with self.lock:
            idle, self._idle = self._idle, []
            for thread in self._hung:
                thread.is_ending = True
        for thread in idle:
            thread.end()

    def _take(self) -> StepThread:
        with self.lock:
            if self._hung:
                if time.monotonic() < self._retry_at:
                    raise StalledError(max(thread.seconds_at_step for thread in self._hung))
                self._retry_at = time.monotonic() + self._pause
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

    @property
    def _pause(self) -> float:
        """Seconds until another thread is tried."""
        doubled = max(0, len(self._hung) + 1 - _FEW_HUNG)
        return min(self._retry * 2.0**doubled, max(self._retry, _LONGEST_PAUSE))

    def _put_back(self, thread: StepThread) -> None:
        with self.lock:
            if thread.is_busy:
                self._hung.add(thread)
                self._retry_at = time.monotonic() + self._pause
            else:
                self._idle.append(thread)
                self._retry_at = _NOW

    def returned(self, thread: StepThread) -> None:
        """Make a thread that had hung available again. The caller holds the lock."""
        if thread in self._hung:
            self._hung.remove(thread)
            self._retry_at = _NOW
            if not thread.is_ending:
                self._idle.append(thread)


class StepThread:
    """Runs jobs in order. Its one user waits for them in the same order.

    When a job fails, the jobs queued behind it are dropped.

    Attributes:
        hangs: whether `StalledError` was raised since it was taken.
        is_ending: whether it ends once it has no more jobs.
    """

    def __init__(self, threads: StepThreads) -> None:
        self._thread = threading.Thread(
            target=self._do_jobs, name=f"ray-valkey-spill-{threads.name}", daemon=True
        )
        self.hangs = self.is_ending = False
        self._threads = threads
        self._given: SimpleQueue[Job[Any] | None] = SimpleQueue()
        # Guarded by the lock of `threads`: the jobs not done, the current one first.
        self._jobs: deque[Job[Any]] = deque()
        # Start of the current step, and its limit in seconds.
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
        """As the module's `begin_step`, in this thread."""
        if self.hangs and not self._is_final:
            raise StalledError(self.seconds_at_step)
        self._step = time.monotonic(), limit

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Callable[[], _T], *, is_final: bool = False) -> Job[_T]:
        """Queue a job."""
        job = Job(work, is_final=is_final)
        with self._threads.lock:
            if not self._jobs:
                self._step = time.monotonic(), self._threads.limit
            self._jobs.append(job)
        self._given.put(job)
        return job

    def wait(self, job: Job[_T]) -> _T:
        """Wait for a job, and return or raise its result.

        Raises:
            StalledError: the thread's current step takes longer than its limit.
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
        """Do `work` instead of all jobs that have not begun.

        If the thread hangs, this does not wait; the thread does `work` once its step returns.
        """
        self._drop_jobs()
        job = self.submit(work, is_final=True)
        if not self.hangs:
            with contextlib.suppress(StalledError):
                self.wait(job)

    def settle(self) -> None:
        """Drop the jobs that have not begun, and wait for the current one, unless it hangs."""
        if self.is_busy:
            self.finish(lambda: None)

    def end(self) -> None:
        """End the thread, which must be idle."""
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
