"""Signals that must wait: what they would cut in two cannot be told from the outside, nor put right."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["harmless", "uninterrupted"]

Handler = TypeVar("Handler", bound=Callable[..., Any])


def harmless(handler: Handler) -> Handler:
    """Mark a signal's handler that raises nothing: it need not wait."""
    handler.__dict__["harmless"] = True
    return handler


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have what SIGINT and SIGTERM bring about happen when the body is done; in the main thread, the only one that it
    interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferral = _Deferral()
    try:
        deferral.install()
        yield
    finally:
        deferral.end()


class _Deferral:
    """Stands in for handlers. Where it is left behind, by a signal between two instructions, it does as they do."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[int] = []
        self._active = True

    def install(self) -> None:
        # not by a mask: the kernel would give the signal to another thread, and Python its handler to this one
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN) and not getattr(handler, "harmless", False):
                self._handlers[number] = handler
                signal.signal(number, self)

    def __call__(self, number: int, frame: object) -> None:
        if self._active:
            self._came.append(number)
        elif callable(handler := self._handlers[number]):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def end(self) -> None:
        """Put the handlers back, and have what came happen."""
        self._active = False
        try:
            self._restore(list(self._handlers.items()))
        finally:
            self._deliver()

    def _restore(self, handlers: list[tuple[int, Any]]) -> None:
        """All of them, also where one is called at once, and raises."""
        if handlers:
            try:
                signal.signal(*handlers.pop())
            finally:
                self._restore(handlers)

    def _deliver(self) -> None:
        if self._came:
            try:
                signal.raise_signal(self._came.pop(0))
            finally:
                self._deliver()
