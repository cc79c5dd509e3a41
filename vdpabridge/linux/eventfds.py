"""Signals and clears eventfds that other processes made, without ever waiting.

write(2) waits for a reader if the counter is full. A process that shares an eventfd can fill it at any moment, also
between a look and a write, and there is no RWF_NOWAIT for the write. The kernel itself signals without waiting, when a
piece of asynchronous I/O has ended (io_submit(2), IOCB_FLAG_RESFD). So this module gives it one that ends at once: to
read nothing from the eventfd, which is an error (EINVAL), and so the end (fs/aio.c, aio_rw_done).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from functools import cache
from typing import Any

from .deadline import NOW

__all__ = ["clear", "signal", "wake"]

#: System call numbers of io_setup, io_submit and io_getevents; a machine that is not listed has the numbers of most
#: machines.
_NUMBERS = {"x86_64": (206, 209, 208), "s390x": (243, 246, 245), "ppc64le": (227, 230, 229)}.get(
    os.uname().machine, (0, 2, 4)
)
#: Completions that the kernel keeps until this module takes them; it does when half of them are there.
_COMPLETIONS = 128
_EVENT_BYTES = 32
_FLAG_RESFD = 1


def signal(eventfd: int | None) -> None:
    """Signal ``eventfd`` (borrowed), if there is one; a full counter is a signal already."""
    if eventfd is None:
        return
    signaller = _signaller(os.getpid())
    if signaller is None:
        _signal_by_write(eventfd)
    else:
        signaller.signal(eventfd)


def wake(eventfd: int) -> None:
    """Signal ``eventfd``, which is this process's own and non-blocking."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(eventfd, 1)


def clear(eventfd: int) -> None:
    """Read ``eventfd`` (borrowed) without waiting, whatever its mode: another process may have read it meanwhile."""
    try:
        os.preadv(eventfd, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return


def _signal_by_write(eventfd: int) -> None:
    """Signal ``eventfd`` without asynchronous I/O (a sandbox may forbid that); waits only if a peer is hostile."""
    if NOW.wait({eventfd: select.POLLOUT}):
        os.eventfd_write(eventfd, 1)


class _Signaller:
    """A context of asynchronous I/O. It belongs to a process, not to its forks. Any number of threads."""

    def __init__(self, ffi: Any, libc: Any, context: Any) -> None:
        self._ffi = ffi
        self._libc = libc
        self._context = context
        self._lock = threading.Lock()
        self._left = 0
        self._numbers = [ffi.cast("int", number) for number in _NUMBERS]
        self._block = ffi.new("struct iocb *")
        self._block.aio_flags = _FLAG_RESFD
        self._blocks = ffi.new("struct iocb *[1]", [self._block])
        self._one = ffi.cast("long", 1)
        self._events = ffi.new("char[]", _COMPLETIONS * _EVENT_BYTES)

    def signal(self, eventfd: int) -> None:
        """Signal ``eventfd`` (borrowed). Raises OSError if it is not an eventfd."""
        with self._lock:
            self._block.aio_fildes = self._block.aio_resfd = eventfd
            if self._libc.syscall(self._numbers[1], self._context, self._one, self._blocks) != 1:
                code = self._ffi.errno
                raise OSError(code, f"signal descriptor {eventfd}: {os.strerror(code)}")
            self._left += 1
            if self._left >= _COMPLETIONS // 2:
                self._take_completions()

    def _take_completions(self) -> None:
        zero, most = self._ffi.cast("long", 0), self._ffi.cast("long", _COMPLETIONS)
        self._libc.syscall(self._numbers[2], self._context, zero, most, self._events, self._ffi.NULL)
        self._left = 0


@cache
def _signaller(_pid: int) -> _Signaller | None:
    """The signaller of this process; None if the kernel does not give a context."""
    from ._libc import ffi  # imported here, because most commands signal nobody

    libc = ffi.dlopen(None)
    context = ffi.new("unsigned long *")
    if libc.syscall(ffi.cast("int", _NUMBERS[0]), ffi.cast("unsigned int", _COMPLETIONS), context) != 0:
        return None
    return _Signaller(ffi, libc, ffi.cast("unsigned long", context[0]))
