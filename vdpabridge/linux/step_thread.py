"""A thread that works in steps, and does between two steps what other threads ask of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from .deadline import StillRunning
from .eventfds import wake

__all__ = ["StepThread"]

Value = TypeVar("Value")


class StepThread:
    """Calls ``step`` again and again, from `start` to `stop`. ``crashed`` gets what ``step`` raises."""

    def __init__(self, name: str, step: Callable[[], None], crashed: Callable[[Exception], None]) -> None:
        self._name = name
        self._step = step
        self._crashed = crashed
        self._commands: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending = False
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """``step`` waits on it as well, and clears it."""

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for the step to end."""
        return self._ending or bool(self._commands)

    def start(self) -> None:
        """Begin. Raises OSError if there cannot be another thread."""
        self._ending = False
        thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None
        self._thread = thread

    def stop(self, timeout_s: float | None) -> None:
        """End after the present step. Idempotent. Raises `StillRunning` if that lasts longer than ``timeout_s``."""
        if self._thread is not None:
            self._ending = True
            wake(self.wake_fd)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise StillRunning
            self._thread = None

    def call(self, function: Callable[[], Value], timeout_s: float | None) -> Value:
        """Run ``function`` between two steps (in this thread, if there is no other); returns or raises what it does.

        Raises `StillRunning` after ``timeout_s``; a ``function`` that has not begun by then is not called any more.
        """
        if self._thread is None or threading.current_thread() is self._thread:
            return function()
        done = threading.Event()
        results: list[Value] = []
        errors: list[BaseException] = []

        def command() -> None:
            try:
                results.append(function())
            except BaseException as error:  # noqa: BLE001  # it goes to the caller's thread
                errors.append(error)
            done.set()

        with self._lock:
            self._commands.append(command)
        wake(self.wake_fd)
        if not done.wait(timeout_s):
            with self._lock:
                if command in self._commands:
                    self._commands.remove(command)
            raise StillRunning
        if errors:
            raise errors[0]
        return results[0]

    @property
    def running(self) -> bool:
        """Whether the thread makes steps."""
        return self._thread is not None and self._thread.is_alive()

    def leave(self, function: Callable[[], object]) -> None:
        """Have ``function``, which raises nothing, run between two steps, without waiting for it."""
        if self._thread is None or threading.current_thread() is self._thread:
            function()
            return
        with self._lock:
            self._commands.append(lambda: (function(), None)[1])
        wake(self.wake_fd)

    def close(self) -> None:
        """Let go of `wake_fd`, after `stop`. Idempotent."""
        if self.wake_fd >= 0:
            fd, self.wake_fd = self.wake_fd, -1
            os.close(fd)

    def _loop(self) -> None:
        while not self._ending:
            self._obey()
            try:
                self._step()
            except Exception as error:  # noqa: BLE001  # a bug here ends the device, it does not hang
                self._crashed(error)
        self._obey()

    def _obey(self) -> None:
        while True:
            with self._lock:
                if not self._commands:
                    return
                command = self._commands.pop(0)
            command()
