"""Calls with a deadline, one after another: a thread makes them, and whoever waits for one can stop waiting."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ...deadline import StillRunning

__all__ = ["CallThread"]

Value = TypeVar("Value")


class CallThread:
    """A thread that makes calls for one caller: quicker than a thread for each.

    It begins with the first call. A call that had not begun when its time was over is never made; one that had goes on,
    and from then on `lost` says so.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._running = False
        self._pid = 0
        self.lost = False
        """Whether nobody waits any more for a call that has begun."""

    def call(self, timeout_s: float, call: Callable[[], Value]) -> Value:
        """Return what ``call`` returns, or raise what it raises. Raises `StillRunning` after ``timeout_s``."""
        if not self._running or self._pid != os.getpid():
            self._begin()
        job = _Job(call)
        self._jobs.put(job)
        try:
            if not job.done.acquire(timeout=timeout_s) and not job.has_ended():
                raise StillRunning
        except BaseException:
            # also where the wait is interrupted
            if not job.withdraw() and not job.has_ended():
                self.lost = True
                self.close()
            raise
        return job.result()

    def close(self) -> None:
        """End the thread when it has nothing to do any more. Idempotent."""
        if self._running:
            self._running = False
            self._jobs.put(None)

    def _begin(self) -> None:
        # a fork has neither the thread nor a use for what was queued for it
        self._running = False
        self._pid = os.getpid()
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=_work, args=[self._jobs], name=self._name, daemon=True).start()
        self._running = True


class _Job(Generic[Value]):
    """A call and what came of it; ``done`` is locked until then."""

    __slots__ = ("_begun", "_call", "_error", "_value", "done")

    def __init__(self, call: Callable[[], Value]) -> None:
        self._call = call
        self._value: Value | None = None
        self._error: BaseException | None = None
        # held by whoever comes first: the thread that makes the call, or the caller who does not want it any more
        self._begun = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001  # every kind of it goes to the caller's thread
            self._error = error
        self.done.release()

    def has_ended(self) -> bool:
        """Whether the call was made, after all."""
        return self.done.acquire(blocking=False)

    def withdraw(self) -> bool:
        """Have the call not made; False where it is too late for that."""
        return self._begun.acquire(blocking=False)

    def result(self) -> Value:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def _work(jobs: queue.SimpleQueue[_Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
