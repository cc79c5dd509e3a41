"""Eventfds of somebody else's making: signalled and cleared without ever waiting."""

from __future__ import annotations

import os
import select

__all__ = ["clear", "is_eventfd", "signal"]


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` (borrowed) is one. Raises OSError for what is no descriptor."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def signal(eventfd: int | None) -> None:
    """Signal ``eventfd`` (borrowed), if there is one: a counter that is full is signal enough."""
    if eventfd is not None:
        poll = select.poll()
        poll.register(eventfd, select.POLLOUT)
        if poll.poll(0):
            os.eventfd_write(eventfd, 1)


def clear(eventfd: int) -> None:
    """Read ``eventfd`` (borrowed), whatever its own mode is: somebody else may have read it meanwhile."""
    try:
        os.preadv(eventfd, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return
