"""Signals that must wait: what they would cut in two cannot be told from the outside, nor put right."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uninterrupted"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have what SIGINT and SIGTERM bring about happen when the body is done; in the main thread, the only one that it
    interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # not by a mask: the kernel would give the signal to another thread, and Python its handler to this one
    deferred = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    for number in deferred:
        signal.signal(number, lambda which, _frame: came.append(which))
    try:
        yield
    finally:
        for number in deferred:
            signal.signal(number, before[number])
        for which in came:
            signal.raise_signal(which)
