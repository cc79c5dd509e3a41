"""What a server says on standard error: at once, never waiting for a reader, and no more than somebody can read."""

from __future__ import annotations

import os
import select
import threading
import time
from functools import partial

from ..linux.deadline import NOW

__all__ = ["LEVELS", "Log"]

#: Level -> its number in syslog(3), by which journald files a line.
LEVELS = {"error": 3, "warning": 4, "info": 6, "debug": 7}
#: A line is no longer, so that a pipe that has room takes all of it (PIPE_BUF).
_LINE_BYTES_MAX = 4096
#: Lines at once, and lines a second in the long run: a front-end can cause as many as it likes.
_BURST = 50
_PER_S = 2.0


class Log:
    """Writes lines to ``fd`` (borrowed), with a time and a level; any thread. ``level``: the least urgent that is said.

    What does not fit, or comes too often, is counted and left out. If journald reads, it is told the level in its own
    way, and it knows the time (sd-daemon(3)).
    """

    def __init__(self, fd: int = 2, level: str = "info") -> None:
        self._fd = fd
        self._least = LEVELS[level]
        self._for_journald = _is_journald(fd)
        self._room = float(_BURST)
        self._at_s = time.monotonic()
        self._left_out = 0
        self._lock = threading.Lock()
        self.warning = partial(self.say, "warning")
        self.info = partial(self.say, "info")

    def say(self, level: str, text: str) -> None:
        """Say ``text``, unless its level is not wanted, or there have been too many."""
        if LEVELS[level] > self._least:
            return
        with self._lock:
            now_s = time.monotonic()
            self._room = min(float(_BURST), self._room + (now_s - self._at_s) * _PER_S)
            self._at_s = now_s
            if self._room < 1:
                self._left_out += 1
                return
            self._room -= 1
            self._say(level, text)

    def trace(self, text: str) -> None:
        """Say ``text``, whatever the level, and however many there have been."""
        with self._lock:
            self._say("debug", text)

    def close(self) -> None:
        """Say how many were left out. Idempotent."""
        with self._lock:
            self._confess()

    def _say(self, level: str, text: str) -> None:
        self._confess()
        if not self._write(level, text):
            self._left_out += 1

    def _confess(self) -> None:
        if self._left_out and self._write("warning", f"lines that were left out: {self._left_out}"):
            self._left_out = 0

    def _write(self, level: str, text: str) -> bool:
        begin = f"<{LEVELS[level]}>" if self._for_journald else f"vdpabridge: {_now()} {level}: "
        line = f"{begin}{text}".encode(errors="backslashreplace")[: _LINE_BYTES_MAX - 1] + b"\n"
        try:
            if not NOW.wait({self._fd: select.POLLOUT}):
                return False
            os.write(self._fd, line)
        except OSError:
            # whoever listened there is gone: nobody is left to be told
            return True
        return True


def _now() -> str:
    now_s = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(now_s))}.{int(now_s % 1 * 1000):03}"


def _is_journald(fd: int) -> bool:
    """Whether ``fd`` is the stream that systemd has connected to journald (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
