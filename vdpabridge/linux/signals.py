"""Makes signals wait during work that cannot be interrupted: nothing outside could notice or repair half of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Deferral", "harmless", "uninterrupted"]

Handler = TypeVar("Handler", bound=Callable[..., Any])


def harmless(handler: Handler) -> Handler:
    """Mark a signal handler that raises nothing: it need not wait."""
    handler.__dict__["harmless"] = True
    return handler


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP only when the body is done; in the main thread, which alone they interrupt."""
    deferral = Deferral()
    try:
        deferral.install()
        yield
    finally:
        deferral.end()


class Deferral:
    """Makes signals wait while one of the functions ``within`` runs, or something that it calls; always, if there are
    none. So a context manager can protect all of its ``__exit__``, which is not possible from inside of it.

    It replaces the handlers. If a signal between two instructions leaves it in place, it does what they do.
    """

    def __init__(self, *within: Callable[..., object]) -> None:
        self._codes = frozenset(function.__code__ for function in within)
        self._handlers: dict[int, Any] = {}
        self._came: list[int] = []
        self._active = True

    def install(self) -> None:
        """Begin, in the main thread; in another one nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        # not by a mask: the kernel would give the signal to another thread, and Python would run its handler in this
        # one
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            while isinstance(handler, Deferral) and not handler._active:
                handler = handler._handlers[number]
            if handler not in (None, signal.SIG_IGN) and not getattr(handler, "harmless", False):
                self._handlers[number] = handler
                signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._active and self._is_to_wait(frame):
            self._came.append(number)
        elif callable(handler := self._handlers[number]):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def _is_to_wait(self, frame: FrameType | None) -> bool:
        while self._codes and frame is not None and not self._protects(frame):
            frame = frame.f_back
        return frame is not None or not self._codes

    def _protects(self, frame: FrameType) -> bool:
        own_end = frame.f_code is Deferral.end.__code__ and frame.f_locals.get("self") is self
        return own_end or frame.f_code in self._codes

    def end(self) -> None:
        """Put the handlers back, and deliver the signals that came."""
        try:
            self._restore(list(self._handlers.items()))
        finally:
            self._active = False
            self._deliver()

    def _restore(self, handlers: list[tuple[int, Any]]) -> None:
        """Restore all of them, even if one is called at once and raises."""
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
