"""What the control socket has the device's own thread do: one thing after another."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Errand", "Errands"]


class Errand:
    """Something to be done by the device's thread, unless somebody else answers for it before."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Whether it is the caller's to do, or to answer for: the first one's who asks."""
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
        """Have ``errand`` done after those that were put before."""
        self._waiting.append(errand)
        os.eventfd_write(self._count, 1)

    def fileno(self) -> int:
        """Readable while something is to be done; borrowed."""
        return self._count

    def run_one(self) -> None:
        """Do the next one."""
        os.eventfd_read(self._count)
        errand = self._waiting.popleft()
        if errand.claim():
            errand.run()

    def close(self) -> None:
        """Forget what was not done. Idempotent."""
        self._waiting.clear()
        if self._count >= 0:
            os.close(self._count)
            self._count = -1
