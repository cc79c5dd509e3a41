"""Calls with a deadline, one after another: a thread makes them, and the caller can stop waiting for one."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ...linux.deadline import Deadline, StillRunning

__all__ = ["CallThread"]

Value = TypeVar("Value")


class CallThread:
    """A thread that makes calls for one caller: faster than a thread for each.

    It starts with the first call. A call that has not begun when its time is over is never made, unless it must be. One
    that has begun continues, and `busy` is true until it ends.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._running = False
        self._pid = 0
        self._left: _Job[Any] | None = None
        """The call that nobody waits for any more."""

    @property
    def busy(self) -> bool:
        """Whether a call is running for which nobody waits."""
        return self._left is not None and not self._left.ended

    def call(self, timeout_s: float, call: Callable[[], Value], *, must: bool = False) -> Value:
        """Return what ``call`` returns, or raise what it raises. Raises `StillRunning` after ``timeout_s``.

        ``must``: the call is made, even if late. An interruption is raised when a call that has begun ends; a second
        one at once.
        """
        if not self._running or self._pid != os.getpid():
            self._begin()
        deadline = Deadline(timeout_s)
        job = _Job(call)
        self._jobs.put(job)
        try:
            if not job.wait(deadline):
                raise StillRunning
        except StillRunning:
            if not must:
                job.withdraw()
            raise
        except BaseException:
            # wait for a call that has begun: otherwise nobody could tell what it did
            if must or not job.withdraw():
                job.wait(deadline)
            raise
        finally:
            if not job.ended and not job.withdrawn:
                self._left = job
                self.close()
        return job.result()

    def close(self) -> None:
        """End the thread when it has nothing left to do. Idempotent."""
        if self._running:
            self._running = False
            self._jobs.put(None)

    def _begin(self) -> None:
        # a forked child does not have the thread, and does not need the calls queued for it
        self._running = False
        self._pid = os.getpid()
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=_work, args=[self._jobs], name=self._name, daemon=True).start()
        self._running = True


class _Job(Generic[Value]):
    """A call and its result."""

    __slots__ = ("_begun", "_call", "_done", "_error", "_value", "ended", "withdrawn")

    def __init__(self, call: Callable[[], Value]) -> None:
        self._call = call
        self._value: Value | None = None
        self._error: BaseException | None = None
        # held by whichever comes first: the thread that makes the call, or the caller that does not want it any more
        self._begun = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()
        self.ended = False
        self.withdrawn = False

    def run(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001  # every exception goes to the caller's thread
            self._error = error
        self.ended = True
        self._done.release()

    def wait(self, deadline: Deadline) -> bool:
        """Wait until the call has ended; returns whether it has."""
        # an interruption may come when the lock is already held, so the lock alone does not tell
        return self.ended or self._done.acquire(timeout=deadline.left_s() or 0.0) or self.ended

    def withdraw(self) -> bool:
        """Have the call not made; returns False if it is too late for that."""
        self.withdrawn = self.withdrawn or self._begun.acquire(blocking=False)
        return self.withdrawn

    def result(self) -> Value:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def _work(jobs: queue.SimpleQueue[_Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
