"""Work that the control socket gives to the device's own thread, which does one errand after another."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Errand", "Errands"]


class Errand:
    """Work for the device's thread, unless another thread answers the request first."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller may do it, or answer for it: True for the first caller only."""
        return self._claimed.acquire(blocking=False)

    def run(self) -> None:
        """Do it."""
        self._act()


class Errands:
    """A queue of errands. `put` is for any thread, the rest is for the device's."""

    def __init__(self) -> None:
        self._waiting: deque[Errand] = deque()
        self._count = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)

    def put(self, errand: Errand) -> None:
        """Add ``errand`` to the end of the queue."""
        self._waiting.append(errand)
        os.eventfd_write(self._count, 1)

    def fileno(self) -> int:
        """Readable while an errand waits; borrowed."""
        return self._count

    def run_one(self) -> None:
        """Do the next errand, unless another thread has claimed it."""
        os.eventfd_read(self._count)
        errand = self._waiting.popleft()
        if errand.claim():
            errand.run()

    def close(self) -> None:
        """Drop the errands that were not done. Idempotent."""
        self._waiting.clear()
        if self._count >= 0:
            os.close(self._count)
            self._count = -1
