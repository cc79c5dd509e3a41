"""Signals that must wait: what they would cut in two cannot be told from the outside, nor put right."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
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
    came: list[int] = []
    before: list[tuple[int, Any]] = []
    try:
        # not by a mask: the kernel would give the signal to another thread, and Python its handler to this one
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN) and not getattr(handler, "harmless", False):
                before.append((number, handler))
                signal.signal(number, lambda which, _frame: came.append(which))
        yield
    finally:
        try:
            _restore(before)
        finally:
            _deliver(came)


def _restore(handlers: Sequence[tuple[int, Any]]) -> None:
    """Put all of ``handlers`` back, also where one of them is called at once, and raises."""
    if handlers:
        try:
            signal.signal(*handlers[0])
        finally:
            _restore(handlers[1:])


def _deliver(numbers: Sequence[int]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _deliver(numbers[1:])
