"""What a server says on standard error: at once, never waiting for a reader, and no more than somebody can read."""

from __future__ import annotations

import os
import select
import time

from ..linux.deadline import NOW

__all__ = ["Reports"]

#: A line is no longer, so that a pipe that has room takes all of it (PIPE_BUF).
_LINE_BYTES_MAX = 4096
#: Lines at once, and lines a second in the long run: a front-end can cause as many as it likes.
_BURST = 50
_PER_S = 2.0


class Reports:
    """Writes lines to ``fd`` (borrowed). What does not fit, or comes too often, is counted and left out."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._room = float(_BURST)
        self._at_s = time.monotonic()
        self._left_out = 0

    def __call__(self, text: str) -> None:
        """Say ``text``, if there have not been too many."""
        now_s = time.monotonic()
        self._room = min(float(_BURST), self._room + (now_s - self._at_s) * _PER_S)
        self._at_s = now_s
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        self.trace(text)

    def trace(self, text: str) -> None:
        """Say ``text``, however many there have been."""
        self.close()
        if not self._write(text):
            self._left_out += 1

    def close(self) -> None:
        """Say how many were left out. Idempotent."""
        if self._left_out and self._write(f"reports that were left out: {self._left_out}"):
            self._left_out = 0

    def _write(self, text: str) -> bool:
        line = f"vdpabridge: {text}".encode(errors="backslashreplace")[: _LINE_BYTES_MAX - 1] + b"\n"
        try:
            if not NOW.wait({self._fd: select.POLLOUT}):
                return False
            os.write(self._fd, line)
        except OSError:
            # whoever listened there is gone: nobody is left to be told
            return True
        return True
