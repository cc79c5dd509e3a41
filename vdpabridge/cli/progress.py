"""A line on a terminal that says how far a transfer is; nothing if nobody watches, or if it is soon over."""

from __future__ import annotations

import sys
import threading
import time
from typing import Self

from .readable import bytes_text, duration_text

__all__ = ["ProgressLine"]

#: Who waits for less than this needs no explanation.
_PATIENCE_S = 1.0
_INTERVAL_S = 0.2
#: After which a transfer is said to stand still.
_STALLED_S = 2.0


class ProgressLine:
    """Call it with the number of bytes so far. It is wiped away at the end of the context.

    A thread of its own keeps it true while nothing moves: then it says for how long.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin_s = self._moved_s = time.monotonic()
        self._done_bytes = 0
        self._width = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, done_bytes: int) -> None:
        """Note how far it is."""
        if done_bytes != self._done_bytes:
            self._done_bytes, self._moved_s = done_bytes, time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._watch, name="vdpabridge-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            if self._width:
                self._write(" " * self._width + "\r")

    def _watch(self) -> None:
        wait_s = _PATIENCE_S
        while not self._ended.wait(wait_s):
            wait_s = _INTERVAL_S
            text = self._text(time.monotonic())
            self._write(text.ljust(self._width))
            self._width = len(text)

    def _text(self, now_s: float) -> str:
        took_s, still_s = now_s - self._begin_s, now_s - self._moved_s
        text = f"{self._what}: {bytes_text(self._done_bytes)} in {duration_text(took_s)}"
        if still_s >= _STALLED_S:
            return f"{text}, nothing has moved for {duration_text(still_s)}"
        return f"{text}, {bytes_text(int(self._done_bytes / took_s))}/s"

    def _write(self, text: str) -> None:
        try:
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
        except OSError:
            # the terminal is gone, and nobody watches any more
            self._ended.set()
