"""A line on a terminal that says how far a transfer is; nothing where nobody watches, or where it is soon over."""

from __future__ import annotations

import sys
import time
from typing import Self

__all__ = ["ProgressLine"]

#: Who waits for less than this needs no explanation.
_PATIENCE_S = 1.0
_INTERVAL_S = 0.2


class ProgressLine:
    """Call it with the number of bytes so far. It is wiped away at the end of the context."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin_s = time.monotonic()
        self._shown_s = 0.0
        self._width = 0

    def __call__(self, done_bytes: int) -> None:
        """Show it, where it is time to."""
        now_s = time.monotonic()
        took_s = now_s - self._begin_s
        if took_s < _PATIENCE_S or now_s - self._shown_s < _INTERVAL_S or not sys.stderr.isatty():
            return
        self._shown_s = now_s
        text = f"{self._what}: {done_bytes / 1e6:.0f} MB in {took_s:.0f} s, {done_bytes / 1e6 / took_s:.0f} MB/s"
        self._write(text.ljust(self._width))
        self._width = len(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._write(" " * self._width + "\r")

    def _write(self, text: str) -> None:
        print(f"\r{text}", end="", file=sys.stderr, flush=True)
