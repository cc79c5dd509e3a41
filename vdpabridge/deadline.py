"""Deadlines for calls that can block: a countdown, and a way to stop waiting for a call that cannot be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Deadline", "StillRunning", "call_within"]

Value = TypeVar("Value")


class Deadline:
    """A point in time, ``timeout_s`` from now; None never comes."""

    __slots__ = ("_end_s", "timeout_s")

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Seconds left, never below 0; None where there is no deadline."""
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._end_s is not None and time.monotonic() >= self._end_s


class StillRunning(Exception):
    """A call was not over in time. Not a TimeoutError: the kernel has one of those of its own (ETIMEDOUT)."""


def call_within(timeout_s: float, call: Callable[[], Value], discard: Callable[[Value], None] | None = None) -> Value:
    """Run ``call`` in a thread of its own and return its result, or raise what it raised.

    Raises `StillRunning` after ``timeout_s``; the call itself goes on, as a system call that sleeps uninterruptibly
    cannot be ended from user space. Its result, should it still come, goes to ``discard``; so it does where the wait
    is interrupted (Ctrl-C).
    """
    result: list[Value] = []
    error: list[BaseException] = []
    abandoned = False
    handing_over = threading.Lock()

    def run() -> None:
        try:
            value = call()
        except BaseException as caught:  # noqa: BLE001  # every kind of it goes to the caller's thread
            error.append(caught)
            return
        with handing_over:
            result.append(value)
            if abandoned and discard:
                discard(value)

    thread = threading.Thread(target=run, name="vdpabridge-call", daemon=True)
    thread.start()
    try:
        thread.join(timeout_s)
    finally:
        with handing_over:
            abandoned = not result and not error
    if abandoned:
        raise StillRunning
    if error:
        raise error[0]
    return result[0]
