"""The steps of a demonstration, printed as they are done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Broken", "Timeline", "require"]


class Broken(Exception):
    """Something that must hold does not."""


class Timeline:
    """Prints each step when it is done, with the time since the start and the time it took; ``as_json``: one object a
    line."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._begin_s = time.monotonic()
        self._as_json = as_json
        if not as_json:
            print("       at      took")

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """Time the body; what it appends to the list is printed behind ``what``."""
        facts: list[str] = []
        begin_s = time.monotonic()
        yield facts
        now_s = time.monotonic()
        at_ms, took_ms = (now_s - self._begin_s) * 1000, (now_s - begin_s) * 1000
        if self._as_json:
            print(json.dumps({"step": what, "at_ms": at_ms, "took_ms": took_ms, "facts": facts}), flush=True)
            return
        detail = f": {', '.join(facts)}" if facts else ""
        print(f"{at_ms:7.1f} ms {took_ms:6.1f} ms  {what}{detail}", flush=True)


def require(truth: bool, what: str) -> None:
    """Raise `Broken` unless ``truth``."""
    if not truth:
        raise Broken(what)
