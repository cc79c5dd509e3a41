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
    """A thread that makes one call after another for whoever may have to stop waiting: quicker than one for each.

    It begins with the first call. A call that lasts too long keeps its thread; the next one gets another. One caller
    at a time.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._running = False
        self._pid = 0

    def call(self, timeout_s: float, call: Callable[[], Value]) -> Value:
        """Return what ``call`` returns, or raise what it raises. Raises `StillRunning` after ``timeout_s``."""
        if not self._running or self._pid != os.getpid():
            self._begin()
        job = _Job(call)
        self._jobs.put(job)
        try:
            if not job.done.acquire(timeout=timeout_s):
                raise StillRunning
        except BaseException:
            # also where the wait is interrupted: the call goes on
            self.close()
            raise
        return job.result()

    def close(self) -> None:
        """End the thread when it has nothing to do any more. Idempotent."""
        if self._running:
            self._running = False
            self._jobs.put(None)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=_work, args=[self._jobs], name=self._name, daemon=True).start()
        self._running = True


class _Job(Generic[Value]):
    """A call and what came of it; ``done`` is locked until then."""

    __slots__ = ("_call", "_error", "_value", "done")

    def __init__(self, call: Callable[[], Value]) -> None:
        self._call = call
        self._value: Value | None = None
        self._error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001  # every kind of it goes to the caller's thread
            self._error = error
        self.done.release()

    def result(self) -> Value:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def _work(jobs: queue.SimpleQueue[_Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
