"""Reads exactly as many bytes as asked for, from a descriptor that may give fewer at a time."""

from __future__ import annotations

from collections.abc import Callable

from .channel import STEP_BYTES, ChannelError, Limits, read_some

__all__ = ["reading"]

#: How many bytes an image may have beside the device's state.
_OVERHEAD_BYTES = 16 << 20


def reading(source: int, limits: Limits) -> Callable[[int], bytes]:
    """A function that reads a number of bytes of ``source`` (borrowed), fewer only at its end; it may read ahead."""
    buffered = bytearray()
    came = 0
    room = memoryview(bytearray(STEP_BYTES))

    def read(size: int) -> bytes:
        nonlocal came
        while len(buffered) < size:
            count = read_some(source, room, limits)
            if not count:
                break
            came += count
            if limits.size_bytes is not None and came > limits.size_bytes + _OVERHEAD_BYTES:
                raise ChannelError("read", why=f"more than {limits.size_bytes} bytes came", hint="allow for more")
            buffered.extend(room[:count])
        data = bytes(buffered[:size])
        del buffered[:size]
        return data

    return read
