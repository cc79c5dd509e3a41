"""Exactly as many bytes as asked for, out of a descriptor that gives what it has."""

from __future__ import annotations

from collections.abc import Callable

from .channel import STEP_BYTES, Limits, read_some

__all__ = ["reading"]


def reading(source: int, limits: Limits) -> Callable[[int], bytes]:
    """A function that reads so many bytes of ``source`` (borrowed), fewer only at its end; it may read ahead."""
    buffered = bytearray()
    room = memoryview(bytearray(STEP_BYTES))

    def read(size: int) -> bytes:
        while len(buffered) < size:
            count = read_some(source, room, limits)
            if not count:
                break
            buffered.extend(room[:count])
        data = bytes(buffered[:size])
        del buffered[:size]
        return data

    return read
