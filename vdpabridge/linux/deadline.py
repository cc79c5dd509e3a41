"""Deadlines for calls that can block: a countdown, and a way to stop waiting for a call that cannot be stopped."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["NOW", "Deadline", "StillRunning", "TimeLimit", "call_within"]

Value = TypeVar("Value")


class Deadline:
    """A point in time, ``timeout_s`` from now; None never comes."""

    __slots__ = ("_end_s", "timeout_s")

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Seconds left, never below 0; None if there is no deadline."""
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._end_s is not None and time.monotonic() >= self._end_s

    def wait(self, events: Mapping[int, int]) -> set[int]:
        """Wait for one of ``events``, which has poll(2) flags for each descriptor (borrowed).

        Returns the descriptors that are ready, or failed; none if the time was over before.
        """
        poll = select.poll()
        for fd, flags in events.items():
            poll.register(fd, flags)
        left_s = self.left_s()
        return {fd for fd, _ in poll.poll(None if left_s is None else left_s * 1000)}


#: For a look without waiting.
NOW = Deadline(0)


class TimeLimit:
    """How long to wait for a device: one deadline for a whole operation, however many waits it has.

    ``timeout_s`` bounds each operation; None waits for ever. A caller of several operations can bound them together
    (`within`). One thread at a time; only `timeout_s` may be set from elsewhere, for example from a signal handler.
    """

    __slots__ = ("_bound", "_running", "_timeout_s")

    def __init__(self, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._running: Deadline | None = None
        self._bound: Deadline | None = None

    @property
    def timeout_s(self) -> float | None:
        """Seconds for one operation. Setting it can shorten an operation under way, and never prolongs it."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        if self._running is not None:
            self._running = _sooner(self._running, Deadline(timeout_s))

    def begin(self) -> bool:
        """Begin an operation; returns whether it is one of its own, which `end` must end, and not a part of another."""
        if self._running is not None:
            return False
        self._running = self._fresh()
        return True

    def end(self) -> None:
        """End the operation."""
        self._running = None

    def deadline(self) -> Deadline:
        """The deadline of the operation under way; outside of one, that of an operation that begins now."""
        return self._running or self._fresh()

    def left_s(self) -> float | None:
        """Seconds left for the operation, never below 0; None if there is no deadline."""
        return self.deadline().left_s()

    @property
    def passed(self) -> bool:
        """Whether no time is left, not even to begin."""
        return self.deadline().passed

    @contextmanager
    def within(self, deadline: Deadline) -> Iterator[None]:
        """Let the operations in the body end by ``deadline`` as well."""
        before = self._bound
        self._bound = deadline if before is None else _sooner(before, deadline)
        try:
            yield
        finally:
            self._bound = before

    def _fresh(self) -> Deadline:
        own = Deadline(self._timeout_s)
        return own if self._bound is None else _sooner(own, self._bound)


def _sooner(one: Deadline, other: Deadline) -> Deadline:
    mine, theirs = one.left_s(), other.left_s()
    return one if theirs is None or (mine is not None and mine <= theirs) else other


class StillRunning(Exception):
    """A call was not over in time. Not a TimeoutError: Python raises that for the kernel's ETIMEDOUT."""


def call_within(timeout_s: float, call: Callable[[], Value], discard: Callable[[Value], None] | None = None) -> Value:
    """Run ``call`` in a thread of its own and return its result, or raise what it raised.

    Raises `StillRunning` after ``timeout_s``; the call itself continues, because user space cannot end a system call
    that sleeps uninterruptibly. If its result still comes, it goes to ``discard``; also if the wait is interrupted
    (Ctrl-C).
    """
    result: list[Value] = []
    error: list[BaseException] = []
    abandoned = False
    handing_over = threading.Lock()

    def run() -> None:
        try:
            value = call()
        except BaseException as caught:  # noqa: BLE001  # every exception goes to the caller's thread
            error.append(caught)
            return
        with handing_over:
            result.append(value)
            if abandoned and discard:
                discard(value)

    thread = threading.Thread(target=run, name="vdpabridge-call", daemon=True)
    try:
        thread.start()
        thread.join(timeout_s)
    except BaseException:
        with handing_over:
            abandoned = True
            if result and discard:
                discard(result.pop())
        raise
    with handing_over:
        abandoned = not result and not error
    if abandoned:
        raise StillRunning
    if error:
        raise error[0]
    return result[0]
